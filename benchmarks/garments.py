"""Scenes of photographed garments on wallpapers, in COCO's format: pictures that this project has not drawn.

    python benchmarks/garments.py OUT --wallpapers FOLDER... [--fashion FOLDER] [--size 128] [--unlabelled 6000] ...

The garments are Fashion-MNIST's (the Debian package dataset-fashion-mnist, or `--fashion`), enlarged, turned a little
and tinted; the backgrounds are crops of any pictures below the given folders (the Debian packages gnome-backgrounds and
plasma-workspace-wallpapers, unpacked). Training scenes take the 60,000 training garments and three quarters of the
wallpapers, validation scenes the 10,000 test garments and the others: neither a garment nor a wallpaper is in both.

OUT gets `unlabelled/`, `train/` and `val/` with their scenes, `train.json` and `val.json`, and `folder/train` and
`folder/val` with a folder of single garments for each class, for probes. The same arguments give the same files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from clipart import MOST_OBJECTS, OBJECT_SHARE, add_scene_options, write_coco
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from foundation.errors import ArgumentParser, UserError, run
from pretrain.images.sources import build_source
from shapes.polygons import bounding_box, trace

Pixels = NDArray[np.float32]  # (H, W, 3), or (H, W) of a mask in [0, 1]

SMALLEST_AREA = 60.0  # square pixels that must be visible of an object, else it is not annotated
TURN = 20.0  # degrees, either way
DARK = 12  # of 255: below, a pixel of Fashion-MNIST is background
SHORTEST_SIDE = 480  # pixels of a wallpaper that is taken
WALLPAPER_SIDE = 1024  # pixels, the longer side that wallpapers are reduced to
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Pool(NamedTuple):
    """What scenes of one part are made of."""

    garments: list[list[NDArray[np.uint8]]]  # by class, 28 x 28 each
    wallpapers: list[NDArray[np.uint8]]  # (H, W, 3)


class Drawn(NamedTuple):
    """A scene and what is annotated in it."""

    image: NDArray[np.uint8]
    annotations: list[dict[str, Any]]  # COCO's keys, without numbers of their own and of the image


def main(argv: Sequence[str] | None = None) -> None:
    """Write the set."""
    args = build_parser().parse_args(argv)
    train, val, classes = load_pools(args.fashion, args.wallpapers)
    print(f"{len(train.wallpapers)} wallpapers to train on, {len(val.wallpapers)} held out")
    write_scenes(args.out, "unlabelled", train, args.unlabelled, args.size, seed=5)
    for part, pool, count, seed in (("train", train, args.train, 100), ("val", val, args.val, 101)):
        annotated = write_scenes(args.out, part, pool, count, args.size, seed)
        write_coco(args.out / f"{part}.json", annotated, args.size, classes)
    write_singles(args.out / "folder" / "train", train, args.singles_train, args.size, classes, seed=200)
    write_singles(args.out / "folder" / "val", val, args.singles_val, args.size, classes, seed=201)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, help="folder of the set")
    add("--wallpapers", type=Path, nargs="+", required=True, help="folders with pictures, searched to any depth")
    add("--fashion", default="", help="folder of Fashion-MNIST's four files; where it is left out, as in pretraining")
    add_scene_options(parser)
    add("--singles-train", type=int, default=150, help="pictures of each class (%(default)s)")
    add("--singles-val", type=int, default=60, help="pictures of each class (%(default)s)")
    return parser


def load_pools(fashion: str, folders: Sequence[Path]) -> tuple[Pool, Pool, list[str]]:
    """Garments and wallpapers to train on, those held out, and the names of the classes.

    Raises:
        UserError: there are fewer than four wallpapers, of which a quarter is held out, or no Fashion-MNIST.
    """
    papers = find_wallpapers(folders)
    if len(papers) < 4:
        places = ", ".join(map(str, folders))
        raise UserError(
            f"--wallpapers: {len(papers)} usable pictures below {places}; at least 4 are needed, "
            f"{SHORTEST_SIDE} pixels or more on each side"
        )
    order = np.random.default_rng(7).permutation(len(papers))
    held_out = set(order[: len(papers) // 4].tolist())
    images = [read_wallpaper(path) for path in papers]
    pools, names = [], []
    for split, wanted in (("train", False), ("val", True)):
        source = build_source("fashion_mnist", fashion, split)
        names = [name.replace("/", " or ") for name in source.classes]
        garments: list[list[NDArray[np.uint8]]] = [[] for _ in names]
        for index, label in enumerate(source.labels):
            image = np.asarray(source.open(index).decode())
            garments[label].append(image if image.ndim == 2 else image[..., 0])
        pools.append(Pool(garments, [image for i, image in enumerate(images) if (i in held_out) == wanted]))
    return pools[0], pools[1], names


def find_wallpapers(folders: Sequence[Path]) -> list[Path]:
    """One file for each wallpaper: the smallest that is large enough of those that show it in other sizes or lights.

    Files that cannot be opened are left out.
    """
    chosen: dict[str, tuple[int, Path]] = {}
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file() or "screenshot" in path.name:
            continue
        try:
            with Image.open(path) as image:
                width, height = image.size
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        if min(width, height) < SHORTEST_SIDE:
            continue
        # plasma: NAME/contents/images/SIZE.jpg; gnome: NAME-d.webp and NAME-l.webp, dark and light
        nested = path.parent.name.startswith("images")
        name = path.parent.parent.parent.name if nested else path.stem.removesuffix("-d").removesuffix("-l")
        if name not in chosen or width * height < chosen[name][0]:
            chosen[name] = (width * height, path)
    return [path for _, (_, path) in sorted(chosen.items())]


def read_wallpaper(path: Path) -> NDArray[np.uint8]:
    """The picture, reduced."""
    with Image.open(path) as image:
        image.draft("RGB", (WALLPAPER_SIDE, WALLPAPER_SIDE))
        reduced = image.convert("RGB")
        reduced.thumbnail((WALLPAPER_SIDE, WALLPAPER_SIDE))
        return np.asarray(reduced)


def draw_scene(rng: np.random.Generator, pool: Pool, size: int) -> Drawn:
    """A scene of one to four garments, each of a class drawn evenly, that may cover one another."""
    image = draw_background(rng, pool, size)
    visible: list[Pixels] = []
    labels = []
    for _ in range(int(rng.integers(1, MOST_OBJECTS + 1))):
        label = int(rng.integers(len(pool.garments)))
        side = int(rng.uniform(*OBJECT_SHARE) * size)
        top, left = (int(v) for v in rng.integers(0, size - side + 1, 2))
        cover = paste(rng, image, pool.garments[label], side, top, left)
        visible = [other * (1 - cover) for other in visible]
        visible.append(cover)
        labels.append(label)
    annotations = []
    for label, mask in zip(labels, visible, strict=True):
        area = float((mask > 0.5).sum())
        parts = trace(mask) if area >= SMALLEST_AREA else []
        if parts:
            annotations.append(
                {
                    "category_id": label + 1,
                    "bbox": bounding_box(parts),
                    "area": area,
                    "iscrowd": 0,
                    "segmentation": [part.reshape(-1).tolist() for part in parts],
                }
            )
    return Drawn(np.clip(image, 0, 255).astype(np.uint8), annotations)


def draw_background(rng: np.random.Generator, pool: Pool, size: int) -> Pixels:
    """A square crop of a wallpaper, from as many pixels as the scene has to the whole of the shorter side."""
    paper = pool.wallpapers[int(rng.integers(len(pool.wallpapers)))]
    shorter = min(paper.shape[:2])
    side = int(rng.uniform(min(size, shorter), shorter))
    top, left = int(rng.integers(paper.shape[0] - side + 1)), int(rng.integers(paper.shape[1] - side + 1))
    crop = Image.fromarray(paper[top : top + side, left : left + side]).resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(crop).astype(np.float32)


def paste(
    rng: np.random.Generator, image: Pixels, garments: Sequence[NDArray[np.uint8]], side: int, top: int, left: int
) -> Pixels:
    """Put one of the garments on the image, which is written to. Returns the share of each pixel that it covers."""
    garment = garments[int(rng.integers(len(garments)))]
    mask = outline(garment)
    turn, flipped = float(rng.uniform(-TURN, TURN)), bool(rng.random() < 0.5)
    colour = rng.uniform(40, 255, 3).astype(np.float32)
    shade, alpha = (enlarge(layer, side, turn, flipped) for layer in (garment, mask))
    cover = np.zeros(image.shape[:2], np.float32)
    cover[top : top + side, left : left + side] = alpha
    tinted = (0.2 + 0.8 * shade[..., None]) * colour
    window = image[top : top + side, left : left + side]
    window += alpha[..., None] * (tinted - window)
    return cover


def outline(garment: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """255 where the garment is, its dark insides as well; the background is what is dark and reaches the border."""
    padded = Image.fromarray(np.pad((garment >= DARK).astype(np.uint8), 1)).copy()  # to be written to
    ImageDraw.floodfill(padded, (0, 0), 2)
    return np.where(np.asarray(padded)[1:-1, 1:-1] == 2, 0, 255).astype(np.uint8)


def enlarge(layer: NDArray[np.uint8], side: int, turn: float, flipped: bool) -> Pixels:
    """The layer at another size, turned by degrees, in [0, 1]."""
    image = Image.fromarray(layer).resize((side, side), Image.Resampling.BICUBIC)
    image = image.rotate(turn, Image.Resampling.BILINEAR)
    if flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image).astype(np.float32) / 255


def write_scenes(out: Path, part: str, pool: Pool, count: int, size: int, seed: int) -> list[list[dict[str, Any]]]:
    """Write scenes to `out/part`. Returns the annotations of each."""
    folder = out / part
    folder.mkdir(parents=True, exist_ok=True)
    rng, annotated = np.random.default_rng(seed), []
    for number in range(count):
        scene = draw_scene(rng, pool, size)
        Image.fromarray(scene.image).save(folder / f"{number:06d}.jpg", quality=92)
        annotated.append(scene.annotations)
    return annotated


def write_singles(folder: Path, pool: Pool, count: int, size: int, classes: Sequence[str], seed: int) -> None:
    """Pictures of single garments that fill them, in a folder for each class."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = draw_background(rng, pool, size)
            paste(rng, image, pool.garments[label], size, 0, 0)
            pixels = np.clip(image, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:05d}.jpg", quality=92)


if __name__ == "__main__":
    run(main)
