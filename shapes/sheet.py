"""A contact sheet: samples of the three parts, the scenes with their boxes and polygons."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from shapes.outlines import CLASSES

COLUMNS = 14
ROWS = 4  # of unlabelled pictures, and of scenes
TILE, SCENE = 96, 224  # pixels on the sheet
GAP = 4
# One colour per class, light enough for the pictures and far from one another.
COLOURS = ("#ff5d5d", "#ffb13d", "#fff04d", "#7dff6a", "#4dffe1", "#5db4ff", "#b98bff", "#ff7de0")


def draw_sheet(root: Path) -> Image.Image:
    """Unlabelled pictures, one row per class, and annotated scenes, below one another."""
    unlabeled = _tiles(sorted((root / "unlabeled").glob("*.jpg"))[: COLUMNS * ROWS])
    one_class_a_row = [sorted((root / "objects/train" / name).glob("*.jpg"))[:COLUMNS] for name in CLASSES]
    objects = _tiles([path for row in one_class_a_row for path in row])
    across = COLUMNS * (TILE + GAP) // (SCENE + GAP)
    scenes = _annotated(root, "train", across * ROWS)
    blocks = [_grid(unlabeled, COLUMNS, TILE), _grid(objects, COLUMNS, TILE), _grid(scenes, across, SCENE)]
    height = sum(block.height + 3 * GAP for block in blocks)
    sheet = Image.new("RGB", (max(block.width for block in blocks), height), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, ((sheet.width - block.width) // 2, top))
        top += block.height + 3 * GAP
    return sheet


def _tiles(paths: list[Path]) -> list[Image.Image]:
    return [Image.open(path).resize((TILE, TILE)) for path in paths]


def _grid(tiles: list[Image.Image], columns: int, side: int) -> Image.Image:
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (columns * (side + GAP) - GAP, rows * (side + GAP) - GAP), "white")
    for index, tile in enumerate(tiles):
        grid.paste(tile, (index % columns * (side + GAP), index // columns * (side + GAP)))
    return grid


def _annotated(root: Path, split: str, count: int) -> list[Image.Image]:
    coco = json.loads((root / f"scenes/annotations/instances_{split}.json").read_text())
    scenes = []
    for entry in coco["images"][:count]:
        picture = Image.open(root / "scenes" / split / entry["file_name"]).convert("RGB")
        factor = SCENE / max(picture.size)
        picture = picture.resize((round(picture.width * factor), round(picture.height * factor)))
        for annotation in coco["annotations"]:
            if annotation["image_id"] == entry["id"]:
                _outline(picture, annotation, factor)
        tile = Image.new("RGB", (SCENE, SCENE), "white")
        tile.paste(picture, ((SCENE - picture.width) // 2, (SCENE - picture.height) // 2))
        scenes.append(tile)
    return scenes


def _outline(picture: Image.Image, annotation: dict[str, Any], factor: float) -> None:
    colour = COLOURS[(annotation["category_id"] - 1) % len(COLOURS)]
    draw = ImageDraw.Draw(picture, "RGBA")
    for part in annotation["segmentation"]:
        points = [value * factor for value in part]
        draw.polygon(points, fill=f"{colour}38")
        draw.line(points + points[:2], fill=colour, width=2)
    x, y, width, height = (value * factor for value in annotation["bbox"])
    draw.rectangle((x, y, x + width, y + height), outline=colour)
    name = CLASSES[annotation["category_id"] - 1]
    draw.rectangle((x, y, x + draw.textlength(name) + 4, y + 12), fill="#000000a0")
    draw.text((x + 2, y), name, fill=colour)
