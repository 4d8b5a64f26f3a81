"""A data worker: open, decode once and crop twice as uint8, beside other libraries.

    python benchmarks/data.py
    pip install albumentationsx opencv-python-headless      # for the rows of albumentations

All sides read the same JPEGs of the size that ImageNet's mostly have (500 x 375, quality 90), which are rendered first,
and make the two views of thesis Table B.1. Four tables:

- the worker against the conventional chain of Pillow operations, which ends with augmented float tensors: ours leaves
  the photometric part to the training device;
- the same work: files to a batch of two uint8 crops, beside the same with PyTorch's resizing, and beside decoding alone
  (simplejpeg, files in memory);
- the whole chain on this device: files to two augmented, normalised views;
- the cost of augmentation on the device.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import simplejpeg
import torch
from other_workers import Library, build_libraries
from PIL import Image
from timing import Side, alternate, build_parser, print_table, ratio, start
from torch import Tensor

from foundation.errors import run
from pretrain.batches import resizing
from pretrain.batches.augment import augment
from pretrain.batches.views import Batch, ViewDataset
from pretrain.config import build_augmentations, get_defaults
from pretrain.images.sources import FileSource
from shapes.scene import compose, random_names

WIDTH, HEIGHT, QUALITY = 500, 375, 90
CPU = torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = build_parser("Images a second of a data worker.", threads=1, rounds=7).parse_args(argv)
    device = start(args)
    count, rounds, sizes = (2, 1, (32,)) if args.quick else (24, args.rounds, (64, 224))
    augmentations = build_augmentations(get_defaults())
    workers: list[list[str]] = []
    same: list[list[str]] = []
    whole: list[list[str]] = []
    devices: list[list[str]] = []
    missing: list[str] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = render_photographs(Path(folder), count)
            for size in sizes:
                dataset = ViewDataset(source, size, augmentations)
                libraries, missing = build_libraries(augmentations, size, torch.get_num_threads())
                ours = partial(read_ours, dataset)
                seconds = alternate((ours, partial(read_all, source, libraries[0].views)), rounds, CPU)
                workers.append([f"{size}", *speeds(seconds, count), ratio(seconds, side=0, reference=1)])
                same += compare(size, ours, source, libraries, lambda library: library.crops, rounds, parts=True)
                both = partial(read_and_augment, dataset, device)
                whole += compare(size, both, source, libraries, lambda library: library.views, rounds, device)
                devices.append([f"{size}", *measure_device(ours(), rounds, device)])
    finally:  # also what was measured before an interruption
        print_tables(workers, same, whole, devices, device, missing)


def print_tables(
    workers: Sequence[Sequence[str]],
    same: Sequence[Sequence[str]],
    whole: Sequence[Sequence[str]],
    devices: Sequence[Sequence[str]],
    device: torch.device,
    missing: Sequence[str],
) -> None:
    """Print the four tables, and which libraries are missing."""
    print_table(["pixels", "ours, images/s", "conventional, images/s", "ratio"], workers)
    for title, rows in (("decode and two uint8 crops", same), (f"two augmented views, on {device.type}", whole)):
        print()
        print_table(["pixels", title, "images/s", "ours / it"], rows)
    print()
    print_table(["pixels", f"augmentation on {device.type}, us/image", "of that, first view"], devices)
    for line in missing:
        print(f"\n{line}")


def compare(
    size: int,
    ours: Side,
    source: FileSource,
    libraries: Sequence[Library],
    work: Callable[[Library], Callable[[bytes], object]],
    rounds: int,
    device: torch.device = CPU,
    parts: bool = False,
) -> list[list[str]]:
    """Rows of a table: ours, the libraries in turns with it, and, if asked for, what parts of ours cost."""
    sides = {"ours": ours}
    sides |= {library.name: partial(read_all, source, work(library), device) for library in libraries}
    if parts:
        sides["ours, PyTorch's resizing"] = partial(without_compiled_resizing, ours)
        sides["decoding alone"] = partial(decode_all, [path.read_bytes() for path in source.paths])
    seconds = alternate(list(sides.values()), rounds, device)
    rates = speeds(seconds, len(source))
    ratios = [ratio(seconds, side=0, reference=place) if place else "" for place in range(len(sides))]
    return [[f"{size}", *row] for row in zip(sides, rates, ratios, strict=True)]


def render_photographs(folder: Path, count: int) -> FileSource:
    """JPEGs with textures, shading and noise, as photographs have them."""
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        rng = np.random.default_rng(number)
        scene = compose(rng, (WIDTH, HEIGHT), random_names(rng, 4), scale=(0.2, 0.5), clutter=6)
        Image.fromarray(scene.image).save(path, quality=QUALITY)
    return FileSource(paths, [0] * count, ["any"])


def read_ours(dataset: ViewDataset) -> Batch:
    """All images once, as a batch."""
    return dataset.read([(0, index) for index in range(len(dataset))])


def without_compiled_resizing(side: Side) -> None:
    """The work of a side with PyTorch's operation in place of resizing.c."""
    with mock.patch.object(resizing, "load_library", return_value=None):
        side()


def read_and_augment(dataset: ViewDataset, device: torch.device) -> list[Tensor]:
    """All images once, as augmented views."""
    batch, (mean, std) = read_ours(dataset), statistics(device)
    images = batch.images.to(device)
    return [augment(images[view], batch.params[view], mean, std) for view in range(2)]


def read_all(source: FileSource, work: Callable[[bytes], Sequence[object]], device: torch.device = CPU) -> list[object]:
    """All images once, as a batch of each view on the device."""
    samples = [work(path.read_bytes()) for path in source.paths]
    batches = [stack(side) for side in zip(*samples, strict=True)]
    return [batch.to(device) if isinstance(batch, Tensor) else batch for batch in batches]


def stack(views: Sequence[object]) -> object:
    """A batch of tensors, arrays or Pillow's images."""
    first = views[0]
    return torch.stack(views) if isinstance(first, Tensor) else np.stack([np.asarray(view) for view in views])  # type: ignore[arg-type]


def decode_all(contents: Sequence[bytes]) -> None:
    """Decode all images."""
    for content in contents:
        simplejpeg.decode_jpeg(content, colorspace="RGB")


def speeds(seconds: np.ndarray, count: int) -> list[str]:
    """Images a second of each side, by its median."""
    return [f"{count / time:.0f}" for time in np.median(seconds, axis=0)]


def statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels."""
    data = get_defaults().DATA
    return torch.tensor(data.MEAN, device=device), torch.tensor(data.STD, device=device)


def measure_device(batch: Batch, rounds: int, device: torch.device) -> list[str]:
    """Microseconds an image for both views, and for the first."""
    images, (mean, std) = batch.images.to(device), statistics(device)
    sides = [partial(augment, images[view], batch.params[view], mean, std) for view in range(2)]
    first, second = np.median(alternate(sides, rounds, device), axis=0) / len(batch.indices) * 1e6
    return [f"{first + second:.0f}", f"{first:.0f}"]


if __name__ == "__main__":
    run(main)
