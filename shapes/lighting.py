"""Draw a solid on a picture: what it covers, its shadow, and the shading of its rims.

A window is a rectangle of pixels as left, top, right, bottom. Each solid is drawn only in the window that it needs,
which saves most of the time in pictures with many solids.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from shapes.outlines import Outline
from shapes.textures import Field, Pixels, textured

Window = tuple[int, int, int, int]
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Light:
    """The direction and the strength of the light."""

    direction: NDArray[np.float64]  # (2,) unit vector in the image plane, towards the light
    shadow_length: float  # per unit of elevation
    shadow: float  # share of the light that a shadow takes
    relief: float  # how strongly rims are lit and shaded


def random_light(rng: Generator) -> Light:
    """A light of random direction and strength."""
    angle = rng.uniform(0, 2 * np.pi)
    return Light(
        direction=np.array([np.cos(angle), np.sin(angle)]),
        shadow_length=rng.uniform(0.4, 1.2),
        shadow=rng.uniform(0.25, 0.65),
        relief=rng.uniform(0.1, 0.55),
    )


def lay(
    canvas: Pixels,
    points: Outline,
    rng: Generator,
    colours: NDArray[np.float32],
    light: Light,
    elevation: float,
) -> None:
    """Draw a textured solid on the canvas, in place: first its shadow, then the solid.

    Args:
        canvas: (H, W, 3) linear light.
        points: (K, 2) the solid's outline in pixels.
        rng: the source of its texture.
        colours: (2, 3) linear RGB of its texture.
        light: of the picture.
        elevation: its height over what is below, as a share of the canvas's shorter side.
    """
    height, width = canvas.shape[:2]
    side = min(width, height)
    drop = np.round(-light.direction * elevation * side * light.shadow_length).astype(int)
    softness = 0.6 + 0.5 * elevation * side
    window = _around(points, margin=int(np.abs(drop).max() + 2.5 * softness + 2), size=(width, height))
    left, top, right, bottom = window
    if right <= left or bottom <= top:
        return
    coverage = covered(points, window)
    below = canvas[top:bottom, left:right]
    # The shadow is drawn from the outline. Moving the coverage would not do, because the border may cut it.
    below *= (1 - light.shadow * _blurred(covered(points + drop, window), softness))[..., None]
    surface = textured(rng, (right - left, bottom - top), colours)
    _shade(surface, coverage, light, radius=0.025 * side + 0.8)
    surface -= below
    surface *= coverage[..., None]
    below += surface


def covered(points: Outline, window: Window) -> Field:
    """How much of each pixel of a window a polygon (K, 2) covers, (H, W) in [0, 1]."""
    left, top, right, bottom = window
    large = Image.new("L", ((right - left) * SUPERSAMPLING, (bottom - top) * SUPERSAMPLING))
    # Pillow puts pixel centres on whole coordinates.
    corners = (points - [left, top]) * SUPERSAMPLING - 0.5
    ImageDraw.Draw(large).polygon(corners.ravel().tolist(), fill=255)
    return np.asarray(large.reduce(SUPERSAMPLING), dtype=np.float32) * np.float32(1 / 255)


def _around(points: Outline, margin: int, size: tuple[int, int]) -> Window:
    low = np.maximum(np.floor(points.min(axis=0)).astype(int) - margin, 0)
    high = np.minimum(np.ceil(points.max(axis=0)).astype(int) + margin, size)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _blurred(field: Field, radius: float) -> Field:
    """A Gaussian blur of values in [0, 1]; `radius` is the standard deviation in pixels."""
    image = Image.fromarray((field * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) * np.float32(1 / 255)


def _shade(surface: Pixels, coverage: Field, light: Light, radius: float) -> None:
    """Light the rim that faces the light and darken the other, as if the solid rose over `radius` pixels."""
    dome = _blurred(coverage, radius)
    towards_x, towards_y = light.direction.astype(np.float32)
    rise = np.zeros_like(dome)
    rise[:, 1:-1] -= towards_x * (dome[:, 2:] - dome[:, :-2])
    rise[1:-1] -= towards_y * (dome[2:] - dome[:-2])
    lit = np.clip(rise * np.float32(2 * radius), -1, 1)
    surface *= (1 + np.float32(light.relief) * lit)[..., None]
    surface += (np.float32(0.35 * light.relief) * np.clip(lit, 0, 1) ** 2)[..., None]
