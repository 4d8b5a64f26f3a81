"""Detectron2's region proposals and its sampling, with fewer operations, and fewer waits of the host for the GPU.

Anchors and regions: Detectron2 waits for the GPU several times in each image, to know how many are positive. Here that
is asked once for the batch. Random numbers are drawn in the same order, so that the same ones are sampled. Regression
targets of anchors are computed for the positive ones alone, instead of for all anchors of each image.

Proposals: Detectron2 checks and clips the boxes image by image, and suppresses the overlapping boxes of one image after
the other. The last step of the suppression goes through the boxes one by one, on a single multiprocessor of the GPU, or
on the CPU with older versions of torchvision. Here the boxes are checked and clipped for all images at once, and
several images are treated at the same time, each in a CUDA stream of its own.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy
import torch
from detectron2.layers import batched_nms
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from detectron2.utils.memory import retry_if_cuda_oom
from fvcore.nn import smooth_l1_loss
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

AT_ONCE = 16  # images

Suppress = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class BatchedRPN(RPN):
    """Detectron2's RPN, which treats the images of a batch together."""

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """For each image the labels of all anchors, 1, 0 or -1 (not sampled), and the box that each is matched to."""
        if self.anchor_boundary_thresh >= 0:  # a key of the models of 2018
            theirs: tuple[list[torch.Tensor], list[torch.Tensor]] = super().label_and_sample_anchors(
                anchors, gt_instances
            )
            return theirs
        joined = Boxes.cat(anchors)
        labels, boxes = [], []
        for instances in gt_instances:
            objects = instances.gt_boxes
            quality = retry_if_cuda_oom(pairwise_iou)(objects, joined)
            found = retry_if_cuda_oom(match)(self.anchor_matcher, quality)
            matched, label = (each.to(objects.device) for each in found)
            labels.append(label)
            boxes.append(objects.tensor[matched] if len(objects) else torch.zeros_like(joined.tensor))
        sampled = torch.full_like(stacked := torch.stack(labels), -1).view(-1)
        positive, negative = sample(stacked, self.batch_size_per_image, self.positive_fraction, background=0)
        sampled.index_fill_(0, torch.cat(positive), 1).index_fill_(0, torch.cat(negative), 0)
        return list(sampled.view_as(stacked)), boxes

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        gt_labels: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        gt_boxes: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Detectron2's losses of objectness and boxes, and its records of how many anchors were sampled."""
        if self.box_reg_loss_type != "smooth_l1":
            others: dict[str, torch.Tensor] = super().losses(
                anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
            )
            return others
        labels = torch.stack(gt_labels)
        image, anchor = (labels == 1).nonzero(as_tuple=True)
        valid = (labels >= 0).nonzero(as_tuple=True)
        storage, images = get_event_storage(), len(labels)
        storage.put_scalar("rpn/num_pos_anchors", len(image) / images)
        storage.put_scalar("rpn/num_neg_anchors", (len(valid[0]) - len(image)) / images)
        targets = self.box2box_transform.get_deltas(
            Boxes.cat(anchors).tensor[anchor], torch.stack(gt_boxes)[image, anchor]
        )
        predicted = torch.cat(pred_anchor_deltas, dim=1)[image, anchor]
        localisation = smooth_l1_loss(predicted, targets, beta=self.smooth_l1_beta, reduction="sum")
        objectness = functional.binary_cross_entropy_with_logits(
            torch.cat(pred_objectness_logits, dim=1)[valid], labels[valid].float(), reduction="sum"
        )
        losses = {"loss_rpn_cls": objectness, "loss_rpn_loc": localisation}
        normaliser = self.batch_size_per_image * images
        return {name: loss / normaliser * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """The best boxes of each image, by decreasing score; they carry no gradient.

        Args:
            anchors: of each level.
            pred_objectness_logits: of each level, (images, anchors).
            pred_anchor_deltas: of each level, (images, anchors, 4).
            image_sizes: heights and widths.

        Raises:
            FloatingPointError: in training, a box or a score is not finite.
        """
        with torch.no_grad():
            boxes, scores, levels = self._highest(
                self._decode_proposals(anchors, pred_anchor_deltas), pred_objectness_logits
            )
            usable = torch.isfinite(boxes).all(dim=2) & torch.isfinite(scores)
            diverged = ~usable.all()
            boxes = _clip(boxes, image_sizes)
            usable &= (boxes[..., 2:] - boxes[..., :2] > self.min_box_size).all(dim=2)
            *complete, diverged = torch.cat([usable.all(dim=1), diverged[None]]).tolist()
            if diverged and self.training:
                raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")
            images = []
            for number, all_usable in enumerate(complete):
                image = [boxes[number], scores[number], levels]
                if not all_usable:
                    places = usable[number].nonzero()[:, 0]
                    image = [each[places] for each in image]
                images.append(image)
            kept = suppress(images, functools.partial(self._suppress, most=self.post_nms_topk[self.training]))
        results = []
        for size, (candidates, logits, _), keep in zip(image_sizes, images, kept, strict=True):
            results.append(Instances(size, proposal_boxes=Boxes(candidates[keep]), objectness_logits=logits[keep]))
        return results

    def _highest(
        self, proposals: list[torch.Tensor], logits: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Boxes (images, N, 4) with the highest scores of each level, scores (images, N) and levels (N)."""
        boxes, scores, levels = [], [], []
        for level, (candidates, of_candidates) in enumerate(zip(proposals, logits, strict=True)):
            count = min(of_candidates.shape[1], self.pre_nms_topk[self.training])
            highest, order = of_candidates.sort(descending=True, dim=1)
            scores.append(highest[:, :count])
            boxes.append(candidates.gather(1, order[:, :count, None].expand(-1, -1, candidates.shape[2])))
            levels.append(torch.full((count,), level, dtype=torch.int64, device=candidates.device))
        return torch.cat(boxes, dim=1).float(), torch.cat(scores, dim=1), torch.cat(levels)

    def _suppress(self, boxes: torch.Tensor, scores: torch.Tensor, levels: torch.Tensor, most: int) -> torch.Tensor:
        """Indices of at most `most` boxes that overlap no better one of their level."""
        return batched_nms(boxes, scores.float(), levels, self.nms_thresh)[:most]


def _clip(boxes: torch.Tensor, image_sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Boxes (images, N, 4) without what is outside of the images."""
    limits = boxes.new_tensor([[width, height, width, height] for height, width in image_sizes])
    return torch.minimum(boxes.clamp(min=0), limits[:, None])


def suppress(images: Sequence[Sequence[torch.Tensor]], one: Suppress) -> list[torch.Tensor]:
    """What `one` returns for each image; on a GPU for several images at the same time."""
    device = images[0][0].device
    if device.type != "cuda" or len(images) == 1:
        return [one(*image) for image in images]
    current, (threads, streams) = torch.cuda.current_stream(device), _streams(device)

    def start(number: int) -> list[torch.Tensor]:
        stream = streams[number]
        stream.wait_stream(current)
        with torch.no_grad(), torch.cuda.stream(stream):
            found = [one(*image) for image in images[number :: len(streams)]]
        stream.synchronize()
        return found

    shares = list(threads.map(start, range(min(len(images), len(streams)))))
    kept = [shares[number % len(streams)][number // len(streams)] for number in range(len(images))]
    for indices in kept:
        indices.record_stream(current)  # its memory belongs to the other stream, which must not take it back before
    return kept


@functools.cache
def _streams(device: torch.device) -> tuple[ThreadPoolExecutor, list[torch.cuda.Stream]]:
    """Threads and as many streams. Each waits for its own stream only, without Python's lock."""
    return ThreadPoolExecutor(AT_ONCE, "suppression"), [torch.cuda.Stream(device) for _ in range(AT_ONCE)]


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
