"""Drawing on photographs: boxes, translucent masks, keypoints and labels, and sheets of several pictures.

Made with Pillow alone: pictures come out at an exact size, a sheet of 5 x 4 cells takes a second, and neither torch nor
a plotting backend is needed. Only the fonts are matplotlib's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageFont

from foundation.coco_ids import id_order

CELL = 460  # pixels: the largest width and height of an enlarged photograph on a sheet
GAP = 14  # between cells
MARGIN = 34  # left of the cells, for the names of the rows
NOTE_HEIGHT = 30
TITLE_HEIGHT = 46
OPACITY = 0.42  # of a mask; its outline is opaque
SOFT = 16  # pixels; more than the edge of a mask extends when it is blurred
INK = "#1a1a1a"
FAINT = "#6b6b6b"
COARSE = 100  # points a side of the grid on which the innermost point of a region is sought
LABELS = 5  # in a picture of `CELL` a side; more in a larger one
MIN_PEN = 0.7  # of the size of lines and letters in a cell: smaller ones are not legible
PEN_GROWTH = 0.75  # exponent of their growth with the picture
# Classes: bright, since masks are translucent, and light enough for black text. Tol's "bright" scheme and five more.
CLASS_COLOURS = (
    *("#ffb000", "#56c8ff", "#ff6f91", "#6fe07a", "#c8a2ff"),
    *("#f2f2f2", "#f4f06a", "#2dd4bf", "#ff8c42", "#f5a3d0"),
)
Box = tuple[float, float, float, float]
Point = tuple[float, float]
Key = TypeVar("Key", int, int | str)  # an id


@dataclass(frozen=True)
class Overlay:
    """An object to draw on a photograph.

    Attributes:
        box: left, top, right, bottom in pixels of the photograph; None for a region of semantic segmentation.
        mask: (H, W) of 0 and 1, if there is one.
        text: the label; an empty one is not drawn.
        colour: as #rrggbb.
        points: keypoints, as x and y in pixels of the photograph.
        limbs: lines between two keypoints.
        score: of a detection, which stands behind the text, and is seen where the text is too long for the picture.
    """

    box: Box | None
    mask: NDArray[np.uint8] | None
    text: str
    colour: str
    points: Sequence[Point] = ()
    limbs: Sequence[tuple[Point, Point]] = ()
    score: float | None = None


def class_colours(ids: Iterable[Key]) -> dict[Key, str]:
    """A colour for each category, in the order of the ids; with more than ten categories the colours repeat."""
    return {each: CLASS_COLOURS[i % len(CLASS_COLOURS)] for i, each in enumerate(sorted(ids, key=id_order))}


def draw_overlays(photograph: Image.Image, overlays: Sequence[Overlay], scale: float) -> Image.Image:
    """The photograph, enlarged by `scale`, with the overlays on it in this order.

    Lines and letters grow more slowly than the picture, because a larger picture usually shows more detail. If there
    are many overlays, only the last ones (of detections, those with the highest scores) are labelled, so that labels do
    not hide the objects; a line at the bottom says how many are not.
    """
    size = (max(1, round(photograph.width * scale)), max(1, round(photograph.height * scale)))
    pen_size = max(MIN_PEN, (max(size) / CELL) ** PEN_GROWTH)
    scene = photograph.resize(size, Image.Resampling.LANCZOS) if size != photograph.size else photograph.copy()
    for overlay in overlays:
        if overlay.mask is not None:
            _paint_mask(scene, overlay.mask, overlay.colour)
    pen = ImageDraw.Draw(scene)
    for overlay in overlays:
        _draw_lines(pen, overlay, scale, pen_size)
    labels: list[Box] = []
    named = [overlay for overlay in overlays if overlay.text]
    most = max(LABELS, round(LABELS * size[0] * size[1] / CELL**2))
    for overlay in named[-most:]:
        left, top = _label_anchor(overlay)
        labels.append(_draw_label(pen, size, (left * scale, top * scale), overlay, labels, pen_size))
    if len(named) > most:
        rest = Overlay((0, size[1], 0, size[1]), None, f"+ {len(named) - most} without a label", "#ffffff")
        _draw_label(pen, size, (1, size[1]), rest, labels, pen_size)
    return scene


def legible_scale(photograph: Image.Image) -> float:
    """By how much a small photograph is enlarged to the size of a cell, so that labels do not hide its objects; 1 for a
    larger one.
    """
    return max(1.0, CELL / max(photograph.size))


def draw_cell(photograph: Image.Image, overlays: Sequence[Overlay], note: str) -> Image.Image:
    """A cell of a sheet: the photograph enlarged to at most `CELL` a side, the overlays, and a note below."""
    scene = draw_overlays(photograph, overlays, min(CELL / photograph.width, CELL / photograph.height))
    cell = Image.new("RGB", (scene.width, scene.height + NOTE_HEIGHT), "white")
    cell.paste(scene, (0, 0))
    ImageDraw.Draw(cell).text((0, scene.height + 6), note, fill=FAINT, font=_font(15))
    return cell


def compose_sheet(
    titles: Sequence[tuple[str, str]], rows: Sequence[Sequence[Image.Image]], names: Sequence[str]
) -> Image.Image:
    """Cells in rows, all of the same length.

    Args:
        titles: of the columns, each a text and its colour.
        rows: of cells.
        names: of the rows, written upright at their left; of one that is too long, the end is shown.
    """
    widths = [max(cell.width for cell in column) for column in zip(*rows, strict=True)]
    heights = [max(cell.height for cell in row) for row in rows]
    size = (MARGIN + sum(widths) + GAP * len(widths), TITLE_HEIGHT + sum(heights) + GAP * len(heights))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    lefts = [MARGIN + sum(widths[:i]) + GAP * i for i in range(len(widths))]
    for left, width, (text, colour) in zip(lefts, widths, titles, strict=True):
        font = _font(20, bold=True)
        pen.text((left, 8), _shortened(text, width, font), fill=colour, font=font)
        pen.line((left, TITLE_HEIGHT - 9, left + width - 1, TITLE_HEIGHT - 9), fill=colour, width=3)
    top = TITLE_HEIGHT
    for row, height, name in zip(rows, heights, names, strict=True):
        upright = Image.new("RGB", (height, MARGIN - 8), "white")
        ended = _shortened(name, height, _font(15), keep_end=True)
        ImageDraw.Draw(upright).text((height, 0), ended, fill=FAINT, font=_font(15), anchor="ra")
        sheet.paste(upright.rotate(90, expand=True), (4, top))
        for left, cell in zip(lefts, row, strict=True):
            sheet.paste(cell, (left, top))
        top += height + GAP
    return sheet


def innermost_point(mask: NDArray[np.uint8]) -> Point:
    """A point (x, y) of a region (H, W) that is as far from its outline as any other, to within a few pixels."""
    step = max(1, max(mask.shape) // COARSE)
    left = np.pad(mask[::step, ::step] > 0, 1)
    if not left.any():  # the region is too thin for the coarse grid
        step, left = 1, np.pad(mask > 0, 1)
    while True:  # erode until nothing is left
        inner = left.copy()
        inner[1:-1, 1:-1] &= left[:-2, 1:-1] & left[2:, 1:-1] & left[1:-1, :-2] & left[1:-1, 2:]
        if not inner.any():
            row, column = np.argwhere(left)[left.sum() // 2]
            return (float((column - 1) * step), float((row - 1) * step))
        left = inner


def _paint_mask(scene: Image.Image, mask: NDArray[np.uint8], colour: str) -> None:
    """Fill and outline a mask, with soft edges, although the mask has hard ones in the photograph's pixels."""
    large = Image.fromarray(mask * np.uint8(255)).resize(scene.size, Image.Resampling.BICUBIC)
    box = large.getbbox()
    if box is None:
        return
    # Outside of this region the filters below change nothing.
    left, top, right, bottom = box
    right, bottom = min(right + SOFT, scene.width), min(bottom + SOFT, scene.height)
    region = max(left - SOFT, 0), max(top - SOFT, 0), right, bottom
    large = large.crop(region)
    solid = large.filter(ImageFilter.GaussianBlur(1.5)).point(lambda value: min(255, max(0, (value - 96) * 4)))
    rim = ImageChops.subtract(solid, solid.filter(ImageFilter.MinFilter(5)))
    fill = ImageColor.getrgb(colour)
    scene.paste(fill, region, solid.point(lambda value: value * OPACITY))
    scene.paste(fill, region, rim)


def _draw_lines(pen: ImageDraw.ImageDraw, overlay: Overlay, scale: float, pen_size: float) -> None:
    """Box, limbs and keypoints in the overlay's colour on a dark rim, which stands out on any background."""
    line, rim = max(1, round(3 * pen_size)), max(1, round(pen_size))
    if overlay.box is not None:
        left, top, right, bottom = (edge * scale for edge in overlay.box)
        right, bottom = max(left, right), max(top, bottom)
        outer = (left - rim, top - rim, right + rim, bottom + rim)
        pen.rounded_rectangle(outer, line + rim, outline=INK, width=line + 2 * rim)
        pen.rounded_rectangle((left, top, right, bottom), line, outline=overlay.colour, width=line)
    for width, colour in ((line + 2 * rim, INK), (line, overlay.colour)):
        for (x1, y1), (x2, y2) in overlay.limbs:
            pen.line((x1 * scale, y1 * scale, x2 * scale, y2 * scale), fill=colour, width=width)
    for x, y in overlay.points:
        spot = (x * scale - line, y * scale - line, x * scale + line, y * scale + line)
        pen.ellipse(spot, fill=overlay.colour, outline=INK, width=rim)


def _label_anchor(overlay: Overlay) -> Point:
    """Where the label belongs, in pixels of the photograph: a box's upper left corner, or the middle of a region."""
    if overlay.box is not None:
        return (overlay.box[0], overlay.box[1])
    return innermost_point(overlay.mask) if overlay.mask is not None and overlay.mask.any() else (0, 0)


def _draw_label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    anchor: Point,
    overlay: Overlay,
    others: Sequence[Box],
    pen_size: float,
) -> Box:
    """Draw a label above a box's corner or on a region's point, within the picture and clear of `others`."""
    font = _font(round(16 * pen_size), bold=True)
    score = "" if overlay.score is None else f" {overlay.score:.2f}"
    text = _shortened(overlay.text, size[0] - 12 * pen_size - font.getlength(score), font) + score
    width, height = font.getlength(text) + 12 * pen_size, round(23 * pen_size)
    x, y = (anchor[0] - 1, anchor[1] - height) if overlay.box else (anchor[0] - width / 2, anchor[1] - height / 2)
    x, y = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
    y = _free_row(y, height, size[1], [other for other in others if x < other[2] and other[0] < x + width])
    pen.rounded_rectangle((x, y, x + width, y + height), 4 * pen_size, fill=overlay.colour, outline=INK, width=1)
    pen.text((x + 6 * pen_size, y + height / 2), text, fill=INK, font=font, anchor="lm")
    return (x, y, x + width, y + height)


def _free_row(y: float, height: float, limit: int, others: Sequence[Box]) -> float:
    """The top of a label near `y`: below the others in its way or, where the picture ends, above them.

    Args:
        y: where the label belongs; the result where there is no room left.
        height: of the label.
        limit: height of the picture.
        others: labels in the same columns.
    """
    below = sorted(other[3] + 1 for other in others if y < other[3] + 1 <= limit - height)
    above = sorted((top for other in others if 0 <= (top := other[1] - height - 1) < y), reverse=True)
    rows = (top for top in (y, *below, *above) if all(top + height <= each[1] or top >= each[3] for each in others))
    return next(rows, y)


def _shortened(text: str, width: float, font: ImageFont.FreeTypeFont, keep_end: bool = False) -> str:
    """A text, cut to so many pixels: its end, or its start where `keep_end`, becomes an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[1:] if keep_end else text[:-1]
    return f"…{text}" if keep_end else f"{text}…"


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The typeface that comes with matplotlib, so that no font has to be installed."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
