"""The views of thesis Table B.1 as users of other libraries write them: Pillow, torchvision v2 and albumentations.

A library makes two uint8 crops of a JPEG (the same work as a data worker of this project), and two augmented views as
float tensors (the same as worker and device together). The distributions are those of this project, except where an
operation has other parameters: hue and saturation in albumentations' colour space, and the radii of the blurs.
"""

import io
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from pretrain.batches.draws import Augmentation
from pretrain.config import get_defaults

DATA = get_defaults().DATA
BLUR_SIDE = 13  # pixels of torchvision's blur; ours reaches as far


@dataclass(frozen=True)
class Library:
    """Two ways to read a JPEG, both from its bytes, for the augmentations that it was built with.

    Args:
        name: of the library, with the method of resizing.
        crops: two uint8 crops.
        views: two augmented, normalised views, (3, S, S) float32.
    """

    name: str
    crops: Callable[[bytes], Sequence[object]]
    views: Callable[[bytes], Sequence[Tensor]]


def build_libraries(augmentations: Sequence[Augmentation], size: int, threads: int) -> tuple[list[Library], list[str]]:
    """The libraries that are installed, and a line for each that is not."""
    libraries = [_pillow(augmentations, size), _torchvision(augmentations, size)]
    try:
        import albumentations
        import cv2
    except ImportError as error:
        return libraries, [f"albumentations is left out ({error}): pip install albumentationsx opencv-python-headless"]
    cv2.setNumThreads(threads)
    for kind in ("cubic", "area"):
        libraries.append(_albumentations(albumentations, cv2, kind, augmentations, size))
    return libraries, []


def _pillow(augmentations: Sequence[Augmentation], size: int) -> Library:
    """Torchvision's operations on Pillow's images, the usual chain; the blur is Pillow's, which is faster."""

    def decode(data: bytes) -> Image.Image:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")

    crops = [
        transforms.RandomResizedCrop(size, each.crop_scale, interpolation=transforms.InterpolationMode.BICUBIC)
        for each in augmentations
    ]
    blurs = [partial(_blur, each.blur_sigma) for each in augmentations]
    chains = _chains(transforms, augmentations, crops, blurs, transforms.ToTensor())
    return Library("Pillow", partial(_twice, decode, crops), partial(_twice, decode, chains))


def _blur(sigma: tuple[float, float], image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*sigma)))


def _torchvision(augmentations: Sequence[Augmentation], size: int) -> Library:
    """Torchvision v2 on uint8 tensors, with antialiasing."""

    def decode(data: bytes) -> Tensor:
        with warnings.catch_warnings(action="ignore"):  # its decoders are deprecated
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)

    crops = [
        v2.RandomResizedCrop(size, each.crop_scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        for each in augmentations
    ]
    blurs = [v2.GaussianBlur(BLUR_SIDE, each.blur_sigma) for each in augmentations]
    chains = _chains(v2, augmentations, crops, blurs, v2.ToDtype(torch.float32, scale=True))
    return Library("torchvision v2", partial(_twice, decode, crops), partial(_twice, decode, chains))


def _chains(
    library: ModuleType,
    augmentations: Sequence[Augmentation],
    crops: Sequence[Callable],
    blurs: Sequence[Callable],
    to_float: Callable,
) -> list[Callable]:
    """The chain of each view, of the classes that torchvision's two versions have in common."""
    return [
        library.Compose(
            [
                crop,
                library.RandomHorizontalFlip(each.flip),
                library.RandomApply(
                    [library.ColorJitter(each.brightness, each.contrast, each.saturation, each.hue)], each.jitter
                ),
                library.RandomGrayscale(each.gray),
                library.RandomApply([blur], each.blur),
                library.RandomSolarize(128, each.solarize),
                to_float,
                library.Normalize(DATA.MEAN, DATA.STD),
            ]
        )
        for crop, blur, each in zip(crops, blurs, augmentations, strict=True)
    ]


def _albumentations(
    albumentations: ModuleType, cv2: ModuleType, kind: str, augmentations: Sequence[Augmentation], size: int
) -> Library:
    """OpenCV's decoder and resizing: cubic without antialiasing, or `area`, which averages where it shrinks."""
    interpolation = {"cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}[kind]

    def decode(data: bytes) -> np.ndarray:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)

    def around(width: float) -> tuple[float, float]:
        return max(0.0, 1 - width), 1 + width

    crops, chains = [], []
    for each in augmentations:
        crop = albumentations.RandomResizedCrop((size, size), scale=each.crop_scale, interpolation=interpolation)
        jitter = albumentations.ColorJitter(
            *map(around, (each.brightness, each.contrast, each.saturation)), (-each.hue, each.hue), p=each.jitter
        )
        chain = [
            crop,
            albumentations.HorizontalFlip(p=each.flip),
            jitter,
            albumentations.ToGray(p=each.gray),
            albumentations.GaussianBlur(sigma_range=each.blur_sigma, p=each.blur),
            albumentations.Solarize(p=each.solarize),
            albumentations.Normalize(DATA.MEAN, DATA.STD),
        ]
        crops.append(_by_name(albumentations.Compose([crop])))
        chains.append(_to_tensor(_by_name(albumentations.Compose(chain))))
    return Library(f"albumentations, {kind}", partial(_twice, decode, crops), partial(_twice, decode, chains))


def _by_name(compose: Callable) -> Callable[[np.ndarray], np.ndarray]:
    return lambda pixels: compose(image=pixels)["image"]


def _to_tensor(chain: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], Tensor]:
    return lambda pixels: torch.from_numpy(np.ascontiguousarray(chain(pixels).transpose(2, 0, 1)))


def _twice(decode: Callable, chains: Sequence[Callable], data: bytes) -> list:
    """Both views of one decoded image."""
    pixels = decode(data)
    return [chain(pixels) for chain in chains]
