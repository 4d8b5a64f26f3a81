"""Views of an image, the part that a worker does: decode once, draw the random numbers, crop and resize as uint8.

Randomness is a function of (seed, epoch, index, view) alone, and not of the worker, the batch or what ran before. So a
run can resume in the middle of an epoch, and the number of workers or processes may change.
The photometric operations happen later, batched on the training device (`augment.py`), with the parameters
drawn here. On one core this is several times faster than the usual chain of PIL operations per view.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from foundation.images import UnreadableImage
from pretrain.images.sources import Source

INTERPOLATIONS = ("bicubic", "bilinear")
JITTER_ORDERS = 24  # permutations of brightness, contrast, saturation, hue
MAX_REPLACEMENTS = 20
WHOLE_IMAGE = (1.0, 1.0)


@dataclass(frozen=True)
class Augmentation:
    """Distribution of one view (thesis Table B.1). Probabilities and factors; the defaults only crop.

    Jitter factors are drawn from [max(0, 1 - offset), 1 + offset], the hue shift from [-hue, hue] turns, the
    standard deviation of the blur from `blur_sigma` pixels.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gray: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0


class Param(IntEnum):
    """Columns of a view's parameters, float32."""

    FLIP = 0  # 0 or 1
    JITTER_ORDER = 1  # number of the permutation, -1 for no jitter
    BRIGHTNESS = 2
    CONTRAST = 3
    SATURATION = 4
    HUE = 5  # turns
    GRAY = 6  # 0 or 1
    BLUR_SIGMA = 7  # pixels, 0 for no blur
    SOLARIZE = 8  # 0 or 1


def random_stream(seed: int, epoch: int, index: int, view: int) -> np.random.Generator:
    """The random numbers of one view of one image in one epoch, from a counter-based generator."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, view, index, epoch]))


def draw_crop(
    augmentation: Augmentation, rng: np.random.Generator, height: int, width: int
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, distributed as torchvision's RandomResizedCrop."""
    flattest, tallest = (math.log(bound) for bound in augmentation.crop_ratio)
    for _ in range(10):
        area = height * width * rng.uniform(*augmentation.crop_scale)
        ratio = math.exp(rng.uniform(flattest, tallest))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # So elongated an image holds no crop of an allowed shape: take the largest central one.
    ratio = min(max(width / height, augmentation.crop_ratio[0]), augmentation.crop_ratio[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    w, h = max(w, 1), max(h, 1)
    return (height - h) // 2, (width - w) // 2, h, w


def draw_photometric(augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Parameters of the operations that follow the crop, in the columns of `Param`."""
    params = np.zeros(len(Param), np.float32)
    chance = rng.random(5)
    params[Param.FLIP] = chance[0] < augmentation.flip
    params[Param.JITTER_ORDER] = rng.integers(JITTER_ORDERS) if chance[1] < augmentation.jitter else -1
    for column, offset in (
        (Param.BRIGHTNESS, augmentation.brightness),
        (Param.CONTRAST, augmentation.contrast),
        (Param.SATURATION, augmentation.saturation),
    ):
        params[column] = rng.uniform(max(0.0, 1 - offset), 1 + offset)
    params[Param.HUE] = rng.uniform(-augmentation.hue, augmentation.hue)
    params[Param.GRAY] = chance[2] < augmentation.gray
    params[Param.BLUR_SIGMA] = rng.uniform(*augmentation.blur_sigma) if chance[3] < augmentation.blur else 0
    params[Param.SOLARIZE] = chance[4] < augmentation.solarize
    return params


def resize(image: Tensor, height: int, width: int, interpolation: str = "bicubic") -> Tensor:
    """Resize with antialiasing, uint8 (3, H, W) -> (3, height, width).

    Args:
        interpolation: one of `INTERPOLATIONS`; bicubic in the article (thesis B.1.3).
    """
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode=interpolation, antialias=True)[0]


def resized_side(size: int) -> int:
    """Length of an image's shorter side before the central crop of `size` pixels: 256 for 224, 73 for 64, 36 for 32.

    Thesis B.1.2 keeps the ratio 256 / 224 for all datasets, as HaoChen et al. 2021, whose code truncates.
    """
    return size * 8 // 7


def center_crop(image: Tensor, size: int, interpolation: str = "bicubic") -> Tensor:
    """The test-time view (thesis B.1.2): uint8 (3, H, W) -> (3, size, size).

    The shorter side is resized to `resized_side(size)`, then the central square is cut out. Sizes and offsets are
    rounded as torchvision's `Resize` and `CenterCrop` do.
    """
    short, side = min(image.shape[1:]), resized_side(size)
    height, width = (max(side * length // short, size) for length in image.shape[1:])
    image = resize(image, height, width, interpolation)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[:, top : top + size, left : left + size]


@dataclass(frozen=True)
class Sample:
    """One image, ready to be batched. V views."""

    images: Tensor  # (V, 3, S, S) uint8
    params: Tensor  # (V, len(Param)) float32
    label: int
    index: int
    unreadable: list[str]  # why images before it, which it replaces, could not be read


class ViewDataset(Dataset):
    """Random views of the images of a source. The key of an item is (epoch, index).

    Args:
        source: the images.
        size: pixels of the square views.
        augmentations: one for each view; none: a single central crop, the same in every epoch.
        seed: of all random numbers.
        interpolation: of every resize, one of `INTERPOLATIONS`.
        region: (low, high) fraction of the image's area. All random views of an image are cropped from one region of
            this area, drawn for each epoch: in scenes of several objects, views of one place show the same object.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        augmentations: Sequence[Augmentation],
        seed: int = 0,
        interpolation: str = "bicubic",
        region: tuple[float, float] = WHOLE_IMAGE,
    ) -> None:
        self.source = source
        self.size = size
        self.augmentations = augmentations
        self.seed = seed
        self.interpolation = interpolation
        self.region = region

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        image, used, unreadable = self._read(index)
        if not self.augmentations:
            views = [center_crop(image, self.size, self.interpolation)]
            params = np.zeros((1, len(Param)), np.float32)
            params[:, Param.JITTER_ORDER] = -1
        else:
            if self.region != WHOLE_IMAGE:
                # A stream of its own leaves the draws of the views what they are without a region.
                shared = random_stream(self.seed, epoch, index, len(self.augmentations))
                image = crop(image, draw_crop(Augmentation(crop_scale=self.region), shared, *image.shape[1:]))
            streams = [random_stream(self.seed, epoch, index, view) for view in range(len(self.augmentations))]
            views = [self._crop(image, each, rng) for each, rng in zip(self.augmentations, streams, strict=True)]
            params = np.stack(
                [draw_photometric(each, rng) for each, rng in zip(self.augmentations, streams, strict=True)]
            )
        label = int(self.source.labels[used])
        return Sample(torch.stack(views), torch.from_numpy(params), label, index, unreadable)

    def _crop(self, image: Tensor, augmentation: Augmentation, rng: np.random.Generator) -> Tensor:
        part = crop(image, draw_crop(augmentation, rng, image.shape[1], image.shape[2]))
        return resize(part, self.size, self.size, self.interpolation)

    def _read(self, index: int) -> tuple[Tensor, int, list[str]]:
        """The image, or the next readable one in its place, which is the same whenever it is read.

        Raises:
            UnreadableImage: `MAX_REPLACEMENTS` images in a row are damaged.
        """
        unreadable: list[str] = []
        for step in range(MAX_REPLACEMENTS):
            used = (index + step) % len(self.source)
            try:
                array = self.source.read(used)
            except UnreadableImage as error:
                unreadable.append(str(error))
                continue
            return torch.from_numpy(array).permute(2, 0, 1), used, unreadable
        raise UnreadableImage(f"{len(unreadable)} images in a row cannot be read, the first: {unreadable[0]}")


def crop(image: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """The part of an image (C, H, W) in a box of top, left, height and width. No copy is made."""
    top, left, height, width = box
    return image[:, top : top + height, left : left + width]


@dataclass
class Batch:
    """N images with V views each."""

    images: Tensor  # (V, N, 3, S, S) uint8
    params: Tensor  # (V, N, len(Param)) float32
    labels: Tensor  # (N,) int64
    indices: Tensor  # (N,) int64
    unreadable: list[str]

    def pin_memory(self) -> "Batch":
        """Called by the loader, so that the copy to a GPU does not block. The parameters, which the CPU reads, stay."""
        self.images = self.images.pin_memory()
        self.labels = self.labels.pin_memory()
        return self


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples to a batch, views first."""
    return Batch(
        images=torch.stack([sample.images for sample in samples], dim=1),
        params=torch.stack([sample.params for sample in samples], dim=1),
        labels=torch.tensor([sample.label for sample in samples]),
        indices=torch.tensor([sample.index for sample in samples]),
        unreadable=[message for sample in samples for message in sample.unreadable],
    )
