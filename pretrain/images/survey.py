"""What a set of images is like, measured on a sample: sizes, pixel statistics, colour; and how many are damaged."""

import math
import time
from dataclasses import dataclass

import numpy as np

from foundation.errors import UserError
from foundation.images import REDUCTIONS, UnreadableImage
from pretrain.images.sources import Source
from pretrain.images.stream import StreamedTars

SAMPLE = 96  # images that are decoded
CHECK_SECONDS = 10.0  # that looking for damaged images may take
NAMED = 5  # damaged images in an error
COLOURLESS = 2.0  # mean difference of the channels, of 255, below which images are grey


@dataclass(frozen=True)
class Survey:
    """Facts about a set of images.

    Args:
        count: all of them.
        short_side, long_side: medians over the sample, pixels.
        mean, std: (3,) RGB statistics of values in [0, 1], each image with the same weight.
        is_grey: whether the images have no colour.
        sampled: images of the sample that were read.
    """

    count: int
    short_side: int
    long_side: int
    mean: list[float]
    std: list[float]
    is_grey: bool
    sampled: int


def images_at_hand(source: Source) -> int:
    """The images, from the first on, that can be read at no great cost: of remote tars those of the first."""
    return source.shards[0] if isinstance(source, StreamedTars) else len(source)


def sample_indices(source: Source, count: int) -> list[int]:
    """At most `count` images, evenly spread over those of `images_at_hand`."""
    images = images_at_hand(source)
    return np.linspace(0, images - 1, min(count, images)).round().astype(int).tolist()


def survey(source: Source, sample: int = SAMPLE) -> Survey:
    """Decode `sample` images and measure them. They are those of `sample_indices`.

    Raises:
        UserError: none of them can be read.
    """
    sizes, moments, colour, damaged = [], [], [], []
    for index in sample_indices(source, sample):
        try:
            image = source.open(index).decode()
        except UnreadableImage as error:
            damaged.append(str(error))
            continue
        sizes.append(sorted(image.shape[:2]))
        values = image.reshape(-1, 3)[:: max(1, len(image) * image.shape[1] // 65536)].astype(np.float64)
        moments.append((values.mean(axis=0) / 255, (values**2).mean(axis=0) / 255**2))
        colour.append(np.ptp(values, axis=1).mean())
    if not sizes:
        raise UserError(f"none of {len(damaged)} images tried can be read, the first: {damaged[0]}")
    short_side, long_side = np.median(np.array(sizes), axis=0).astype(int).tolist()
    mean, square = np.mean(moments, axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return Survey(
        count=len(source),
        short_side=short_side,
        long_side=long_side,
        mean=[round(float(value), 3) for value in mean],
        std=[round(max(float(value), 0.02), 3) for value in std],
        is_grey=float(np.mean(colour)) < COLOURLESS,
        sampled=len(sizes),
    )


def fault_of(source: Source, index: int, reduction: int = 1) -> str:
    """Why an image cannot be read; empty if it can. See `OpenImage.decode` for the reduction."""
    try:
        source.open(index).decode(reduction)
    except UnreadableImage as error:
        return str(error)
    return ""


def check_readable(source: Source, allowed: float, seconds: float = CHECK_SECONDS) -> list[str]:
    """Look for damaged images, before a run spends time on anything else.

    The images are decoded in a random order until all are, or the time is over: a large set is judged by a part of it,
    and refused where that part has more damaged images than are allowed by three standard deviations. JPEGs are decoded
    at 1/8, which finds the same damage in a fraction of the time.

    Args:
        source: the images.
        allowed: fraction of damaged images that the run allows, DATA.MAX_UNREADABLE. Above 0, one image is allowed in
            any case.
        seconds: that this may take.

    Returns:
        a line for the plan; none where no damaged image is found.

    Raises:
        UserError: there are more damaged images than allowed.
    """
    end, tried = time.monotonic() + seconds, 0
    damaged: list[str] = []
    for index in np.random.default_rng(0).permutation(images_at_hand(source)):
        damaged += filter(None, [fault_of(source, int(index), REDUCTIONS[0])])
        tried += 1
        if time.monotonic() > end:
            break
    expected = allowed * tried
    whole = tried == len(source)
    found = f"{len(damaged)} of {tried:,} images" + ("" if whole else f" tried (of {len(source):,})")
    if len(damaged) > (max(1, expected if whole else expected + 3 * math.sqrt(expected)) if allowed else 0):
        raise UserError(
            f"{found} cannot be read, more than DATA.MAX_UNREADABLE ({allowed:g}) allows; replace or remove them "
            f"(--check-data lists all), or raise it: {'; '.join(sorted(damaged)[:NAMED])}"
            f"{'; ...' if len(damaged) > NAMED else ''}"
        )
    return [f"  {found} cannot be read and are replaced by others; --check-data lists all"] if damaged else []
