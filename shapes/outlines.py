"""Outlines, in which alone the classes differ.

An outline is a closed polygon, (K, 2) float64 in the order x, y, y pointing down as in images. Every outline
that this module returns has area 1 and its centroid at the origin, so that the size of an object does not depend on
its class.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Outline = NDArray[np.float64]
CURVE_POINTS = 48
# Radians to either side of upright, as objects in photographs mostly are upright. With free rotation a network of this
# size does not learn the classes within minutes.
MAX_TILT = 0.5
UP = -np.pi / 2


def class_outline(name: str, rng: Generator) -> Outline:
    """A random outline of a class, in random proportions and tilted to either side, (K, 2), area 1.

    Raises:
        KeyError: `name` is not in `CLASSES`.
    """
    points = _OUTLINES[name](rng)
    return _normalized(_rotation(rng.uniform(-MAX_TILT, MAX_TILT), _stretched(points, rng)))


def blob_outline(rng: Generator) -> Outline:
    """A pebble with irregular lobes that belongs to no class, (K, 2), area 1."""
    angle = _angles(CURVE_POINTS)
    radius = np.ones_like(angle)
    for lobes in (2, 3, 4):
        radius += rng.uniform(0.04, 0.17) * np.cos(lobes * angle + rng.uniform(0, 2 * np.pi))
    return _normalized(_polar(angle, radius))


def stick_outline(rng: Generator) -> Outline:
    """A long bent band with round ends that belongs to no class, (K, 2), area 1."""
    length, width, bend = rng.uniform(5, 11), rng.uniform(0.5, 1.0), rng.uniform(-0.25, 0.25)
    along = np.linspace(-1, 1, 12)
    spine = np.stack([along * length / 2, bend * length * (1 - along**2)], axis=1)
    taper = width / 2 * np.sqrt(1.02 - along**4)
    side = np.stack([np.zeros_like(taper), taper], axis=1)
    band = np.concatenate([spine + side, (spine - side)[::-1]])
    return _normalized(_rotation(rng.uniform(0, 2 * np.pi), band))


def area(points: Outline) -> float:
    """The area that a simple polygon (K, 2) encloses, in squared units of its coordinates."""
    return abs(signed_area(points))


def signed_area(points: Outline) -> float:
    """The area of a polygon (K, 2), above 0 if its points run clockwise in an image, whose y points down."""
    x, y = points[:, 0], points[:, 1]
    return 0.5 * float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def _ellipse(rng: Generator) -> Outline:
    return _polar(_angles(CURVE_POINTS), 1.0) * [rng.uniform(1.0, 1.5), 1.0]


def _triangle(rng: Generator) -> Outline:
    corners = UP + _angles(3) + rng.uniform(-0.2, 0.2, 3)
    return _rounded(_polar(corners, 1.0), rng)


def _rectangle(rng: Generator) -> Outline:
    half = rng.uniform(1.0, 1.7)
    return _rounded(np.array([[-half, -1], [half, -1], [half, 1], [-half, 1]]), rng)


def _star(rng: Generator) -> Outline:
    radius = np.where(np.arange(10) % 2, rng.uniform(0.4, 0.52), 1.0)
    return _rounded(_polar(UP + _angles(10), radius), rng)


def _cross(rng: Generator) -> Outline:
    a, b = rng.uniform(0.26, 0.38, 2)
    corner = np.array([[b, 1], [b, a], [1, a]])
    other = corner[::-1] * [1, -1]
    return _rounded(np.concatenate([corner, other, -corner, -other]), rng)


def _crescent(rng: Generator) -> Outline:
    inner, shift = rng.uniform(0.72, 0.9), rng.uniform(0.5, 0.62)
    # The two circles meet where both radii reach; the horns lie there.
    horn = (1 + shift**2 - inner**2) / (2 * shift)
    outer_stop, inner_stop = np.arccos(horn), np.arccos((horn - shift) / inner)
    outer = _polar(np.linspace(outer_stop, 2 * np.pi - outer_stop, 30), 1.0)
    back = _polar(np.linspace(2 * np.pi - inner_stop, inner_stop, 24), inner) + np.array([shift, 0])
    return np.concatenate([outer, back[1:-1]])


def _heart(rng: Generator) -> Outline:
    t = _angles(CURVE_POINTS)
    notch = rng.uniform(0.8, 1.15)
    y = 13 * np.cos(t) - 5 * notch * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y * rng.uniform(0.95, 1.15)], axis=1)


def _arrow(rng: Generator) -> Outline:
    shaft, neck, barb = rng.uniform(0.2, 0.3), rng.uniform(-0.1, 0.2), rng.uniform(0.68, 0.85)
    upper = np.array([[-1, -shaft], [neck, -shaft], [neck, -barb]])
    return _rounded(np.concatenate([upper, [[1.0, 0.0]], upper[::-1] * [1, -1]]), rng)


_OUTLINES: dict[str, Callable[[Generator], Outline]] = {
    "ellipse": _ellipse,
    "triangle": _triangle,
    "rectangle": _rectangle,
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
    "arrow": _arrow,
}
CLASSES: tuple[str, ...] = tuple(_OUTLINES)


def _angles(count: int) -> NDArray[np.float64]:
    return np.linspace(0, 2 * np.pi, count, endpoint=False)


def _polar(angle: NDArray[np.float64], radius: float | NDArray[np.float64]) -> Outline:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _rounded(corners: Outline, rng: Generator) -> Outline:
    """Each corner replaced by a quadratic curve that begins and ends on its two edges."""
    cut = rng.uniform(0.04, 0.16)
    start = corners + cut * (np.roll(corners, 1, axis=0) - corners)
    stop = corners + cut * (np.roll(corners, -1, axis=0) - corners)
    t = np.linspace(0, 1, 6)[:, None]
    curve = (1 - t) ** 2 * start[:, None] + 2 * t * (1 - t) * corners[:, None] + t**2 * stop[:, None]
    return curve.reshape(-1, 2)


def _stretched(points: Outline, rng: Generator) -> Outline:
    """A mild stretch and shear, which stands in for a change of viewpoint."""
    stretch, shear = np.exp(rng.uniform(-0.14, 0.14)), rng.uniform(-0.14, 0.14)
    return points @ np.array([[stretch, shear], [0.0, 1 / stretch]])


def _rotation(angle: float, points: Outline) -> Outline:
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


def _normalized(points: Outline) -> Outline:
    x, y = points[:, 0], points[:, 1]
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    cross = x * next_y - next_x * y  # twice the signed area of each triangle with the origin
    total = cross.sum()
    centroid = np.array([np.dot(x + next_x, cross), np.dot(y + next_y, cross)]) / (3 * total)
    return (points - centroid) / np.sqrt(abs(total) / 2)
