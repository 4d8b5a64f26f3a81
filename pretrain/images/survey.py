"""Properties of a set of images, measured on a sample: number, sizes, pixel statistics, whether there is colour."""

from dataclasses import dataclass

import numpy as np

from foundation.errors import UserError
from foundation.images import UnreadableImage
from pretrain.images.sources import Source
from pretrain.images.stream import StreamedTars

SAMPLE = 96  # images that are decoded
COLOURLESS = 2.0  # mean difference of the channels, of 255, below which images are grey


@dataclass(frozen=True)
class Survey:
    """Facts about a set of images.

    Args:
        count: all of them.
        short_side, long_side: medians over the sample, pixels.
        mean, std: (3,) RGB statistics of values in [0, 1], each image with the same weight.
        is_grey: whether the images have no colour.
        damaged: images of the sample that cannot be read.
        sampled: images of the sample that were read.
    """

    count: int
    short_side: int
    long_side: int
    mean: list[float]
    std: list[float]
    is_grey: bool
    damaged: int
    sampled: int


def sample_indices(source: Source, count: int) -> list[int]:
    """At most `count` images, evenly spread over the source; of remote tars over the first, as each must be fetched."""
    images = source.shards[0] if isinstance(source, StreamedTars) else len(source)
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
        damaged=len(damaged),
        sampled=len(sizes),
    )
