"""Drawing on photographs, and sheets of several."""

import itertools
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from foundation import canvas
from foundation.canvas import Overlay, class_colours, compose_sheet, draw_cell, draw_overlays, innermost_point


def test_a_region_is_labelled_at_its_innermost_point():
    mask = np.zeros((60, 80), dtype=np.uint8)
    mask[10:31, 40:61] = 1  # a square, and a thin line to its left
    mask[20, :40] = 1
    assert innermost_point(mask) == (50, 20)
    thin = np.zeros((500, 500), dtype=np.uint8)
    thin[333, 17] = 1
    assert innermost_point(thin) == (17, 333)


def test_each_part_of_an_overlay_is_drawn():
    photograph = Image.new("RGB", (100, 80), "#404040")
    mask = np.zeros((80, 100), dtype=np.uint8)
    mask[20:60, 60:90] = 1
    overlays = [
        Overlay((10, 30, 50, 70), None, "", "#ff0000"),
        Overlay(None, mask, "", "#00ff00"),
        Overlay(None, None, "", "#0000ff", points=[(20, 10), (60, 10)], limbs=[((20, 10), (60, 10))]),
    ]
    plain = np.asarray(draw_overlays(photograph, [], 2)).astype(int)
    drawn = np.asarray(draw_overlays(photograph, overlays, 2)).astype(int)
    assert drawn.shape == (160, 200, 3)
    assert tuple(drawn[100, 20]) == (255, 0, 0)  # the left edge of the box
    assert tuple(drawn[100, 60]) == (64, 64, 64)  # inside of it
    assert drawn[80, 150][1] > 100  # inside of the mask
    assert tuple(drawn[20, 80]) == (0, 0, 255)  # between the points
    assert (drawn[-8:] == plain[-8:]).all()


@pytest.mark.parametrize("scale", [1, 2.9])
def test_a_mask_that_is_painted_in_its_region_is_the_one_painted_in_the_whole_picture(scale, monkeypatch):
    photograph = Image.new("RGB", (90, 80), "#404040")
    inside, at_the_edge, empty = (np.zeros((80, 90), dtype=np.uint8) for _ in range(3))
    inside[30:50, 20:60] = inside[48:52, 40:44] = 1
    at_the_edge[60:, :15] = 1
    overlays = [Overlay(None, mask, "", "#00ff00") for mask in (inside, at_the_edge, empty)]
    by_region = draw_overlays(photograph, overlays, scale)
    monkeypatch.setattr(canvas, "SOFT", 1000)
    assert by_region.tobytes() == draw_overlays(photograph, overlays, scale).tobytes()


def test_of_many_labels_the_last_are_drawn_and_the_rest_counted(monkeypatch):
    texts = []
    draw = canvas._draw_label
    monkeypatch.setattr(canvas, "_draw_label", lambda *rest: texts.append(rest[3].text) or draw(*rest))
    overlays = [Overlay((i, i, i + 9, i + 9), None, f"object {i}", "#ff0000") for i in range(12)]
    photograph = Image.new("RGB", (100, 100))
    draw_overlays(photograph, [*overlays[:4], Overlay((0, 0, 9, 9), None, "", "#ff0000")], 1)
    assert texts == [f"object {i}" for i in range(4)]
    texts.clear()
    draw_overlays(photograph, overlays, 1)
    assert texts == [*(f"object {i}" for i in range(7, 12)), "+ 7 without a label"]
    texts.clear()
    draw_overlays(photograph, overlays, 8)  # of 800 pixels a side there is room for all
    assert texts == [f"object {i}" for i in range(12)]


def test_labels_do_not_overlap_at_the_edges_of_the_picture(monkeypatch):
    drawn = []
    draw = canvas._draw_label
    monkeypatch.setattr(canvas, "_draw_label", lambda *rest: drawn.append(draw(*rest)) or drawn[-1])
    for top in (0, 100, 199):
        drawn.clear()
        overlays = [Overlay((5 * i, top, 5 * i + 60, 200), None, f"object {i}", "#ff0000") for i in range(7)]
        draw_overlays(Image.new("RGB", (200, 200)), overlays, 2.3)
        assert len(drawn) == 6  # five, and the line that counts the others
        rows = sorted((box[1], box[3]) for box in drawn)
        assert rows[0][0] >= 0
        assert rows[-1][1] <= 460
        assert all(upper[1] <= lower[0] for upper, lower in itertools.pairwise(rows))


@pytest.fixture
def written(monkeypatch):
    """The texts that are drawn."""
    found = []
    write = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda *rest, **more: found.append(rest[2]) or write(*rest, **more)
    )
    return found


def test_a_long_label_is_cut_and_keeps_its_score(written):
    photograph = Image.new("RGB", (200, 200))
    draw_overlays(photograph, [Overlay((0, 50, 90, 90), None, "cat", "#ff0000", score=0.871)], 1)
    draw_overlays(
        photograph, [Overlay((0, 50, 90, 90), None, "a very long name of a class", "#ff0000", score=0.871)], 1
    )
    assert written[0] == "cat 0.87"
    assert re.fullmatch(r"a very lon.*… 0\.87", written[1])
    font = canvas._font(round(16 * canvas.MIN_PEN), bold=True)
    assert font.getlength(written[1]) <= 200


def test_the_end_of_a_rows_long_name_is_seen(written):
    canvas.compose_sheet([("a", "#000000")], [[Image.new("RGB", (90, 90))]], ["2019-08-12_holiday_000012.jpg"])
    assert re.fullmatch(r"….*012\.jpg", written[-1])


def test_classes_have_different_colours_and_keep_them():
    colours = class_colours([3, 1, 2])
    assert list(colours) == [1, 2, 3]
    assert len(set(class_colours(range(10)).values())) == 10
    assert class_colours(["b", 10, "a", 2])[2] == colours[1]  # numbers come before text


def test_cells_of_a_sheet_do_not_overlap_and_titles_keep_to_their_column():
    cells = [
        draw_cell(Image.new("RGB", size, colour), [], "a note")
        for size, colour in (((50, 25), "red"), ((10, 40), "blue"))
    ]
    narrow = cells[1].width
    sheet = compose_sheet([("first", "#000000"), ("a title much longer than its column", "#000000")], [cells], ["row"])
    assert sheet.width > sum(cell.width for cell in cells)
    pixels = np.asarray(sheet).astype(int)
    for cell, colour in zip(cells, ((255, 0, 0), (0, 0, 255)), strict=True):
        places = np.argwhere((pixels == colour).all(axis=2))
        height, width = places.max(axis=0) - places.min(axis=0) + 1
        assert (width, height) == (cell.width, cell.height - 30)  # the note takes 30
    ink = np.argwhere((pixels[:30, -narrow - 14 :] < 128).all(axis=2))
    assert ink.size
    assert ink[:, 1].max() < narrow  # the title is cut to the width of its column
