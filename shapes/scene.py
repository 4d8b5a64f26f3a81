"""One picture: a textured ground, clutter, and objects that cast shadows and cover one another.

H, W: height and width in pixels. Everything is computed in linear light, (H, W, 3) float32.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from shapes.lighting import Light, covered, lay, random_light
from shapes.outlines import CLASSES, Outline, blob_outline, class_outline, stick_outline
from shapes.palette import Palette, random_palette
from shapes.textures import Field, Pixels, noise, pixel_grid, textured

MIN_VISIBLE = 0.4  # the fraction of each object that must be visible, else the new object is not placed
MIN_CONTRAST = 0.3  # of lightness, between ground and object, so that the shape is visible in grey too
# Factors of the chroma: less colourful grounds and more colourful objects, as in most photographs, for every class.
GROUND_LIVELINESS, OBJECT_LIVELINESS = 0.4, 1.2
ATTEMPTS = 12


@dataclass(frozen=True)
class Placed:
    """An object in a picture. `coverage` (H, W) is the visible share of each pixel."""

    name: str
    coverage: Field
    full_area: float  # square pixels, hidden parts and those outside the picture included


@dataclass(frozen=True)
class Scene:
    """A finished picture, (H, W, 3) uint8 sRGB, and its objects from back to front."""

    image: NDArray[np.uint8]
    objects: list[Placed]


def compose(rng: Generator, size: tuple[int, int], names: list[str], scale: tuple[float, float], clutter: int) -> Scene:
    """Draw a picture with one object of each of the named classes, as far as there is room.

    Args:
        rng: the only source of randomness.
        size: width and height in pixels.
        names: classes from back to front; the first is always placed, another only where enough of itself
            and of those behind stays visible.
        scale: the range of an object's size, as square root of its area over the picture's shorter side.
        clutter: the greatest number of blobs and sticks on the ground.
    """
    palette, light = random_palette(rng), random_light(rng)
    ground_lightness = rng.uniform(0.35, 0.88)
    canvas = _ground(rng, size, palette, ground_lightness)
    for _ in range(rng.integers(clutter // 3, clutter + 1)):
        _add_clutter(canvas, rng, palette, light, ground_lightness)
    objects: list[Placed] = []
    for name in names:
        place = _find_place(rng, size, name, scale, objects)
        if place is not None:
            points, objects = place
            colours = _object_colours(rng, palette, ground_lightness)
            lay(canvas, points, rng, colours, light, elevation=rng.uniform(0.03, 0.08))
    return Scene(_developed(canvas, rng, light), objects)


def random_names(rng: Generator, count: int) -> list[str]:
    """`count` classes, each drawn evenly and independently."""
    return [CLASSES[i] for i in rng.integers(len(CLASSES), size=count)]


def _ground(rng: Generator, size: tuple[int, int], palette: Palette, lightness: float) -> Pixels:
    """One texture, or two that meet along a wandering border."""
    canvas = textured(rng, size, _surface_colours(rng, palette, lightness, GROUND_LIVELINESS))
    if rng.random() < 0.25:
        x, y = pixel_grid(size)
        angle = rng.uniform(0, 2 * np.pi)
        border = np.cos(angle) * x + np.sin(angle) * y + rng.normal(0, 0.15) * size[0]
        weight = np.clip(border + 4 * noise(rng, size, 24), 0, 1).astype(np.float32)[..., None]
        colours = _surface_colours(rng, palette, lightness + rng.uniform(-0.06, 0.06), GROUND_LIVELINESS)
        other = textured(rng, size, colours)
        canvas += weight * (other - canvas)
    return canvas


def _surface_colours(rng: Generator, palette: Palette, lightness: float, liveliness: float) -> NDArray[np.float32]:
    """The two colours of a surface (2, 3), on either side of a lightness."""
    spread = rng.uniform(0.01, 0.06) * rng.choice([-1, 1])
    lightnesses = np.clip([lightness + spread, lightness - spread], 0.2, 0.95)
    return np.stack([palette.colour(float(one), liveliness, rng) for one in lightnesses])


def _object_colours(rng: Generator, palette: Palette, ground_lightness: float) -> NDArray[np.float32]:
    """Colours (2, 3) that are darker or lighter than the ground."""
    room = [(0.25, ground_lightness - MIN_CONTRAST), (ground_lightness + MIN_CONTRAST, 0.93)]
    widths = np.array([max(high - low, 0.0) for low, high in room])
    low, high = room[rng.choice(2, p=widths / widths.sum())]
    return _surface_colours(rng, palette, rng.uniform(low, high), OBJECT_LIVELINESS)


def _add_clutter(canvas: Pixels, rng: Generator, palette: Palette, light: Light, ground_lightness: float) -> None:
    height, width = canvas.shape[:2]
    outline = blob_outline(rng) if rng.random() < 0.5 else stick_outline(rng)
    side = rng.uniform(0.05, 0.16) * min(width, height)
    points = outline * side + rng.uniform(0, 1, 2) * [width, height]
    lightness = ground_lightness + rng.uniform(-0.12, 0.12)
    colours = _surface_colours(rng, palette, lightness, OBJECT_LIVELINESS)
    lay(canvas, points, rng, colours, light, elevation=rng.uniform(0.01, 0.03))


def _find_place(
    rng: Generator, size: tuple[int, int], name: str, scale: tuple[float, float], others: list[Placed]
) -> tuple[Outline, list[Placed]] | None:
    """A place where enough of the object and of the others is seen, or None after some attempts.

    Returns:
        The object's outline in pixels, and all objects as they look once it is there.
    """
    outline = class_outline(name, rng)
    reach = np.abs(outline).max(axis=0)
    for _ in range(ATTEMPTS):
        side = rng.uniform(*scale) * min(size)
        # Mostly inside: up to a tenth of the object's side may be cut off by the border.
        margin = np.minimum((reach - 0.1) * side, np.array(size) / 2)
        points = outline * side + rng.uniform(margin, np.array(size) - margin)
        coverage = covered(points, (0, 0, *size))
        after = [Placed(one.name, one.coverage * (1 - coverage), one.full_area) for one in others]
        after.append(Placed(name, coverage, full_area=side**2))
        if all(float(one.coverage.sum()) >= MIN_VISIBLE * one.full_area for one in after):
            return points, after
    return None


def _developed(canvas: Pixels, rng: Generator, light: Light) -> NDArray[np.uint8]:
    """Simulate a camera: uneven light, exposure, contrast, colour cast and grain."""
    height, width = canvas.shape[:2]
    x, y = pixel_grid((width, height))
    ramp = (light.direction[0] * x + light.direction[1] * y) / max(width, height)
    corner = 2 * (x**2 + y**2) / (width**2 + height**2)
    falloff = 1 + rng.uniform(0.1, 0.6) * ramp - rng.uniform(0.1, 0.5) * corner
    cast = np.exp(rng.normal(0, 0.05, 3) + rng.normal(0, 0.15)).astype(np.float32)
    linear = np.clip(canvas * falloff.astype(np.float32)[..., None] * cast, 0, 1)
    display = linear ** np.float32(1 / 2.2)
    contrast = rng.uniform(0.85, 1.1)
    display = 0.5 + contrast * (display - 0.5) + rng.normal(0, 0.03)
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(0.0, 0.012)
    return (np.clip(display + grain, 0, 1) * 255 + 0.5).astype(np.uint8)
