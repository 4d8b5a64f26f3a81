"""A data worker: decode once and crop twice as uint8, against the conventional chain of PIL operations per view.

    python benchmarks/data.py

Both read the same JPEGs of the size that ImageNet's mostly have (500 x 375, quality 90), which are rendered first,
and make the two views of thesis Table B.1. The conventional worker does all of it with Pillow, view by view, and ends
with float tensors; the blur is Pillow's, which is faster than torchvision's. Ours leaves the photometric part to the
training device: its cost, per image of two views, is the second table.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from timing import alternate, build_parser, print_table, ratio, start
from torch import Tensor
from torchvision import transforms

from pretrain.batches.augment import augment
from pretrain.batches.draws import Augmentation
from pretrain.batches.views import Batch, ViewDataset
from pretrain.config import build_augmentations, get_defaults
from pretrain.images.sources import FileSource
from shapes.scene import compose, random_names

WIDTH, HEIGHT, QUALITY = 500, 375, 90


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = build_parser("Images a second of a data worker.", threads=1, rounds=7).parse_args(argv)
    device = start(args)
    count, rounds, sizes = (2, 1, (32,)) if args.quick else (24, args.rounds, (64, 224))
    augmentations = build_augmentations(get_defaults())
    workers, devices = [], []
    with tempfile.TemporaryDirectory() as folder:
        source = render_photographs(Path(folder), count)
        for size in sizes:
            dataset = ViewDataset(source, size, augmentations)
            views = [conventional_view(each, size) for each in augmentations]
            sides = (partial(read_ours, dataset), partial(read_conventional, source, views))
            seconds = alternate(sides, rounds, torch.device("cpu"))
            workers.append([f"{size}", *speeds(seconds, count), ratio(seconds, side=0, reference=1)])
            devices.append([f"{size}", *measure_device(read_ours(dataset), rounds, device)])
    print_table(["pixels", "ours, images/s", "conventional, images/s", "ratio"], workers)
    print()
    print_table(["pixels", f"augmentation on {device.type}, us/image", "of that, first view"], devices)


def render_photographs(folder: Path, count: int) -> FileSource:
    """JPEGs with textures, shading and noise, as photographs have them."""
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        rng = np.random.default_rng(number)
        scene = compose(rng, (WIDTH, HEIGHT), random_names(rng, 4), scale=(0.2, 0.5), clutter=6)
        Image.fromarray(scene.image).save(path, quality=QUALITY)
    return FileSource(paths, [0] * count, ["any"])


def conventional_view(augmentation: Augmentation, size: int) -> Callable[[Image.Image], Tensor]:
    """The chain of one view as torchvision's users write it."""
    jitter = transforms.ColorJitter(
        augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue
    )
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                size, augmentation.crop_scale, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(augmentation.flip),
            transforms.RandomApply([jitter], augmentation.jitter),
            transforms.RandomGrayscale(augmentation.gray),
            transforms.RandomApply([partial(blur, augmentation.blur_sigma)], augmentation.blur),
            transforms.RandomSolarize(128, augmentation.solarize),
            transforms.ToTensor(),
            transforms.Normalize(get_defaults().DATA.MEAN, get_defaults().DATA.STD),
        ]
    )


def blur(sigma: tuple[float, float], image: Image.Image) -> Image.Image:
    """Gaussian blur by Pillow, with a standard deviation drawn from a range."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*sigma)))


def read_ours(dataset: ViewDataset) -> Batch:
    """All images once, as a batch."""
    return dataset.read([(0, index) for index in range(len(dataset))])


def read_conventional(source: FileSource, views: Sequence[Callable[[Image.Image], Tensor]]) -> list[Tensor]:
    """All images once, as a batch of each view."""
    samples = []
    for path in source.paths:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
        samples.append([view(pixels) for view in views])
    return [torch.stack(side) for side in zip(*samples, strict=True)]


def speeds(seconds: np.ndarray, count: int) -> list[str]:
    """Images a second of each side, by its median."""
    return [f"{count / time:.0f}" for time in np.median(seconds, axis=0)]


def measure_device(batch: Batch, rounds: int, device: torch.device) -> list[str]:
    """Microseconds an image for both views, and for the first."""
    mean = torch.tensor(get_defaults().DATA.MEAN, device=device)
    std = torch.tensor(get_defaults().DATA.STD, device=device)
    images = batch.images.to(device)
    sides = [partial(augment, images[view], batch.params[view], mean, std) for view in range(2)]
    first, second = np.median(alternate(sides, rounds, device), axis=0) / len(batch.indices) * 1e6
    return [f"{first + second:.0f}", f"{first:.0f}"]


if __name__ == "__main__":
    main()
