"""Renders the parts of the dataset into a folder, over any number of processes.

Each picture is a function of (seed, part, index) alone, so neither the number of processes nor their order
changes a byte.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from numpy.random import Generator, Philox, SeedSequence
from PIL import Image
from tqdm import tqdm

from foundation.locks import end_with_parent
from shapes.outlines import CLASSES, area
from shapes.polygons import bounding_box, trace
from shapes.recipe import Recipe
from shapes.scene import Scene, compose, random_names

# The order is part of the seeding: a new part goes to the end.
PARTS = ("unlabeled", "objects/train", "objects/val", "scenes/train", "scenes/val")
JPEG_QUALITY = 88
CHUNK = 25  # pictures per task; small enough that the last tasks end together

Task = tuple[str, range]
SceneEntry = dict[str, Any]  # one COCO image, and its annotations still without ids under "annotations"


def counts(recipe: Recipe) -> dict[str, int]:
    """The number of pictures in each part."""
    return {
        "unlabeled": recipe.unlabeled,
        "objects/train": recipe.objects_train * len(CLASSES),
        "objects/val": recipe.objects_val * len(CLASSES),
        "scenes/train": recipe.scenes_train,
        "scenes/val": recipe.scenes_val,
    }


def render(folder: Path, recipe: Recipe, *, seed: int, processes: int, progress: bool) -> None:
    """Write every picture and both annotation files below an existing, empty folder.

    Raises:
        OSError: the folder cannot be written.
    """
    for part in PARTS:
        below = CLASSES if part.startswith("objects") else ("",)
        for name in below:
            (folder / part / name).mkdir(parents=True, exist_ok=True)
    tasks = [
        (part, range(start, min(start + CHUNK, count)))
        for part, count in counts(recipe).items()
        for start in range(0, count, CHUNK)
    ]
    # Scenes cost most: they go first, so that no process is left alone with them at the end.
    tasks.sort(key=lambda task: not task[0].startswith("scenes"))
    scenes: dict[str, list[SceneEntry]] = {part: [] for part in PARTS if part.startswith("scenes")}
    work = partial(_render_task, folder, recipe, seed)
    total = sum(counts(recipe).values())
    terminal = sys.stderr.isatty()
    if progress and not terminal:
        print(f"rendering the embedded dataset, {total} pictures, once", file=sys.stderr)
    with (
        tqdm(total=total, desc="rendering shapes", unit="img", disable=not (progress and terminal)) as bar,
        _mapping(processes) as mapping,
    ):
        for (part, indices), entries in zip(tasks, mapping(work, tasks), strict=True):
            if part in scenes:
                scenes[part] += entries
            bar.update(len(indices))
    (folder / "scenes/annotations").mkdir()
    for part, entries in scenes.items():
        path = folder / f"scenes/annotations/instances_{part.removeprefix('scenes/')}.json"
        path.write_text(json.dumps(_coco(entries, part), separators=(",", ":")))


def generator(seed: int, part: str, index: int) -> Generator:
    """The source of all randomness of one picture."""
    return Generator(Philox(SeedSequence([seed, PARTS.index(part), index])))


@contextmanager
def _mapping(processes: int) -> Iterator[Any]:
    """`map`, over a pool if there is more than one process."""
    if processes == 1:
        yield map
        return
    # Forked where that exists: the workers use only numpy and Pillow, and start with nothing to import.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context(method), initializer=end_with_parent, initargs=(os.getpid(),)
    ) as pool:
        yield pool.map


def _render_task(folder: Path, recipe: Recipe, seed: int, task: Task) -> list[SceneEntry]:
    part, indices = task
    if part.startswith("scenes"):
        return [_render_scene(folder, recipe, part, index, generator(seed, part, index)) for index in indices]
    for index in indices:
        rng = generator(seed, part, index)
        if part == "unlabeled":
            scene, place = _unlabeled(rng, recipe), folder / part
        else:
            name = CLASSES[index % len(CLASSES)]
            scene, place = _single_object(rng, recipe, name), folder / part / name
        _save(scene, place / f"{index:06d}.jpg")
    return []


def _single_object(rng: Generator, recipe: Recipe, name: str) -> Scene:
    side = recipe.object_side
    return compose(rng, (side, side), [name], scale=(0.32, 0.56), clutter=4)


def _unlabeled(rng: Generator, recipe: Recipe) -> Scene:
    """Like the labelled ones, but every fifth picture holds two, somewhat smaller."""
    if rng.random() < 0.8:
        return _single_object(rng, recipe, random_names(rng, 1)[0])
    side = recipe.object_side
    return compose(rng, (side, side), random_names(rng, 2), scale=(0.3, 0.44), clutter=4)


def _render_scene(folder: Path, recipe: Recipe, part: str, index: int, rng: Generator) -> SceneEntry:
    low, high = recipe.scene_sides
    width, height = (int(side) for side in rng.integers(low, high + 1, size=2))
    names = random_names(rng, int(rng.integers(1, recipe.scene_objects + 1)))
    scene = compose(rng, (width, height), names, scale=(0.14, 0.4), clutter=8)
    file_name = f"{index:06d}.jpg"
    _save(scene, folder / part / file_name)
    annotations = []
    for placed in scene.objects:
        parts = trace(placed.coverage)
        annotations.append(
            {
                "category_id": CLASSES.index(placed.name) + 1,
                "segmentation": [points.ravel().tolist() for points in parts],
                "bbox": bounding_box(parts),
                "area": round(sum(area(points) for points in parts), 2),
                "iscrowd": 0,
            }
        )
    return {"file_name": file_name, "width": width, "height": height, "annotations": annotations}


def _save(scene: Scene, path: Path) -> None:
    Image.fromarray(scene.image).save(path, quality=JPEG_QUALITY)


def _coco(entries: list[SceneEntry], part: str) -> dict[str, Any]:
    """A COCO instances file; ids of images and annotations begin with 1 and follow the file names."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for entry in sorted(entries, key=lambda entry: entry["file_name"]):
        images.append({"id": len(images) + 1, **{k: v for k, v in entry.items() if k != "annotations"}})
        for annotation in entry["annotations"]:
            annotations.append({"id": len(annotations) + 1, "image_id": len(images), **annotation})
    return {
        "info": {"description": f"shapes, {part}"},
        "licenses": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
        "images": images,
        "annotations": annotations,
    }
