"""Textures: patterns between two colours, at random frequency, orientation and phase.

H, W: height and width in pixels. Patterns are drawn at pixel resolution, and their edges antialiased by the
distance to the edge in pixels, which is exact for straight edges and needs no supersampling.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

Field = NDArray[np.float32]  # (H, W)
Pixels = NDArray[np.float32]  # (H, W, 3), linear light


def textured(rng: Generator, size: tuple[int, int], colours: NDArray[np.float32]) -> Pixels:
    """A surface of a random texture.

    Args:
        rng: the source of kind, period, orientation and phase.
        size: width and height in pixels.
        colours: (2, 3) linear RGB, the ground and the figure of the pattern.

    Returns:
        (H, W, 3) linear light.
    """
    kind = _KINDS[rng.integers(len(_KINDS))]
    figure = kind(rng, size)[..., None]
    surface = colours[0] + figure * (colours[1] - colours[0])
    # Smooth variations of brightness, as of paint or cloth; without them plain surfaces look like clip art.
    uneven = 1 + rng.uniform(0.02, 0.1) * noise(rng, size, rng.uniform(10, 30))
    return surface * uneven[..., None]


def noise(rng: Generator, size: tuple[int, int], cell: float) -> Field:
    """Smooth noise (H, W) of about unit variance, `cell` pixels from one random value to the next."""
    width, height = size
    grid = rng.standard_normal((int(height / cell) + 4, int(width / cell) + 4), dtype=np.float32)
    box = (1.5, 1.5, 1.5 + width / cell, 1.5 + height / cell)
    resized = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized, dtype=np.float32) * np.float32(1.3)


@lru_cache(maxsize=64)
def pixel_grid(size: tuple[int, int]) -> tuple[Field, Field]:
    """The x (1, W) and y (H, 1) of pixel centres, relative to the middle of the image, in pixels."""
    width, height = size
    x = np.arange(width, dtype=np.float32) + 0.5 - width / 2
    y = np.arange(height, dtype=np.float32) + 0.5 - height / 2
    return x[None, :], y[:, None]


def _turned(rng: Generator, size: tuple[int, int]) -> tuple[Field, Field]:
    """Two orthogonal coordinates (H, W) in pixels at a random rotation and offset."""
    x, y = pixel_grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    shift = rng.uniform(0, 100, 2).astype(np.float32)
    return c * x + s * y + shift[0], c * y - s * x + shift[1]


def _period(rng: Generator) -> float:
    """The length of one repetition in pixels, uniform in its logarithm."""
    return float(np.exp(rng.uniform(np.log(5), np.log(22))))


def _bands(u: Field, period: float, duty: float) -> Field:
    """1 in bands across `u` that take the share `duty` of each period, 0 elsewhere, antialiased."""
    from_middle = np.abs(u / period - np.floor(u / period) - 0.5)
    return np.clip((duty / 2 - from_middle) * period + 0.5, 0, 1)


def _plain(rng: Generator, size: tuple[int, int]) -> Field:
    return np.full(size[::-1], rng.uniform(0, 1), dtype=np.float32)


def _gradient(rng: Generator, size: tuple[int, int]) -> Field:
    u, _ = _turned(rng, size)
    u -= u.min()
    return u / u.max()


def _stripes(rng: Generator, size: tuple[int, int]) -> Field:
    u, _ = _turned(rng, size)
    return _bands(u, _period(rng), rng.uniform(0.3, 0.7))


def _waves(rng: Generator, size: tuple[int, int]) -> Field:
    u, _ = _turned(rng, size)
    period = _period(rng)
    u += period * rng.uniform(0.3, 0.9) * noise(rng, size, 1.6 * period)
    return _bands(u, period, rng.uniform(0.3, 0.7))


def _checks(rng: Generator, size: tuple[int, int]) -> Field:
    u, v = _turned(rng, size)
    period = 1.3 * _period(rng)
    a, b = _bands(u, period, 0.5), _bands(v, period, 0.5)
    return a + b - 2 * a * b


def _plaid(rng: Generator, size: tuple[int, int]) -> Field:
    u, v = _turned(rng, size)
    period = _period(rng)
    a, b = _bands(u, period, rng.uniform(0.3, 0.6)), _bands(v, period, rng.uniform(0.3, 0.6))
    return (a + b) * np.float32(0.5)


def _dots(rng: Generator, size: tuple[int, int]) -> Field:
    u, v = _turned(rng, size)
    period = 1.2 * _period(rng)
    row = np.floor(v / period)
    across = u / period + 0.5 * (row % 2)  # every other row is shifted by half a period
    distance = np.hypot(across - np.floor(across) - 0.5, v / period - row - 0.5)
    return np.clip((rng.uniform(0.24, 0.38) - distance) * period + 0.5, 0, 1)


def _clouds(rng: Generator, size: tuple[int, int]) -> Field:
    coarse = rng.uniform(8, 20)
    return np.clip(0.5 + 0.35 * noise(rng, size, coarse) + 0.2 * noise(rng, size, coarse / 3), 0, 1)


def _camouflage(rng: Generator, size: tuple[int, int]) -> Field:
    return np.clip(0.5 + rng.uniform(2, 4) * noise(rng, size, rng.uniform(4, 14)), 0, 1)


_KINDS: tuple[Callable[[Generator, tuple[int, int]], Field], ...] = (
    _plain,
    _gradient,
    _stripes,
    _waves,
    _checks,
    _plaid,
    _dots,
    _clouds,
    _camouflage,
)
