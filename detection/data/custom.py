"""A user's own dataset in COCO's format: where its images are, and a part of it set aside to evaluate on."""

import json
import math
from pathlib import Path
from typing import Any

import numpy

from detection.data.annotations import MAX_BYTES
from foundation.coco_ids import read_id
from foundation.errors import UserError
from foundation.files import write_atomic
from foundation.json_files import read_json


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
    for folder in folders:
        if (folder / name).is_file():
            return folder
    base = name.replace("\\", "/").rpartition("/")[2]  # tools on Windows write backslashes
    for folder in folders if base != name else ():
        if (folder / base).is_file():
            raise UserError(
                f"{annotations} names its first image {name!r}, which is not there, but {folder / base} is: write "
                f"file_name relative to a folder of images ({base!r})"
            )
    raise UserError(
        f"the images of {annotations} are not beside it ({name} is not there): name their folder with --train-images"
        " (or --test-images)"
    )


def split(annotations: Path, fraction: float, folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Divide a dataset by its images, and write the two parts as `train.json` and `val.json`.

    Args:
        annotations: file in COCO's format.
        fraction: of the images, to evaluate on; in (0, 1).
        folder: for the files; it is made if need be.
        seed: of the choice. The same file, fraction and seed give the same parts.

    Raises:
        UserError: the file cannot be read or is not in the format, has fewer than two images, or the folder cannot be
            written.
    """
    content = read_json(annotations, MAX_BYTES)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not isinstance(content.get("annotations"), list) or len(images) < 2:
        raise UserError(f"{annotations} cannot be split: it must list two images or more, and annotations")
    count = min(len(images) - 1, max(1, math.floor(len(images) * fraction + 0.5)))
    chosen = set(numpy.random.default_rng(seed).permutation(len(images))[:count].tolist())
    held_out = {_image_id(images[index], "id", annotations) for index in chosen}
    parts = []
    for name, wanted in (("train", False), ("val", True)):
        part = {
            **content,
            "images": [image for index, image in enumerate(images) if (index in chosen) is wanted],
            "annotations": [
                each
                for each in content["annotations"]
                if (_image_id(each, "image_id", annotations) in held_out) is wanted
            ],
        }
        path = folder / f"{name}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(part).encode())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
        parts.append(path)
    return parts[0], parts[1]


def _image_id(record: Any, key: str, path: Path) -> int | str:
    try:
        return read_id(record[key])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be split: a record has no usable {key!r} ({error})") from error
