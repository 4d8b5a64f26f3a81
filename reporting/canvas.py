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
COARSE = 100  # points a side of the grid on which the depth of a region is sought
LEAST_PEN = 0.7  # of the size of lines and letters in a cell: smaller ones are not legible
PEN_GROWTH = 0.75  # exponent of their growth with the picture
Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """An object to draw.

    Attributes:
        box: left, top, right, bottom in pixels of the photograph; a region has none.
        mask: (H, W) of 0 and 1, if there is one.
        colour: as #rrggbb.
        points: places on the object, such as joints, as x and y in pixels of the photograph.
        limbs: lines between two such places.
    """

    box: Box | None
    mask: NDArray[np.uint8] | None
    text: str
    colour: str
    points: Sequence[Point] = ()
    limbs: Sequence[tuple[Point, Point]] = ()


def draw_scene(photograph: Image.Image, shapes: Sequence[Shape], note: str) -> Canvas:
    """The photograph enlarged to a cell, with the shapes on it in this order, and a note below."""
    scene = draw_shapes(photograph, shapes, min(CELL / photograph.width, CELL / photograph.height))
    cell = Image.new("RGB", (scene.width, scene.height + NOTE_HEIGHT), "white")
    cell.paste(scene, (0, 0))
    ImageDraw.Draw(cell).text((0, scene.height + 6), note, fill=FAINT, font=_font(15))
    return cell


def draw_shapes(photograph: Image.Image, shapes: Sequence[Shape], scale: float) -> Canvas:
    """The photograph, `scale` times as large, with the shapes on it in this order.

    Lines and letters grow more slowly than the picture: a large one is mostly a detailed one.
    """
    size = (max(1, round(photograph.width * scale)), max(1, round(photograph.height * scale)))
    pen_size = max(LEAST_PEN, (max(size) / CELL) ** PEN_GROWTH)
    scene = photograph.resize(size, Image.Resampling.LANCZOS) if size != photograph.size else photograph.copy()
    for shape in shapes:
        if shape.mask is not None:
            _paint_mask(scene, shape.mask, shape.colour)
    pen = ImageDraw.Draw(scene)
    for shape in shapes:
        _draw_lines(pen, shape, scale, pen_size)
    taken: list[Box] = []
    for shape in shapes:
        if shape.text:
            left, top = _tag_place(shape)
            taken.append(_draw_tag(pen, size, (left * scale, top * scale), shape, taken, pen_size))
    return scene


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


def _draw_lines(pen: ImageDraw.ImageDraw, shape: Shape, scale: float, pen_size: float) -> None:
    """Box, limbs and points, each light in the colour of the shape on a dark rim, so that they stand out anywhere."""
    line, rim = max(1, round(3 * pen_size)), max(1, round(pen_size))
    if shape.box is not None:
        left, top, right, bottom = (edge * scale for edge in shape.box)
        right, bottom = max(left, right), max(top, bottom)
        outer = (left - rim, top - rim, right + rim, bottom + rim)
        pen.rounded_rectangle(outer, line + rim, outline=INK, width=line + 2 * rim)
        pen.rounded_rectangle((left, top, right, bottom), line, outline=shape.colour, width=line)
    for width, colour in ((line + 2 * rim, INK), (line, shape.colour)):
        for (x1, y1), (x2, y2) in shape.limbs:
            pen.line((x1 * scale, y1 * scale, x2 * scale, y2 * scale), fill=colour, width=width)
    for x, y in shape.points:
        spot = (x * scale - line, y * scale - line, x * scale + line, y * scale + line)
        pen.ellipse(spot, fill=shape.colour, outline=INK, width=rim)


def _tag_place(shape: Shape) -> Point:
    """Where the label belongs, in pixels of the photograph: a box's upper left corner, or the depth of a region."""
    if shape.box is not None:
        return (shape.box[0], shape.box[1])
    return deepest(shape.mask) if shape.mask is not None and shape.mask.any() else (0, 0)


def deepest(mask: NDArray[np.uint8]) -> Point:
    """A point (x, y) as far from the mask's rim as there is, to within a few pixels."""
    step = max(1, max(mask.shape) // COARSE)
    left = np.pad(mask[::step, ::step] > 0, 1)
    if not left.any():  # too thin to be met by the coarse grid
        step, left = 1, np.pad(mask > 0, 1)
    while True:
        inner = left.copy()
        inner[1:-1, 1:-1] &= left[:-2, 1:-1] & left[2:, 1:-1] & left[1:-1, :-2] & left[1:-1, 2:]
        if not inner.any():
            row, column = np.argwhere(left)[left.sum() // 2]
            return (float((column - 1) * step), float((row - 1) * step))
        left = inner


def _draw_tag(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corner: Point,
    shape: Shape,
    taken: Sequence[Box],
    pen_size: float,
) -> Box:
    """A label above a box's corner or on a region's point, moved into the picture and below labels already there."""
    font = _font(round(16 * pen_size), bold=True)
    width, height = font.getlength(shape.text) + 12 * pen_size, round(23 * pen_size)
    x, y = (corner[0] - 1, corner[1] - height) if shape.box else (corner[0] - width / 2, corner[1] - height / 2)
    x, y = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
    for _ in taken:
        for other in taken:
            if x < other[2] and other[0] < x + width and y < other[3] and other[1] < y + height:
                y = max(0, min(other[3] + 1, size[1] - height))
    pen.rounded_rectangle((x, y, x + width, y + height), 4 * pen_size, fill=shape.colour, outline=INK, width=1)
    pen.text((x + 6 * pen_size, y + height / 2), shape.text, fill=INK, font=font, anchor="lm")
    return (x, y, x + width, y + height)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The typeface that comes with matplotlib, so that no font need be installed."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
