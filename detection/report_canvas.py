"""Drawing on photographs: boxes, see-through masks and labels, enlarged so that they read well in print."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageFont

CELL = 460  # pixels: the greatest width and height of an enlarged photograph
GAP = 14
NOTE_HEIGHT = 30
TITLE_HEIGHT = 46
OPACITY = 0.42  # of a mask; its outline is opaque
INK = "#1a1a1a"
FAINT = "#6b6b6b"
Canvas = Image.Image
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Shape:
    """An object to draw.

    Attributes:
        box: left, top, right, bottom in pixels of the photograph.
        mask: (H, W) of 0 and 1, if there is one.
        colour: as #rrggbb.
    """

    box: Box
    mask: NDArray[np.uint8] | None
    text: str
    colour: str


def draw_scene(photograph: Image.Image, shapes: Sequence[Shape], note: str) -> Canvas:
    """The photograph enlarged to a cell, with the shapes on it in this order, and a note below."""
    scale = min(CELL / photograph.width, CELL / photograph.height)
    size = (round(photograph.width * scale), round(photograph.height * scale))
    scene = photograph.resize(size, Image.Resampling.LANCZOS)
    for shape in shapes:
        if shape.mask is not None:
            _paint_mask(scene, shape.mask, shape.colour)
    pen = ImageDraw.Draw(scene)
    boxes = [tuple(edge * scale for edge in shape.box) for shape in shapes]
    for shape, (left, top, right, bottom) in zip(shapes, boxes, strict=True):
        pen.rounded_rectangle((left - 1, top - 1, right + 1, bottom + 1), 4, outline=INK, width=5)
        pen.rounded_rectangle((left, top, right, bottom), 3, outline=shape.colour, width=3)
    taken: list[Box] = []
    for shape, (left, top, _, _) in zip(shapes, boxes, strict=True):
        taken.append(_draw_tag(pen, size, (left, top), shape, taken))
    cell = Image.new("RGB", (size[0], size[1] + NOTE_HEIGHT), "white")
    cell.paste(scene, (0, 0))
    ImageDraw.Draw(cell).text((0, size[1] + 6), note, fill=FAINT, font=_font(15))
    return cell


def compose_sheet(titles: Sequence[tuple[str, str]], rows: Sequence[Sequence[Canvas]], names: Sequence[str]) -> Canvas:
    """Cells in rows under titles, each a text and its colour; a row's name stands at its left, upright."""
    widths = [max(cell.width for cell in column) for column in zip(*rows, strict=True)]
    heights = [max(cell.height for cell in row) for row in rows]
    margin = 34
    sheet = Image.new(
        "RGB",
        (margin + sum(widths) + GAP * len(widths), TITLE_HEIGHT + sum(heights) + GAP * len(heights)),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    lefts = [margin + sum(widths[:i]) + GAP * i for i in range(len(widths))]
    for left, width, (text, colour) in zip(lefts, widths, titles, strict=True):
        pen.text((left, 8), text, fill=colour, font=_font(20, bold=True))
        pen.line((left, TITLE_HEIGHT - 9, left + width - 1, TITLE_HEIGHT - 9), fill=colour, width=3)
    top = TITLE_HEIGHT
    for row, height, name in zip(rows, heights, names, strict=True):
        upright = Image.new("RGB", (height, margin - 8), "white")
        ImageDraw.Draw(upright).text((height, 0), name, fill=FAINT, font=_font(15), anchor="ra")
        sheet.paste(upright.rotate(90, expand=True), (4, top))
        for left, cell in zip(lefts, row, strict=True):
            sheet.paste(cell, (left, top))
        top += height + GAP
    return sheet


def _paint_mask(scene: Image.Image, mask: NDArray[np.uint8], colour: str) -> None:
    """Fill and outline, with soft edges although the mask has hard ones of the photograph's pixels."""
    large = Image.fromarray(mask * np.uint8(255)).resize(scene.size, Image.Resampling.BICUBIC)
    solid = large.filter(ImageFilter.GaussianBlur(1.5)).point(lambda value: min(255, max(0, (value - 96) * 4)))
    tint = Image.new("RGB", scene.size, ImageColor.getrgb(colour))
    scene.paste(tint, mask=solid.point(lambda value: value * OPACITY))
    rim = ImageChops.subtract(solid, solid.filter(ImageFilter.MinFilter(5)))
    scene.paste(tint, mask=rim)


def _draw_tag(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corner: tuple[float, float],
    shape: Shape,
    taken: Sequence[Box],
) -> Box:
    """A label on the box's upper left corner, moved into the picture and below labels already there."""
    font = _font(16, bold=True)
    width, height = font.getlength(shape.text) + 12, 23
    x = min(max(0, corner[0] - 1), size[0] - width)
    y = min(max(0, corner[1] - height), size[1] - height)
    for _ in taken:
        for other in taken:
            if x < other[2] and other[0] < x + width and y < other[3] and other[1] < y + height:
                y = min(other[3] + 1, size[1] - height)
    pen.rounded_rectangle((x, y, x + width, y + height), 4, fill=shape.colour, outline=INK, width=1)
    pen.text((x + 6, y + height / 2), shape.text, fill=INK, font=font, anchor="lm")
    return (x, y, x + width, y + height)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The typeface that comes with matplotlib, so that no font need be installed."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
