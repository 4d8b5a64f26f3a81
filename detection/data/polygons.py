"""Polygons of the objects of an image, from which the targets of the mask head are rasterised for all regions at once.

Detectron2's `PolygonMasks` copies the polygons of every sampled region, and rasterises one region after the other with
pycocotools. Here regions refer to the image's polygons by number, and the arithmetic of pycocotools' `rleFrPoly`
(cocodataset/cocoapi, common/maskApi.c) is applied to arrays, so that the targets are equal bit for bit.

`rleFrPoly` draws the outline on a grid that is 5 times as fine, and notes where it passes from one column of pixels to
the next: there the pixels below change from outside to inside or back. So a pixel is inside if the number of these
crossings before it, column by column, is odd.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from detectron2.structures import PolygonMasks
from numpy.typing import NDArray

FINER = 5  # grid points in a pixel's side
BETWEEN = 3  # column c ends before the grid point FINER * c + BETWEEN
LEAST_SIDE = 0.1  # pixels; Detectron2 scales as if a smaller box had this side
SCALE = (1 / np.float32(1)).dtype  # of Detectron2's scales, which it computes from scalars: float64 before NumPy 2

Numbers = NDArray[np.int64]


class RegionPolygons(PolygonMasks):
    """As Detectron2's `PolygonMasks`, with faster indexing and `crop_and_resize`.

    Args:
        polygons: for each object its polygons, each an array x0, y0, x1, y1, ..
    """

    def __init__(self, polygons: list[list[Any]]) -> None:
        self._packed = _Packed(PolygonMasks(polygons).polygons)
        self._chosen = torch.arange(len(polygons))

    @property
    def polygons(self) -> list[list[NDArray[np.float64]]]:
        """For each object its polygons."""
        return [self._packed.of(number) for number in self._chosen.tolist()]

    def __getitem__(self, item: int | slice | list[int] | torch.Tensor) -> "RegionPolygons":
        """The objects that `item` selects. A tensor on a GPU stays there, so that the host does not wait for it."""
        selected = object.__new__(RegionPolygons)
        selected._packed = self._packed
        if isinstance(item, int):
            item = [item]
        selected._chosen = (self._chosen.to(item.device) if isinstance(item, torch.Tensor) else self._chosen)[item]
        return selected

    def __iter__(self) -> Iterator[list[NDArray[np.float64]]]:
        """The polygons of one object after the other."""
        return iter(self.polygons)

    def __len__(self) -> int:
        """Number of objects."""
        return len(self._chosen)

    def __repr__(self) -> str:
        """The class and the number of objects."""
        return f"{type(self).__name__}(num_instances={len(self)})"

    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        """The part of each object that is in its box, scaled to a square.

        Args:
            boxes: (N, 4) float32 corners, one box for each object, on any device.
            mask_size: side of the square.

        Returns:
            (N, mask_size, mask_size) bool, on the device of the boxes.
        """
        if len(boxes) != len(self):
            raise ValueError(f"{len(boxes)} boxes for {len(self)} objects")
        masks = self._packed.rasterise(boxes.cpu().numpy(), self._chosen.cpu().numpy(), mask_size)
        return torch.from_numpy(masks).to(boxes.device)


class _Packed:
    """The corners of all polygons of an image, one after the other.

    Attributes:
        corners: (corners, 2) float64.
        following: for each corner, the number of the next one of its polygon.
        polygon: for each corner, the number of its polygon.
        starts: for each object, the number of its first corner, then the number of corners.
        polygon_starts: for each object, the number of its first polygon, then the number of polygons.
        polygon_ends: for each polygon, one more than the number of its last corner.
    """

    def __init__(self, objects: list[list[NDArray[np.float64]]]) -> None:
        polygons = [each.reshape(-1, 2) for polygons in objects for each in polygons]
        lengths = np.array([len(each) for each in polygons], np.int64)
        self.corners = np.concatenate(polygons) if polygons else np.zeros((0, 2))
        self.polygon_ends = np.cumsum(lengths)
        self.polygon_starts = np.cumsum([0, *map(len, objects)])
        self.starts = np.concatenate([[0], self.polygon_ends])[self.polygon_starts]
        self.polygon = np.repeat(np.arange(len(polygons)), lengths)
        self.following = np.arange(1, len(self.corners) + 1)
        self.following[self.polygon_ends - 1] = self.polygon_ends - lengths

    def of(self, number: int) -> list[NDArray[np.float64]]:
        """The polygons of an object."""
        first, last = self.polygon_starts[number : number + 2]
        edges = [self.starts[number], *self.polygon_ends[first:last]]
        return [self.corners[start:end].reshape(-1) for start, end in pairwise(edges)]

    def rasterise(self, boxes: NDArray[np.float32], objects: Numbers, side: int) -> NDArray[np.bool_]:
        """Masks (N, side, side) of N objects in as many boxes (N, 4)."""
        polygons = self.polygon_starts[objects + 1] - self.polygon_starts[objects]
        planes = np.cumsum(polygons) - polygons  # each region has a plane for each of its polygons
        region, corner = _ranges(self.starts[objects], self.starts[objects + 1])
        x, y = self._on_grid(boxes, region, corner, side)
        following = np.arange(len(corner)) + (self.following[corner] - corner)
        plane = (planes - self.polygon_starts[objects])[region] + self.polygon[corner]
        edge, column, row = _crossings(x, y, x[following], y[following], side)
        size = side * side + 1  # a crossing below the last pixel changes nothing
        crossings = np.zeros(int(polygons.sum()) * size, np.uint8)  # modulo 256, which keeps them odd or even
        np.add.at(crossings, plane[edge] * size + column * side + row, np.uint8(1))
        before = torch.from_numpy(crossings).view(-1, size)[:, :-1].cumsum(dim=1, dtype=torch.uint8)
        inside = (before & 1).numpy().view(np.bool_)
        if len(inside) != len(objects) or not polygons.all():
            inside = _union(inside, planes, polygons)
        return np.ascontiguousarray(inside.reshape(-1, side, side).transpose(0, 2, 1))

    def _on_grid(
        self, boxes: NDArray[np.float32], region: Numbers, corner: Numbers, side: int
    ) -> tuple[Numbers, Numbers]:
        """Coordinates of corners on the fine grid of the region that each belongs to."""
        scale = side / np.maximum((boxes[:, 2:] - boxes[:, :2]).astype(SCALE), LEAST_SIDE)
        scaled = (self.corners[corner] - boxes[region, :2]) * scale[region]
        on_grid = (FINER * scaled + 0.5).astype(np.int64)
        return on_grid[:, 0], on_grid[:, 1]


def _ranges(starts: Numbers, ends: Numbers) -> tuple[Numbers, Numbers]:
    """All numbers of several ranges, one range after the other: which range, and the number."""
    lengths = ends - starts
    which = np.repeat(np.arange(len(lengths)), lengths)
    return which, np.arange(len(which)) + (starts - np.cumsum(lengths) + lengths)[which]


def _crossings(x0: Numbers, y0: Numbers, x1: Numbers, y1: Numbers, side: int) -> tuple[Numbers, Numbers, Numbers]:
    """Where edges between grid points pass from one column of pixels to the next.

    Returns:
        for each crossing the number of its edge, the column, and the first row below it, at most `side`.
    """
    # Between the points FINER * column + BETWEEN - 1 and FINER * column + BETWEEN.
    first = np.maximum((np.minimum(x0, x1) - BETWEEN) // FINER + 1, 0)
    beyond = np.minimum((np.maximum(x0, x1) - BETWEEN) // FINER + 1, side)
    edge, column = _ranges(first, np.maximum(beyond, first))
    x0, y0, x1, y1 = x0[edge], y0[edge], x1[edge], y1[edge]
    flat = np.abs(x1 - x0) >= np.abs(y1 - y0)
    backwards = np.where(flat, x0 > x1, y0 > y1)
    start_x, start_y = np.where(backwards, x1, x0), np.where(backwards, y1, y0)
    run, rise = np.where(backwards, x0 - x1, x1 - x0), np.where(backwards, y0 - y1, y1 - y0)
    beyond = FINER * column + BETWEEN
    upper = np.empty_like(column)  # the upper one of the two points
    at = np.flatnonzero(flat)
    upper[at] = _upper_of_flat(beyond[at] - 1 - start_x[at], start_y[at], rise[at] / run[at])
    at = np.flatnonzero(~flat)
    upper[at] = start_y[at] + _steps_before(beyond[at], start_x[at], run[at] / rise[at])
    return edge, column, np.clip((upper + FINER - BETWEEN) // FINER, 0, side)


def _upper_of_flat(step: Numbers, start: Numbers, slope: NDArray[np.float64]) -> Numbers:
    """The lesser y of the points after `step` and `step` + 1 steps in x."""
    return np.minimum(_point(start, slope, step), _point(start, slope, step + 1))


def _steps_before(beyond: Numbers, start: Numbers, slope: NDArray[np.float64]) -> Numbers:
    """Steps in y to the last point before x passes between `beyond` - 1 and `beyond`, upwards or downwards."""
    rising = slope > 0
    # The rounding of a point and that of this estimate may differ by one step.
    step = np.floor((beyond - 0.5 - start) / slope).astype(np.int64)
    step -= (_point(start, slope, step) >= beyond) == rising
    step += (_point(start, slope, step + 1) >= beyond) != rising
    return step


def _point(start: Numbers, slope: NDArray[np.float64], step: Numbers) -> Numbers:
    """A coordinate of the edge's point after some steps, rounded as `rleFrPoly` does."""
    return (start + slope * step + 0.5).astype(np.int64)


def _union(inside: NDArray[np.bool_], planes: Numbers, polygons: Numbers) -> NDArray[np.bool_]:
    """For each region the union of its planes; empty where it has none."""
    masks = np.zeros((len(planes), inside.shape[1]), np.bool_)
    for number in range(polygons.max(initial=0)):
        having = np.flatnonzero(polygons > number)
        masks[having] |= inside[planes[having] + number]
    return masks
