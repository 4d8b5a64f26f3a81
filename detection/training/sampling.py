"""Detectron2's matching of boxes with objects and its sampling, with few waits of the host for the GPU.

Detectron2 waits for the GPU several times in each image, to know how many boxes are positive. Here that is asked once
for a batch. Random numbers are drawn in the same order, so that the same boxes are sampled.
"""

import functools

import numpy
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch.nn.utils.rnn import pad_sequence


def match(matcher: Matcher, quality: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a matcher returns: for each box the best object, and the label.

    Args:
        matcher: with its thresholds.
        quality: IoU of objects and boxes, (objects, boxes).
    """
    if not quality.numel():
        nothing: tuple[torch.Tensor, torch.Tensor] = matcher(quality)
        return nothing
    best, matches = quality.max(dim=0)
    bounds, kinds = _on_device(tuple(matcher.thresholds[1:-1]), tuple(matcher.labels), quality.device)
    labels = kinds[torch.bucketize(best, bounds, right=True)]
    if matcher.allow_low_quality_matches:
        labels.masked_fill_((quality == quality.amax(dim=1, keepdim=True)).any(dim=0), 1)
    return matches, labels


@functools.lru_cache
def _on_device(
    thresholds: tuple[float, ...], labels: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matcher's inner thresholds and its labels."""
    return torch.tensor(thresholds, device=device), torch.tensor(labels, dtype=torch.int8, device=device)


def sample(
    labels: torch.Tensor, count: int, fraction: float, background: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What Detectron2's `subsample_labels` draws for one image after the other.

    Args:
        labels: (images, N); -1 is never drawn.
        count: how many to draw in an image.
        fraction: of them that may be positive.
        background: the label that is not positive.

    Returns:
        for each image the drawn positive labels and the drawn negative ones, as indices of the flattened `labels`.
    """
    kinds = ((labels != -1) & (labels != background), labels == background)
    counts = torch.stack([kind.sum(dim=1) for kind in kinds]).tolist()
    found = [kind.view(-1).nonzero()[:, 0].split(each) for kind, each in zip(kinds, counts, strict=True)]
    positive, negative = [], []
    for of_positive, of_negative in zip(*found, strict=True):
        wanted = min(len(of_positive), int(count * fraction))
        first = torch.randperm(len(of_positive), device=labels.device)[:wanted]
        second = torch.randperm(len(of_negative), device=labels.device)[: min(len(of_negative), count - wanted)]
        positive.append(of_positive[first])
        negative.append(of_negative[second])
    return positive, negative


class BatchedSampling:
    """Mixed into a class of ROI heads: they sample the regions of all images of a batch together."""

    proposal_append_gt: bool
    proposal_matcher: Matcher
    num_classes: int
    batch_size_per_image: int
    positive_fraction: float

    @torch.no_grad()
    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """The sampled regions of each image with their class, and all that `targets` say of the object matched to each.

        Args:
            proposals: boxes of each image.
            targets: objects of each image.
        """
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        matched, classes = [], []
        for boxes, objects in zip(proposals, targets, strict=True):
            matches, labels = match(self.proposal_matcher, pairwise_iou(objects.gt_boxes, boxes.proposal_boxes))
            matched.append(matches)
            if len(objects):
                of_boxes = objects.gt_classes[matches]
                of_boxes.masked_fill_(labels == 0, self.num_classes).masked_fill_(labels == -1, -1)
            else:
                of_boxes = torch.full_like(matches, self.num_classes)
            classes.append(of_boxes)
        padded = pad_sequence(classes, batch_first=True, padding_value=-1)
        foreground, background = sample(padded, self.batch_size_per_image, self.positive_fraction, self.num_classes)
        results = []
        for number, (boxes, objects) in enumerate(zip(proposals, targets, strict=True)):
            chosen = torch.cat([foreground[number], background[number]]) - number * padded.shape[1]
            regions = boxes[chosen]
            regions.gt_classes = classes[number][chosen]
            if len(objects):
                for name, value in objects.get_fields().items():
                    if name.startswith("gt_") and not regions.has(name):
                        regions.set(name, value[matched[number][chosen]])
            results.append(regions)
        storage = get_event_storage()
        storage.put_scalar("roi_head/num_fg_samples", numpy.mean([len(each) for each in foreground]))
        storage.put_scalar("roi_head/num_bg_samples", numpy.mean([len(each) for each in background]))
        return results


def sample_together(heads: ROIHeads) -> None:
    """Let ROI heads sample the regions of a batch together, unless their class samples in a way of its own."""
    kind = type(heads)
    own = ("label_and_sample_proposals", "_sample_proposals")
    if all(getattr(kind, name) is getattr(ROIHeads, name) for name in own):
        heads.__class__ = type(f"Batched{kind.__name__}", (BatchedSampling, kind), {})
