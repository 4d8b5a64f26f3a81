"""Listing the images of a large folder, beside torchvision's ImageFolder: time, memory, and memory of loader workers.

    python benchmarks/listing.py [--folder FOLDER] [--workers 8]

Without FOLDER (with class folders, such as ImageNet's train/) it makes one of as many files as ImageNet has, as hard
links to 100 files, in the folder for temporary files.

Each side runs in processes of its own. Time is processor time, because the rest depends on the disk's cache. Memory is
that of the list, without the imports. For a worker it is the part of its parent's memory that it copies (private, dirty
pages) while it reads the path of every image once, as in an epoch.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from timing import build_parser, print_table, start
from torchvision.datasets.folder import find_classes, make_dataset

from foundation.errors import UserError, run
from foundation.images import EXTENSIONS
from pretrain.images.files import find_images

CLASSES, IMAGES = 1000, 1281  # in each: ImageNet's 1.28 million
LINKED = 100  # files; a file system limits the number of links to one
fork = multiprocessing.get_context("fork")


def ours(folder: Path) -> tuple[Any, Callable[[int], object]]:
    """The list, and how a path is taken from it."""
    paths = find_images(folder)
    return (paths, paths.top_folders()), lambda index: paths[index]


def torchvisions(folder: Path) -> tuple[Any, Callable[[int], object]]:
    """The same of what ImageFolder builds."""
    _, numbers = find_classes(folder)
    samples = make_dataset(str(folder), numbers, EXTENSIONS)
    return samples, lambda index: samples[index][0]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = build_parser("Listing a large folder beside ImageFolder.", threads=1, rounds=3, gpu=False)
    parser.add_argument("--folder", type=Path, help="with class folders; without it one is made")
    parser.add_argument("--workers", type=int, default=8, help="processes that read the list (default: 8)")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; it must be 1 or greater")
    start(args)
    classes, images, rounds = (20, 30, 1) if args.quick else (CLASSES, IMAGES, args.rounds)
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or make_folder(Path(made), classes, images)
        count = len(find_images(folder))
        header = ["side", "files", "processor time", "memory", f"of each of {args.workers} workers"]
        print_table(header, measure_sides(folder, count, args.workers, rounds))


def measure_sides(folder: Path, count: int, workers: int, rounds: int) -> Iterator[list[str]]:
    """A row for each side: medians over the rounds."""
    for name, side in (("ours", ours), ("ImageFolder", torchvisions)):
        found = np.array([in_process(measure, side, folder, count, workers) for _ in range(rounds)])
        seconds, size, growth = np.median(found, axis=0)
        yield [name, f"{count:,}", f"{seconds:.2f} s", f"{size / 1e6:.0f} MB", f"{growth / 1e6:.0f} MB"]


def make_folder(root: Path, classes: int, images: int) -> Path:
    """Class folders of links to a few files."""
    sources = [root / f"{number}.jpg" for number in range(LINKED)]
    for source in sources:
        source.write_bytes(b"x")
    for label in range(classes):
        folder = root / "train" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for image in range(images):
            os.link(sources[(label + image) % LINKED], folder / f"n{label:08d}_{image * 7919 % 30011}.JPEG")
    return root / "train"


def measure(side: Callable, folder: Path, count: int, workers: int) -> tuple[float, float, float]:
    """(seconds, bytes of the list, bytes that a worker copies), in a process of its own."""
    before, started = private_dirty(), time.process_time()
    held, take = side(folder)
    seconds, size = time.process_time() - started, private_dirty() - before
    growth = [in_process(copied, take, count) for _ in range(workers)]
    del held
    return seconds, size, float(np.median(growth))


def copied(take: Callable[[int], object], count: int) -> float:
    """What a worker copies while it takes every path once, in a random order."""
    order = np.random.default_rng(0).permutation(count)
    before = private_dirty()
    for index in order:
        take(index)
    return private_dirty() - before


def private_dirty() -> float:
    """Bytes of this process's own, changed memory."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def in_process(work: Callable, *args: Any) -> Any:
    """The result of a function in a forked process. Raises RuntimeError if it fails."""
    receiving, sending = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: sending.send(work(*args)))
    process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        raise RuntimeError("a process that measures has failed; its traceback is above") from None
    finally:
        process.join()


if __name__ == "__main__":
    run(main)
