"""From a mask to COCO polygons, and back to boxes.

Coordinates are COCO's: pixel (row i, column j) covers x in [j, j + 1] and y in [i, i + 1].
"""

import contourpy
import numpy as np
from numpy.typing import NDArray

from shapes.outlines import Outline, signed_area

MAX_POINTS = 40
SMALLEST_PART = 6.0  # square pixels; smaller parts, which occlusion leaves, are not annotated


def trace(coverage: NDArray[np.float32]) -> list[Outline]:
    """The polygons around a mask's parts.

    Args:
        coverage: (H, W), the share of each pixel that is covered; the outline is where it passes one half.

    Returns:
        One (K, 2) array per part, K <= 40, x and y in pixels; parts under 6 square pixels are left out. A
        part with a hole comes as two polygons that share the cut through the hole, since COCO's have none.
    """
    padded = np.pad(coverage, 1)
    lines = contourpy.contour_generator(z=padded).lines(0.5)
    loops = [np.asarray(line, dtype=np.float64)[:-1] - 0.5 for line in lines]
    # contourpy keeps the higher values on one side of a line, so a hole has the opposite orientation of a part.
    holes = [loop for loop in loops if signed_area(loop) <= -SMALLEST_PART]
    if holes:
        cut = int(np.clip(round(holes[0][:, 0].mean()), 1, coverage.shape[1] - 1))
        left, right = coverage.copy(), coverage.copy()
        left[:, cut:], right[:, :cut] = 0, 0
        return trace(left) + trace(right)
    parts = [loop for loop in loops if signed_area(loop) >= SMALLEST_PART]
    return [_simplified(part, coverage.shape[1], coverage.shape[0]) for part in parts]


def bounding_box(parts: list[Outline]) -> list[float]:
    """The box around all parts as COCO writes it: x, y, width, height in pixels."""
    points = np.concatenate(parts)
    low, high = points.min(axis=0), points.max(axis=0)
    return [float(low[0]), float(low[1]), float(high[0] - low[0]), float(high[1] - low[1])]


def _simplified(points: Outline, width: int, height: int) -> Outline:
    """At most `MAX_POINTS` points inside the image, rounded as they are written."""
    tolerance = 0.3
    start = int(np.argmax(np.hypot(*(points - points.mean(axis=0)).T)))  # an extreme point is a true corner
    ring = np.roll(points, -start, axis=0)
    half = int(np.argmax(np.hypot(*(ring - ring[0]).T)))
    while True:
        there = _douglas_peucker(ring[: half + 1], tolerance)
        back = _douglas_peucker(np.concatenate([ring[half:], ring[:1]]), tolerance)
        kept = np.concatenate([there[:-1], back[:-1]])
        if len(kept) <= MAX_POINTS:
            return np.round(np.clip(kept, 0, [width, height]), 2)
        tolerance *= 1.4


def _douglas_peucker(points: Outline, tolerance: float) -> Outline:
    """The points of an open line that stay when none may move by more than `tolerance` pixels."""
    keep = np.zeros(len(points), dtype=bool)
    keep[[0, -1]] = True
    spans = [(0, len(points) - 1)]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        chord = points[last] - points[first]
        offset = points[first + 1 : last] - points[first]
        length = max(float(np.hypot(*chord)), 1e-9)
        distance = np.abs(offset[:, 0] * chord[1] - offset[:, 1] * chord[0]) / length
        far = int(np.argmax(distance))
        if distance[far] > tolerance:
            middle = first + 1 + far
            keep[middle] = True
            spans += [(first, middle), (middle, last)]
    return points[keep]
