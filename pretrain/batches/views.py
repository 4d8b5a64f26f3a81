"""The part of a view that a worker computes: open, draw the random numbers, decode once, crop and resize as uint8.

The photometric operations happen later, batched on the training device (`augment.py`), with the parameters
drawn here (`draws.py`). On one core this is several times faster than the usual chain of PIL operations per view.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from foundation.images import REDUCTIONS, OpenImage, UnreadableImage
from pretrain.batches.draws import Augmentation, Param, draw_crop, draw_photometric, random_stream
from pretrain.batches.resizing import prepare_resize, resize
from pretrain.images.sources import Source

Box = tuple[int, int, int, int]  # top, left, height, width

MAX_REPLACEMENTS = 20
WHOLE_IMAGE = (1.0, 1.0)
KEPT_MEMORY = 2**25  # bytes, 11 megapixels: decoded images up to this size are written over one another
AHEAD = 64  # images that are opened before the first of them is decoded


def resized_side(size: int) -> int:
    """Length of an image's shorter side before the central crop of `size` pixels: 256 for 224, 73 for 64, 36 for 32.

    Thesis B.1.2 keeps the ratio 256 / 224 for all datasets, as HaoChen et al. 2021, whose code truncates.
    """
    return size * 8 // 7


def center_crop(image: Tensor, size: int, interpolation: str = "bicubic") -> Tensor:
    """The test-time view (thesis B.1.2): uint8 (.., 3, H, W) -> (.., 3, size, size).

    The shorter side is resized to `resized_side(size)`, then the central square is cut out. Sizes and offsets are
    rounded as torchvision's `Resize` and `CenterCrop` do.
    """
    short, side = min(image.shape[-2:]), resized_side(size)
    height, width = (max(side * length // short, size) for length in image.shape[-2:])
    image = resize(image, height, width, interpolation)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return crop(image, (top, left, size, size))


@dataclass
class Batch:
    """N images with V views each."""

    images: Tensor  # (V, N, 3, S, S) uint8, each view in channels-last memory
    params: Tensor  # (V, N, len(Param)) float32
    labels: Tensor  # (N,) int64
    indices: Tensor  # (N,) int64
    unreadable: list[str]  # why images, which the next ones replace, could not be read

    def pin_memory(self) -> "Batch":
        """Called by the loader, so that the copy to a GPU does not block. The parameters, which the CPU reads, stay."""
        self.images = self.images.pin_memory()
        self.labels = self.labels.pin_memory()
        return self


def ignore(index: int) -> None:
    """Does nothing: the default of `begin`."""


@dataclass(frozen=True)
class _Opened:
    """An image that is ready to be decoded.

    Args:
        image: the image.
        step: how many images after the requested one it is, which is damaged.
        boxes: the crops drawn for it.
        reduction: by which the sides are divided.
        buffer: memory for the pixels.
        resizes: fill the views once the image is in the buffer. Empty where the boxes have to be cut from its pixels.
    """

    image: OpenImage
    step: int
    boxes: Sequence[Box]
    reduction: int
    buffer: np.ndarray | None
    resizes: Sequence[Callable[[], object]]


class ViewDataset:
    """Random views of the images of a source.

    Args:
        source: the images.
        size: pixels of the square views.
        augmentations: one for each view; none: a single central crop, the same in every epoch.
        seed: of all random numbers.
        interpolation: of every resize, one of `resizing.INTERPOLATIONS`.
        region: (low, high) fraction of the image's area. All random views of an image are cropped from one region of
            this area, drawn for each epoch: in scenes of several objects, views of one place show the same object.
        scaled: whether to decode JPEGs at 1/2, 1/4 or 1/8 of their size, the smallest at which no crop has to be
            enlarged. The random numbers stay the same; the pixels differ a little.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        augmentations: Sequence[Augmentation],
        seed: int = 0,
        interpolation: str = "bicubic",
        region: tuple[float, float] = WHOLE_IMAGE,
        scaled: bool = False,
    ) -> None:
        self.source = source
        self.size = size
        self.augmentations = augmentations
        self.seed = seed
        self.interpolation = interpolation
        self.region = region
        self.scaled = scaled
        self._memory = torch.empty(0, dtype=torch.uint8)  # for decoded images, one after the other

    def __len__(self) -> int:
        return len(self.source)

    def read(self, keys: Sequence[tuple[int, int]], begin: Callable[[int], None] = ignore) -> Batch:
        """The views of some images.

        Args:
            keys: (epoch, index) of each.
            begin: called with the index of each image before it is read.

        Raises:
            UnreadableImage: `MAX_REPLACEMENTS` images in a row are damaged.
        """
        views = max(len(self.augmentations), 1)
        images = _new_images(views, len(keys), self.size)
        outputs = list(zip(*(view.split(1) for view in images), strict=True))  # memory of each image's views
        params = np.zeros((views, len(keys), len(Param)), np.float32)
        steps: list[int] = []
        unreadable: list[str] = []
        ahead: deque[_Opened] = deque()
        for place, (_, index) in enumerate(keys):
            if not ahead:
                part = slice(place, place + AHEAD)
                images_ahead = self._open_some(keys[part], begin, unreadable)
                ahead.extend(self._prepare(images_ahead, keys[part], params[:, part], outputs[part]))
            begin(index)
            opened = ahead.popleft()
            while not self._fill(opened, outputs[place], unreadable):
                part = slice(place, place + 1)
                replacement = self._open(index, opened.step + 1, unreadable)
                (opened,) = self._prepare([replacement], keys[part], params[:, part], outputs[part])
            steps.append(opened.step)
        total, labels = len(self.source), self.source.labels
        chosen = [int(labels[(index + step) % total]) for (_, index), step in zip(keys, steps, strict=True)]
        indices = torch.tensor([index for _, index in keys])
        return Batch(images, torch.from_numpy(params), torch.tensor(chosen), indices, unreadable)

    def _open_some(
        self, keys: Sequence[tuple[int, int]], begin: Callable[[int], None], unreadable: list[str]
    ) -> list[tuple[OpenImage, int]]:
        """Open images as `_open` does, as many as fit `KEPT_MEMORY`, but at least one."""
        images: list[tuple[OpenImage, int]] = []
        held = 0
        for _, index in keys:
            begin(index)
            images.append(self._open(index, 0, unreadable))
            held += images[-1][0].nbytes
            if held > KEPT_MEMORY:
                break
        return images

    def _open(self, index: int, step: int, unreadable: list[str]) -> tuple[OpenImage, int]:
        """Open an image, or the next one that can be opened, which is always the same.

        Args:
            index: of the image that was asked for.
            step: images after it to begin with.
            unreadable: takes the messages of damaged images.

        Returns:
            The image, and how many images after the one that was asked for it is.
        """
        while step < MAX_REPLACEMENTS:
            try:
                return self.source.open((index + step) % len(self.source)), step
            except UnreadableImage as error:
                unreadable.append(str(error))
                step += 1
        raise UnreadableImage(f"{MAX_REPLACEMENTS} images in a row cannot be read, the last: {unreadable[-1]}")

    def _prepare(
        self,
        images: Sequence[tuple[OpenImage, int]],
        keys: Sequence[tuple[int, int]],
        params: np.ndarray,
        outputs: Sequence[Sequence[Tensor]],
    ) -> list[_Opened]:
        """Draw for images, and do all that can be done before they are decoded.

        Decoding drives Python's code from the processor's caches, so that what is done between two images takes about
        three times as long as here.

        Args:
            images: with their steps, as `_open` returns them.
            keys: (epoch, index) of the images that were asked for; there may be more of them.
            params: (V, N or more, len(Param)), is filled.
            outputs: for each image the memory of its views.
        """
        plans = []
        for place, ((image, step), (epoch, index)) in enumerate(zip(images, keys, strict=False)):
            boxes = self._draw(epoch, index, image, params[:, place])
            reduction = self._reduction(image, boxes)
            size = 3 * -(-image.height // reduction) * -(-image.width // reduction)
            plans.append((image, step, boxes, reduction, size))
        needed = max((size for *_, size in plans if size <= KEPT_MEMORY), default=0)
        if len(self._memory) < needed:
            self._memory = torch.empty(needed, dtype=torch.uint8)
        buffer = self._memory.numpy()
        return [
            _Opened(image, step, boxes, reduction, buffer, self._resizes(image, boxes, reduction, views))
            if size <= len(buffer)
            else _Opened(image, step, boxes, reduction, None, ())
            for (image, step, boxes, reduction, size), views in zip(plans, outputs, strict=False)
        ]

    def _resizes(
        self, image: OpenImage, boxes: Sequence[Box], reduction: int, views: Sequence[Tensor]
    ) -> Sequence[Callable[[], object]]:
        """For each box, what `resize` does with this part of `_memory` and a view. Empty for other files than JPEGs."""
        if reduction != 1 or not image.fills_buffer:
            return ()
        row = 3 * image.width
        return [
            prepare_resize(
                self._memory.as_strided((1, 3, height, width), (row, 1, row, 3), row * top + 3 * left),
                view,
                self.interpolation,
            )
            for (top, left, height, width), view in zip(boxes, views, strict=False)
        ]

    def _reduction(self, image: OpenImage, boxes: Sequence[Box]) -> int:
        """By how much to divide the sides. Without boxes the whole image is resized for the central crop."""
        if not self.scaled:
            return 1
        if boxes:
            return reduction_for(boxes, self.size)
        return reduction_for([(0, 0, image.height, image.width)], resized_side(self.size))

    def _draw(self, epoch: int, index: int, image: OpenImage, params: np.ndarray) -> Sequence[Box]:
        """The boxes of the random views; none for the central crop."""
        if not self.augmentations:
            params[:, Param.JITTER_ORDER] = -1
        top, left, height, width = 0, 0, image.height, image.width
        if self.region != WHOLE_IMAGE:
            # A stream of its own leaves the draws of the views what they are without a region.
            shared = random_stream(self.seed, epoch, index, len(self.augmentations))
            top, left, height, width = draw_crop(Augmentation(crop_scale=self.region), shared, height, width)
        boxes = []
        for view, augmentation in enumerate(self.augmentations):
            stream = random_stream(self.seed, epoch, index, view)
            down, right, h, w = draw_crop(augmentation, stream, height, width)
            boxes.append((top + down, left + right, h, w))
            params[view] = draw_photometric(augmentation, stream)
        return boxes

    def _fill(self, opened: _Opened, views: Sequence[Tensor], unreadable: list[str]) -> bool:
        """Decode an image and fill in its views, (1, 3, S, S) each. False where it is damaged."""
        image = opened.image
        try:
            pixels = image.decode(opened.reduction, opened.buffer)
        except UnreadableImage as error:
            unreadable.append(str(error))
            return False
        if opened.resizes:
            for each in opened.resizes:
                each()
        elif opened.boxes:
            smaller = pixels.shape[:2] != (image.height, image.width)
            for box, view in zip(opened.boxes, views, strict=True):
                part = crop(_as_tensor(pixels), reduced(box, opened.reduction) if smaller else box)
                resize(part, self.size, self.size, self.interpolation, view)
        else:
            views[0].copy_(center_crop(_as_tensor(pixels), self.size, self.interpolation))
        return True


def _as_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) -> (1, 3, H, W), the same memory."""
    return torch.from_numpy(pixels[None]).permute(0, 3, 1, 2)


def _new_images(views: int, count: int, size: int) -> Tensor:
    """Memory for (V, N, 3, S, S) uint8, channels last. In a loader worker it is shared with the training process."""
    shape = (views, count, size, size, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    storage = torch.UntypedStorage._new_shared(3 * views * count * size * size)  # as PyTorch's own collate function
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape).permute(0, 1, 4, 2, 3)  # type: ignore[call-overload]


def crop(image: Tensor, box: Box) -> Tensor:
    """The part of an image (.., H, W) in a box. No copy is made."""
    top, left, height, width = box
    return image[..., top : top + height, left : left + width]


def reduction_for(boxes: Sequence[Box], size: int) -> int:
    """The largest of `REDUCTIONS` that leaves each box `size` pixels or more on both sides, or else 1."""
    least = min(min(box[2:]) for box in boxes)
    return next(reduction for reduction in REDUCTIONS if reduction == 1 or least >= reduction * size)


def reduced(box: Box, reduction: int) -> Box:
    """A box in an image whose sides are divided, with its borders rounded to whole pixels."""
    top, left, height, width = box
    # Half up: Python's rounding to even could make a box smaller than its own size divided and rounded down.
    y0, y1, x0, x1 = ((2 * side + reduction) // (2 * reduction) for side in (top, top + height, left, left + width))
    return y0, x0, y1 - y0, x1 - x0
