"""Masks of annotations: polygons and COCO's run-length codes (RLE), validated and brought into one form.

pycocotools trusts what it is given: a code whose runs do not fill its size makes it read outside its memory or loop
without end. So every code is checked here, when the file is read, before pycocotools sees it.
"""

import ast
import math
import re
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_masks

from foundation.images import MAX_PIXELS

LEAST_COORDINATES = 6  # of a polygon: three points
FARTHEST = 1_000_000  # pixels; pycocotools walks along the outline in steps of a fifth, and crashes far outside
GROUP_BITS, CONTINUED, SIGN = 5, 0x20, 0x10  # of a character of a compressed code
FIRST_CHARACTER, CHARACTERS = 48, 64
LONGEST_GROUP = 6  # characters of one number; more would not fit into 32 bits
BYTES_LITERAL = re.compile(r"b'.*'|b\".*\"", re.DOTALL)
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")

Polygons = list["array[float]"]


class Mask(NamedTuple):
    """The mask of one object.

    Attributes:
        regions: polygons as arrays x0, y0, x1, y1, ..; or a code, `size` (height, width) and compressed `counts`; None
            where the record has no mask. An empty list: it has polygons, but none with three points.
        dropped: polygons that were left out: fewer than three points, or an odd number of coordinates.
        converted: what was converted, in words; empty where nothing was.
    """

    regions: Polygons | dict[str, Any] | None
    dropped: int = 0
    converted: str = ""


def read_mask(value: Any) -> Mask:
    """The mask that a `segmentation` holds.

    Polygons may be lists of coordinates (COCO's form) or of points, one polygon need not be in a list of polygons, and
    numbers may be text. A list of empty polygons only is no mask.

    Raises:
        ValueError: it is neither polygons nor a valid code; the message says why.
    """
    if isinstance(value, dict):
        code, converted = read_code(value)
        return Mask(code, converted=converted)
    if value is None:
        return Mask(None)
    if not isinstance(value, list):
        raise ValueError("must be a list of polygons or a run-length code")
    if all(isinstance(each, list | array) and not each for each in value):  # [], or as some tools write it [[]]
        return Mask(None)
    try:
        polygons = [each if type(each) is array else array("d", each) for each in value]
        converted = ""
    except (TypeError, OverflowError):
        polygons, converted = _convert_polygons(value)
    if len(polygons) >= LEAST_COORDINATES // 2 and all(len(each) == 2 for each in polygons):
        polygons, converted = [array("d", chain.from_iterable(polygons))], "a polygon as a list of points"
    if not all(math.isfinite(sum(each)) for each in polygons):
        raise ValueError("has a coordinate that is not finite")
    if any(each and not -FARTHEST <= min(each) <= max(each) <= FARTHEST for each in polygons):
        raise ValueError(f"has a coordinate beyond {FARTHEST:,} pixels")
    kept = [each for each in polygons if len(each) >= LEAST_COORDINATES and len(each) % 2 == 0]
    return Mask(kept, len(polygons) - len(kept), converted)


def read_number(value: Any) -> float:
    """A finite number, also one that is given as text.

    Raises:
        ValueError: it is not one.
    """
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return value
    except OverflowError:  # an integer beyond the range of floats
        pass
    raise ValueError("must be finite numbers")


def read_whole(value: Any) -> int:
    """A whole number, also one that is given as text or as a float without a fraction.

    Raises:
        ValueError: it is not one.
    """
    number = read_number(value)
    if number != int(number):
        raise ValueError("must be whole numbers")
    return int(number)


def _convert_polygons(value: list[Any]) -> "tuple[Polygons, str]":
    """Polygons in one of the forms that COCO does not have but that can mean one thing only."""
    if not any(isinstance(each, list) for each in value):
        flat = array("d", map(read_number, value))
        if len(flat) < LEAST_COORDINATES or len(flat) % 2:
            raise ValueError(f"is a list of {len(flat)} numbers: must be a list of polygons of three or more points")
        return [flat], "a polygon that is not in a list"
    polygons, converted = [], "coordinates as text"
    for each in value:
        if not isinstance(each, list):
            raise ValueError("must be a list of polygons or a run-length code")
        if each and all(isinstance(point, list) and len(point) == 2 for point in each):
            each, converted = list(chain.from_iterable(each)), "polygons as lists of points"
        polygons.append(array("d", map(read_number, each)))
    return polygons, converted


def read_code(value: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A run-length code in its compressed form, and what was converted.

    Args:
        value: `size` (height, width) and `counts`, a list of run lengths or compressed text.

    Raises:
        ValueError: a part is missing, or the runs do not fill the size.
    """
    size, counts, converted = value.get("size"), value.get("counts"), ""
    if not isinstance(size, list) or len(size) != 2:
        raise ValueError("is a run-length code without a size of height and width")
    height, width = map(read_whole, size)
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"is a run-length code with the size {height} x {width}")
    if isinstance(counts, list):
        runs = counts if all(type(each) is int for each in counts) else [read_whole(each) for each in counts]
    elif isinstance(counts, str):
        if BYTES_LITERAL.fullmatch(counts):
            counts, converted = _evaluate_literal(counts), "a run-length code as the text of Python bytes"
        runs = decompress(counts).tolist()
    else:
        raise ValueError("is a run-length code without counts")
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        covered = "negative runs" if min(runs, default=0) < 0 else f"runs that cover {sum(runs)} pixels"
        raise ValueError(f"is a run-length code with {covered}, but its size {height} x {width} has {height * width}")
    if isinstance(counts, list):
        code = coco_masks.frPyObjects({"size": [height, width], "counts": runs}, height, width)
        counts = code["counts"].decode()
    return {"size": [height, width], "counts": counts}, converted


def _evaluate_literal(text: str) -> str:
    try:
        return bytes(ast.literal_eval(text)).decode("ascii")
    except (ValueError, SyntaxError) as error:
        raise ValueError("is a run-length code whose counts are not COCO's") from error


def decompress(text: str) -> NDArray[np.int64]:
    """The run lengths that the text of a compressed code stands for (pycocotools, `rleFrString`).

    Each number is written in groups of five bits, the lowest first, a character each, and from the fourth number on as
    the difference to the number two before.

    Raises:
        ValueError: the text is not such a code.
    """
    try:
        values = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - FIRST_CHARACTER
    except UnicodeEncodeError as error:
        raise ValueError("is a run-length code whose counts are not COCO's") from error
    ends = np.flatnonzero((values & CONTINUED) == 0)
    if len(ends) == 0 or ends[-1] != len(values) - 1 or values.min() < 0 or values.max() >= CHARACTERS:
        raise ValueError("is a run-length code whose counts are not COCO's")
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > LONGEST_GROUP + 1:
        raise ValueError("is a run-length code whose counts are not COCO's")
    places = np.arange(len(values)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((values & (CONTINUED - 1)) << (GROUP_BITS * places), starts)
    negative = (values[ends] & SIGN) != 0
    numbers[negative] -= 1 << (GROUP_BITS * lengths[negative])
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def mask_area(regions: Polygons | dict[str, Any], height: int, width: int) -> float:
    """Pixels of a mask in an image of this size."""
    return float(coco_masks.area(encode_regions(regions, height, width)))


def encode_regions(regions: Sequence[Sequence[float]] | dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """A mask as one compressed code. Polygons of fewer than three points are left out, which may leave no pixel."""
    if isinstance(regions, dict):
        return coco_masks.frPyObjects(regions, height, width) if isinstance(regions["counts"], list) else regions
    polygons = [list(each) for each in regions if len(each) >= LEAST_COORDINATES]
    if not polygons:
        return coco_masks.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)
    codes = coco_masks.frPyObjects(polygons, height, width)
    return codes[0] if len(codes) == 1 else coco_masks.merge(codes)


def polygon_areas(polygons: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Area of each polygon, given as x0, y0, x1, y1, ..., by the sum of the cross products of its edges."""
    if not polygons:
        return np.zeros(0)
    counts = np.fromiter(map(len, polygons), np.int64) // 2
    joined = b"".join(each if type(each) is array else array("d", each) for each in polygons)
    points = np.frombuffer(joined, np.float64).reshape(-1, 2)
    ends = np.cumsum(counts)
    following = np.arange(1, len(points) + 1)
    following[ends - 1] = ends - counts
    cross = points[:, 0] * points[following, 1] - points[following, 0] * points[:, 1]
    return np.abs(np.add.reduceat(cross, ends - counts)) / 2
