"""The proposals of a batch as Detectron2 selects them, with fewer waits of the host for the GPU.

Detectron2 checks and clips the boxes image by image, and suppresses the overlapping boxes of one image after the other.
The last step of the suppression goes through the boxes one by one, on a single multiprocessor of the GPU, or on the CPU
with older versions of torchvision. Here the boxes are checked and clipped for all images at once, and those of several
images are suppressed at the same time, each image in a CUDA stream of its own.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances

AT_ONCE = 16  # images

Suppress = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class BatchedRPN(RPN):
    """Detectron2's RPN; the proposals of its images are selected together."""

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
            images = [
                (boxes[number], scores[number], levels)
                if all_usable
                else (boxes[number][usable[number]], scores[number][usable[number]], levels[usable[number]])
                for number, all_usable in enumerate(complete)
            ]
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


def suppress(images: Sequence[tuple[torch.Tensor, ...]], one: Suppress) -> list[torch.Tensor]:
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
