"""The random numbers of views: which part of an image, and which photometric operations.

They are a function of (seed, epoch, index, view) alone, and not of the worker, the batch or what ran before. So a run
can resume in the middle of an epoch, and the number of workers or processes may change.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

JITTER_ORDERS = 24  # permutations of brightness, contrast, saturation, hue
WORDS = 24  # of 64 bits: enough for nearly every view


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


class Stream:
    """The random numbers of one view, equal to those of `numpy.random.Generator(numpy.random.Philox(key, counter))`.

    NumPy takes 8 us to make such a generator and 1 us for each number that it gives one by one. Here the generator is
    placed at the stream, and gives its first words at once.

    Args:
        key: of the counter-based generator.
        counter: its four words, below 2^64.
    """

    def __init__(self, key: int, counter: Sequence[int]) -> None:
        self._origin = key, counter
        self._words = _philox.words(key, counter, WORDS)
        self._place = 0
        self._half: int | None = None  # 32 bits of a word whose others are used

    def random(self) -> float:
        """Uniform in [0, 1)."""
        place = self._place
        if place == len(self._words):
            return (self._word() >> 11) * 2.0**-53
        self._place = place + 1
        return (self._words[place] >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * self.random()

    def integers(self, count: int) -> int:
        """Uniform among 0 to count - 1, which is below 2^32, by Lemire's method."""
        if count == 1:
            return 0
        product = self._half_word() * count
        if product % 2**32 < count:
            least = (2**32 - count) % count
            while product % 2**32 < least:
                product = self._half_word() * count
        return product >> 32

    def _word(self) -> int:
        if self._place == len(self._words):
            self._words = _philox.words(*self._origin, 2 * len(self._words))
        self._place += 1
        return self._words[self._place - 1]

    def _half_word(self) -> int:
        if self._half is not None:
            half, self._half = self._half, None
            return half
        word = self._word()
        self._half = word >> 32
        return word % 2**32


class _Philox(threading.local):
    """NumPy's counter-based generator, placed anywhere. One for each thread."""

    def __init__(self) -> None:
        self._generator = np.random.Philox(key=0)
        self._key, self._counter = np.zeros(2, np.uint64), np.zeros(4, np.uint64)
        self._state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": self._counter, "key": self._key},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,  # of four: all are used
            "has_uint32": 0,
            "uinteger": 0,
        }

    def words(self, key: int, counter: Sequence[int], count: int) -> list[int]:
        """The first words of a stream, 64 bits each."""
        self._key[0] = key
        self._counter[:] = counter
        self._generator.state = self._state
        return self._generator.random_raw(count).tolist()


_philox = _Philox()


def random_stream(seed: int, epoch: int, index: int, view: int) -> Stream:
    """The random numbers of one view of one image in one epoch."""
    return Stream(seed, (0, view, index, epoch))


def draw_crop(augmentation: Augmentation, rng: Stream, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, distributed as torchvision's RandomResizedCrop."""
    flattest, tallest = math.log(augmentation.crop_ratio[0]), math.log(augmentation.crop_ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*augmentation.crop_scale)
        ratio = math.exp(rng.uniform(flattest, tallest))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(height - h + 1), rng.integers(width - w + 1), h, w
    # So elongated an image holds no crop of an allowed shape: take the largest central one.
    ratio = min(max(width / height, augmentation.crop_ratio[0]), augmentation.crop_ratio[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    w, h = max(w, 1), max(h, 1)
    return (height - h) // 2, (width - w) // 2, h, w


def draw_photometric(augmentation: Augmentation, rng: Stream) -> list[float]:
    """Parameters of the operations that follow the crop, in the columns of `Param`."""
    flip, jitter, gray, blur, solarize = rng.random(), rng.random(), rng.random(), rng.random(), rng.random()
    order = rng.integers(JITTER_ORDERS) if jitter < augmentation.jitter else -1
    factors = [
        rng.uniform(max(0.0, 1 - offset), 1 + offset)
        for offset in (augmentation.brightness, augmentation.contrast, augmentation.saturation)
    ]
    turns = rng.uniform(-augmentation.hue, augmentation.hue)
    sigma = rng.uniform(*augmentation.blur_sigma) if blur < augmentation.blur else 0
    return [
        flip < augmentation.flip,
        order,
        *factors,
        turns,
        gray < augmentation.gray,
        sigma,
        solarize < augmentation.solarize,
    ]
