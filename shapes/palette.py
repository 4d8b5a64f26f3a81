"""Colours of harmonious hues, chosen by perceived lightness, as linear RGB.

Colours are drawn in OKLCH (lightness 0 to 1, chroma, hue in radians), in which equal steps look equal, and returned in
linear light, in which shadows multiply and edges blend as in a camera.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Colour = NDArray[np.float32]

# Hue offsets in degrees of the usual harmonies: analogous, complementary, split, triadic, tetradic.
HARMONIES = ((0, 28, 56, -28), (0, 18, 180, 200), (0, 150, 210, 20), (0, 120, 240, 12), (0, 60, 180, 240))

# OKLab to LMS' and LMS to linear sRGB: https://bottosson.github.io/posts/oklab/
_LAB_TO_LMS = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_LMS_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


@dataclass(frozen=True)
class Palette:
    """The colours of one image: four hues and a chroma."""

    hues: NDArray[np.float64]  # (4,), radians
    chroma: float  # OKLCH; 0 is grey, 0.2 is vivid

    def colour(self, lightness: float, liveliness: float, rng: Generator) -> Colour:
        """A colour (3,) in linear RGB, in [0, 1], of that lightness and of `liveliness` times the chroma."""
        hue = rng.choice(self.hues) + rng.normal(0, 0.12)
        chroma = liveliness * self.chroma * rng.uniform(0.55, 1.15)
        return oklch_to_linear(lightness, chroma, hue)


def random_palette(rng: Generator) -> Palette:
    """One of the harmonies, turned to a random hue."""
    offsets = np.deg2rad(HARMONIES[rng.integers(len(HARMONIES))])
    return Palette(hues=offsets + rng.uniform(0, 2 * np.pi), chroma=rng.uniform(0.07, 0.14))


def oklch_to_linear(lightness: float, chroma: float, hue: float) -> Colour:
    """A colour of OKLCH (hue in radians) as linear RGB (3,), clipped to the displayable range."""
    lab = np.array([lightness, chroma * np.cos(hue), chroma * np.sin(hue)])
    linear = _LMS_TO_RGB @ (_LAB_TO_LMS @ lab) ** 3
    return np.clip(linear, 0.0, 1.0).astype(np.float32)
