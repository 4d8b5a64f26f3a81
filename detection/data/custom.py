"""A user's own dataset in COCO's format: where its images are, and a part of it set aside to evaluate on."""

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from detection.data.annotations import MAX_BYTES, read_annotations, refuse_problems
from foundation.coco_ids import read_id
from foundation.errors import UserError
from foundation.files import write_shared
from foundation.json_files import read_json
from foundation.names import counted

MOST_SHOWN = 100  # characters of a name
CLASSES_SHOWN = 5  # in a warning
MOST_TRIED = 100  # images that are looked for, because the first ones may be missing


def find_images(annotations: Path) -> Path:
    """The folder of the images that a file of annotations lists, where the usual layouts have it.

    That is the folder of the file, the one above, or one in them called `images`, or as the file, or as the last part
    of its name (`instances_train.json`: `train`).

    Raises:
        UserError: the file cannot be read, or the images are in none of these.
    """
    content = read_json(annotations, MAX_BYTES)
    try:
        name = str(content["images"][0]["file_name"])
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{annotations} is not in COCO's format: it lists no images") from error
    parents = (annotations.parent, annotations.parent.parent)
    names = ("", "images", annotations.stem, annotations.stem.rpartition("_")[2])
    folders = [parent / each for parent in parents for each in names]
    more = [each for each in content["images"][1:MOST_TRIED] if isinstance(each, dict) and "file_name" in each]
    listed = [name, *(str(each["file_name"]) for each in more)]
    for one, folder in itertools.product(listed, folders):
        if os.path.isfile(folder / one):  # False for a name that is too long, such as a URL
            return folder
    base = name.replace("\\", "/").rpartition("/")[2]  # tools on Windows write backslashes
    slash = ", with / instead of a backslash between folders" if "\\" in name else ""
    for folder in folders if base != name else ():
        if os.path.isfile(folder / base):
            raise UserError(
                f"{annotations} names its first image {name!r}, which is not there, but {folder / base} is: write "
                f"file_name relative to a folder of images, {base!r}{slash}"
            )
    others = f", nor another of the first {len(listed)}" if more else ""
    shown = name if len(name) <= MOST_SHOWN else f"{name[:MOST_SHOWN]}..."
    raise UserError(
        f"the images of {annotations} are not beside it ({shown} is not there{others}): name their folder with"
        " --train-images (or --test-images)"
    )


def resolve(folder: Path, name: str) -> str:
    """The path of an image's file without links, by which images with the same file are recognised."""
    path = os.path.join(folder, name)
    return path if "\0" in path else os.path.realpath(path)


class Parts(NamedTuple):
    """A dataset divided by its images, in COCO's format."""

    train: dict[str, Any]
    val: dict[str, Any]


def divide(annotations: Path, folder: Path, fraction: float, seed: int = 0, by_file: bool = True) -> Parts:
    """Divide a dataset by its images. Images with the same file, as merged exports list them, come into one part.

    Args:
        annotations: file in COCO's format.
        folder: of its images.
        fraction: of the image files, to evaluate on; in (0, 1).
        seed: of the choice. The same files, fraction and seed give the same parts.
        by_file: False divides by the records of the images, as earlier versions did. The parts differ only where
            several records have the same file.

    Raises:
        UserError: the file cannot be read or is not in the format, has a record that cannot be used, no list of
            annotations, or fewer than two images.
    """
    # Of the whole file: images with one id could come into different parts, and messages number its records.
    refuse_problems(read_annotations(annotations))
    content = read_json(annotations, MAX_BYTES)
    images = content["images"]
    files: dict[Any, list[int | str]] = {}
    for index, image in enumerate(images):
        files.setdefault(resolve(folder, str(image["file_name"])) if by_file else index, []).append(
            read_id(image["id"])
        )
    if "annotations" not in content:  # which the reader allows, because COCO's test sets have none
        raise UserError(f"{annotations} has nothing to train on: there is no list 'annotations'")
    if len(files) < 2:
        raise UserError(
            f"{annotations} cannot be split: it must list two image files or more; add images, or name a file to"
            " evaluate on with --test-json"
        )
    count = min(len(files) - 1, max(1, math.floor(len(files) * fraction + 0.5)))
    together = list(files.values())
    chosen = numpy.random.default_rng(seed).permutation(len(files))[:count].tolist()
    held_out = {identity for index in chosen for identity in together[index]}
    return Parts(*(
        {
            **content,
            "images": [each for each in images if (read_id(each["id"]) in held_out) is wanted],
            "annotations": [
                each for each in content["annotations"] if (read_id(each["image_id"]) in held_out) is wanted
            ],
        }
        for wanted in (False, True)
    ))  # fmt: skip


def describe_absent(parts: Parts) -> list[str]:
    """A warning that names the classes with objects in one part only: they are not learned, or not measured. None where
    both parts have objects of all classes that have any. Crowds are no objects.
    """
    names = {read_id(each["id"]): str(each["name"]) for each in parts.train["categories"]}
    train, val = (
        {read_id(each["category_id"]) for each in part["annotations"] if not float(each.get("iscrowd") or 0)}
        for part in parts
    )
    said = []
    for absent, use in ((val - train, "train"), (train - val, "evaluate")):
        listed = [name for identity, name in names.items() if identity in absent]
        if listed:
            shown = ", ".join([*listed[:CLASSES_SHOWN], *["..."] * (len(listed) > CLASSES_SHOWN)])
            said.append(f"{len(listed)} of {counted(len(names), 'class')} in the part to {use} on ({shown})")
    if not said:
        return []
    return [
        f"the split leaves without an object {' and '.join(said)}: name two files, --train-json and --test-json, or"
        " change --val-fraction"
    ]


def part_files(folder: Path) -> tuple[Path, Path]:
    """Where the parts of a dataset are written."""
    return folder / "train.json", folder / "val.json"


def write_parts(parts: Parts, folder: Path) -> None:
    """Write both parts into a folder, which is made if need be. Each machine of a run does so, at the same time.

    Raises:
        UserError: the folder cannot be written.
    """
    for path, part in zip(part_files(folder), parts, strict=True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_shared(path, json.dumps(part).encode())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def are_written(parts: Parts, folder: Path) -> bool:
    """Whether the files in a folder hold these parts.

    Raises:
        UserError: a file cannot be read.
    """
    for path, part in zip(part_files(folder), parts, strict=True):
        content = read_json(path, MAX_BYTES)
        if not isinstance(content, dict):
            return False
        keys = ("images", "annotations", "categories")
        # As text: NaN, which other tools write for what is missing, does not equal itself.
        if any(json.dumps(content.get(key)) != json.dumps(part[key]) for key in keys):
            return False
    return True
