"""Scenes of clip art on random textures, in COCO's format: drawings that this project has not made.

    python benchmarks/clipart.py OUT --clipart FOLDER [--size 128] [--unlabelled 6000] [--train 400] [--val 500]

The drawings are those of the Debian package openclipart-png, unpacked (FOLDER is its usr/share/openclipart/png), in ten
classes. The first four fifths of a class, after a shuffle, serve training, the others validation: no drawing is in
both.

OUT gets `unlabelled/`, `train/` and `val/` with their scenes, `train.json` and `val.json`, and `folder/train` and
`folder/val` with single drawings in a folder for each class, for probes. The same arguments give the same files.
Needs OpenCV (`pip install opencv-python-headless`).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foundation.errors import ArgumentParser, UserError, run

try:
    import cv2
except ImportError:  # reported by `main`
    cv2 = None

CLASSES = (
    "animals",
    "food",
    "transportation",
    "people",
    "plants",
    "buildings",
    "tools",
    "recreation/games",
    "signs_and_symbols/flags",
    "electronics",
)
SPRITE = 128  # pixels that drawings are reduced to
MOST_OBJECTS = 4
OBJECT_SHARE = (0.25, 0.55)  # of the scene's side
SMALLEST_AREA = 60  # pixels that must be visible of an object, else it is not annotated
Pool = Mapping[str, Sequence[NDArray[np.uint8]]]  # by class, (128, 128, 4) each


def main(argv: Sequence[str] | None = None) -> None:
    """Write the set.

    Raises:
        UserError: OpenCV is missing, or a class has too few drawings.
    """
    args = build_parser().parse_args(argv)
    if cv2 is None:
        raise UserError("OpenCV is missing: pip install opencv-python-headless")
    cv2.setNumThreads(1)
    everything = read_sprites(args.clipart, args.classes)
    train = {name: sprites[: len(sprites) * 4 // 5] for name, sprites in everything.items()}
    val = {name: sprites[len(sprites) * 4 // 5 :] for name, sprites in everything.items()}
    print(", ".join(f"{name} {len(train[name])} + {len(val[name])}" for name in args.classes))
    write_unlabelled(args.out / "unlabelled", train, args.unlabelled, args.size)
    for part, pool, count, seed in (("train", train, args.train, 100), ("val", val, args.val, 101)):
        rng = np.random.default_rng(seed)
        write_annotated(args.out, part, pool, count, args.size, rng)
        write_singles(args.out / "folder" / part, pool, rng)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, help="folder of the set")
    add("--clipart", type=Path, required=True, help="the package's usr/share/openclipart/png")
    add("--classes", nargs="+", default=CLASSES, metavar="FOLDER", help="of the package (default: ten)")
    add_scene_options(parser)
    return parser


def add_scene_options(parser: argparse.ArgumentParser) -> None:
    """The size and the numbers of the scenes."""
    parser.add_argument("--size", type=int, default=128, help="pixels of a scene's side (%(default)s)")
    parser.add_argument("--unlabelled", type=int, default=6000, help="scenes (%(default)s)")
    parser.add_argument("--train", type=int, default=400, help="annotated scenes (%(default)s)")
    parser.add_argument("--val", type=int, default=500, help="annotated scenes (%(default)s)")


def read_sprites(root: Path, classes: Sequence[str]) -> dict[str, list[NDArray[np.uint8]]]:
    """The drawings of each class that leave some of their frame free and fill some of it, shuffled.

    Raises:
        UserError: a class has fewer than two, so that none would be left for training or validation.
    """
    found = {}
    for name in classes:
        good = []
        for path in sorted((root / name).rglob("*.png")):
            try:
                with Image.open(path) as image:
                    sprite = np.asarray(image.convert("RGBA").resize((SPRITE, SPRITE)))
            except (OSError, ValueError, Image.DecompressionBombError):
                continue
            if 0.08 < (sprite[..., 3] > 40).mean() < 0.95:
                good.append(sprite)
        if len(good) < 2:
            raise UserError(f"{root / name} has {len(good)} usable drawings (PNG); at least 2 are needed")
        np.random.default_rng(7).shuffle(good)  # type: ignore[arg-type]
        found[name] = good
    return found


def draw_texture(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """A random coloured texture with structure of all sizes, (size, size, 3)."""
    total = np.zeros((size, size, 3), np.float32)
    for cells in (2, 4, 8, 16, 32, 64):
        noise = rng.normal(0, 1, (cells, cells, 3)).astype(np.float32)
        total += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC) / np.sqrt(cells)
    result = np.clip(total / total.std() * rng.uniform(10, 40) + rng.uniform(50, 205, 3), 0, 255)
    return np.asarray(result)


def draw_scene(rng: np.random.Generator, pool: Pool, size: int) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """A scene of one to four drawings and what is annotated in it."""
    image = draw_texture(rng, size)
    owner = np.zeros((size, size), np.int32)
    labels = []
    for number in range(1, int(rng.integers(1, MOST_OBJECTS + 1)) + 1):
        label = int(rng.integers(len(pool)))
        group = [*pool.values()][label]
        sprite = group[int(rng.integers(len(group)))]
        side = int(rng.uniform(*OBJECT_SHARE) * size)
        sprite = cv2.resize(sprite, (side, side), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
        if rng.random() < 0.5:
            sprite = sprite[:, ::-1]
        top, left = (int(v) for v in rng.integers(0, size - side + 1, 2))
        alpha = sprite[..., 3:] / 255.0
        window = np.s_[top : top + side, left : left + side]
        image[window] = image[window] * (1 - alpha) + sprite[..., :3] * alpha
        owner[window][alpha[..., 0] > 0.4] = number
        labels.append(label)
    annotations = []
    for number, label in enumerate(labels, start=1):
        mask = (owner == number).astype(np.uint8)
        if mask.sum() < SMALLEST_AREA:
            continue
        contours = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
        polygons = [part.reshape(-1).astype(float).tolist() for part in contours if len(part) >= 4]
        if polygons:
            annotations.append(
                {
                    "category_id": label + 1,
                    "bbox": list(cv2.boundingRect(mask)),
                    "area": float(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": polygons,
                }
            )
    return image.astype(np.uint8), annotations


def write_unlabelled(folder: Path, pool: Pool, count: int, size: int) -> None:
    """Scenes without annotations."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    for number in range(count):
        write_image(folder / f"{number:06d}.jpg", draw_scene(rng, pool, size)[0])


def write_annotated(out: Path, part: str, pool: Pool, count: int, size: int, rng: np.random.Generator) -> None:
    """Scenes in `out/part` and their annotations in `out/part.json`."""
    (out / part).mkdir(parents=True, exist_ok=True)
    annotated = []
    for number in range(count):
        image, annotations = draw_scene(rng, pool, size)
        write_image(out / part / f"{number:06d}.jpg", image)
        annotated.append(annotations)
    write_coco(out / f"{part}.json", annotated, size, list(pool))


def write_coco(path: Path, annotated: Sequence[Sequence[dict[str, Any]]], size: int, classes: Sequence[str]) -> None:
    """Write the annotations of square scenes, of which the i-th is in the file i.jpg (six digits), as a COCO file."""
    images = [{"id": i, "file_name": f"{i:06d}.jpg", "width": size, "height": size} for i in range(len(annotated))]
    flat = [{**annotation, "image_id": i} for i, found in enumerate(annotated) for annotation in found]
    numbered = [{**annotation, "id": number} for number, annotation in enumerate(flat, start=1)]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    path.write_text(json.dumps({"images": images, "annotations": numbered, "categories": categories}))


def write_singles(folder: Path, pool: Pool, rng: np.random.Generator) -> None:
    """Each drawing alone on a texture, in a folder for each class."""
    for name, sprites in pool.items():
        (folder / name.replace("/", "_")).mkdir(parents=True, exist_ok=True)
        for number, sprite in enumerate(sprites):
            background = draw_texture(rng, SPRITE)
            alpha = sprite[..., 3:] / 255.0
            blended = (background * (1 - alpha) + sprite[..., :3] * alpha).astype(np.uint8)
            write_image(folder / name.replace("/", "_") / f"{number}.jpg", blended)


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an RGB image."""
    cv2.imwrite(str(path), image[..., ::-1])


if __name__ == "__main__":
    run(main)
