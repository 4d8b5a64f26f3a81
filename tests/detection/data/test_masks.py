"""Run-length codes: what pycocotools writes is read as it meant it, and what it could not survive is refused."""

import random
from array import array

import numpy
import pytest
from pycocotools import mask as coco_masks

from detection.data import masks

HEIGHT, WIDTH = 37, 53


def random_masks(count):
    rng = numpy.random.default_rng(0)
    for number in range(count):
        density = rng.random() if number % 5 else float(number % 2)
        yield numpy.asfortranarray(rng.random((HEIGHT, WIDTH)) < density).astype(numpy.uint8)


def test_compressed_codes_are_decompressed_as_pycocotools_compressed_them():
    for mask in random_masks(40):
        text = coco_masks.encode(mask)["counts"].decode()
        flat = mask.ravel(order="F")
        changes = numpy.flatnonzero(numpy.diff(flat, prepend=0)).tolist()
        runs = numpy.diff([0, *changes, flat.size]).tolist()
        assert masks.decompress(text).tolist() == runs
        size = [HEIGHT, WIDTH]
        assert masks.read_code({"size": size, "counts": text}) == ({"size": size, "counts": text}, "")
        assert masks.read_code({"size": size, "counts": runs})[0]["counts"] == text
        assert masks.mask_area({"size": size, "counts": text}, HEIGHT, WIDTH) == mask.sum()


def test_mutated_codes_are_refused_or_valid():
    """A valid one fills its size, which is all that pycocotools needs."""
    chance = random.Random(0)
    refused = 0
    for mask in random_masks(30):
        text = coco_masks.encode(mask)["counts"].decode()
        for _ in range(20):
            place = chance.randrange(len(text))
            piece = "".join(chr(chance.randrange(40, 120)) for _ in range(chance.randrange(3)))
            changed = text[:place] + piece + text[place + chance.randrange(2) :]
            try:
                code, _ = masks.read_code({"size": [HEIGHT, WIDTH], "counts": changed})
            except ValueError:
                refused += 1
                continue
            assert masks.decompress(code["counts"]).sum() == HEIGHT * WIDTH
            assert coco_masks.decode(code).shape == (HEIGHT, WIDTH)
    assert refused > 500


@pytest.mark.parametrize(
    "code",
    [
        {},
        {"size": [4, 4]},
        {"size": [4], "counts": [16]},
        {"size": [4, "x"], "counts": [16]},
        {"size": [0, 4], "counts": []},
        {"size": [4, 4], "counts": []},
        {"size": [4, 4], "counts": ""},
        {"size": [4, 4], "counts": "\u00e9"},
        {"size": [4, 4], "counts": "oooooooooooo"},
        {"size": [4, 4], "counts": [1.5, 14.5]},
        {"size": [4, 4], "counts": [2**70, 16 - 2**70]},
        {"size": [4, 4], "counts": "b'\\"},
        {"size": [2**31 - 1, 2**31 - 1], "counts": [(2**31 - 1) ** 2]},
    ],
)
def test_other_codes_are_refused(code):
    with pytest.raises(ValueError, match=r"is a run-length code|must be"):
        masks.read_code(code)


@pytest.mark.parametrize("value", [None, [], [[]], [array("d")]])
def test_nothing_is_no_mask(value):
    """Other tools write [[]] for an object with a box only, which is not left out as one with a short polygon is."""
    assert masks.read_mask(value) == masks.Mask(None)
    assert masks.read_mask([[1, 2]]).dropped == 1


def test_numbers_of_any_size_are_refused_or_read():
    for value in (10**400, -(10**400), float("inf"), "1e999", True, "", "one", None, [1]):
        with pytest.raises(ValueError, match="must be finite numbers"):
            masks.read_number(value)
    with pytest.raises(ValueError, match="must be"):
        masks.read_mask([[1, 2, 3, 4, 5, 10**400]])
    assert [masks.read_number(value) for value in (" 1.5 ", "-2e1", 3)] == [1.5, -20, 3]
