"""COCO results of predicted images: the ids of the images, and the file."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.coco_ids import id_order, read_id
from foundation.errors import UserError
from foundation.json_files import read_json

if TYPE_CHECKING:
    from detection.evaluation.overlays import Classes

MAX_BYTES = 8 * 1024**3  # of a file of annotations


class Results:
    """The records of images, which may come in any order.

    Args:
        files: the images; frames of videos may follow by `append`.
        annotations: a COCO file that lists them, or None to number them from 1.

    Attributes:
        ids: of the images, in their order.
        categories: as the COCO file lists them, if there is one.

    Raises:
        UserError: it is not a COCO file, or an image is not in it.
    """

    def __init__(self, files: Sequence[Path], annotations: Path | None) -> None:
        images: Mapping[str, Any] | None = None
        self.categories: list[dict[str, Any]] | None = None
        if annotations:
            images, self.categories = read_annotations(annotations)
        self.ids = image_ids(files, images)
        self._numbered = images is None
        self._names: list[dict[str, Any]] = [{"file_name": str(file)} for file in files]
        self._records: dict[int, list[dict[str, Any]]] = {}
        self._images: dict[int, dict[str, Any]] = {}

    def append(self, file: Path, frame: int, seconds: float) -> int:
        """One more image, a frame of a video counted from 0; returns its index."""
        self.ids.append(len(self.ids) + 1)
        self._names.append({"file_name": str(file), "frame": frame, "seconds": round(seconds, 3)})
        return len(self.ids) - 1

    def add(self, index: int, size: tuple[int, int], records: list[dict[str, Any]]) -> None:
        """Keep the records of the image with this index among the files; `size` is its width and height."""
        self._records[index] = records
        self._images[index] = {
            **{"id": self.ids[index], **self._names[index]},
            **{"width": size[0], "height": size[1]},
        }

    def write(self, path: Path, classes: "Classes") -> str:
        """Write the records in the order of the files, and which image is which where they are numbered from 1.

        Returns:
            A line that says what was written.

        Raises:
            UserError: the file cannot be written.
        """
        records = [record for index in sorted(self._records) for record in self._records[index]]
        said = f"{path}: {len(records)} results on {len(self._records)} images"
        try:
            path.write_text(json.dumps(records))
            if self._numbered:
                pairs = zip(classes.ids, classes.names, strict=True)
                listing = {
                    "images": [self._images[index] for index in sorted(self._images)],
                    "categories": [{"id": identity, "name": name} for identity, name in pairs],
                }
                names = _names_file(path)
                names.write_text(json.dumps(listing))
                said += f"; their names are in {names}"
        except OSError as error:
            raise UserError(f"{path}: the results cannot be written: {error.strerror or error}") from error
        return said


def check_replaceable(path: Path, numbered: bool) -> None:
    """See that writing results replaces nothing but results.

    Args:
        path: of the results.
        numbered: the images are numbered from 1, and a file beside the results has their names.

    Raises:
        UserError: there is a file with another content.
    """
    beginnings = {path: "["} | ({_names_file(path): '{"images"'} if numbered else {})
    for file, beginning in beginnings.items():
        if not file.is_file():
            continue
        try:
            with file.open(errors="replace") as opened:
                found = opened.read(len(beginning))
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
        if found not in ("", beginning):
            raise UserError(f"{file} does not hold results of predict.py: choose another --json, or remove it")


def _names_file(results: Path) -> Path:
    """Which image is which, beside the results."""
    return results.with_suffix(".images.json")


def read_annotations(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The image ids of a COCO file by file name, and its categories in the order of their ids.

    Other fields of the file are not read, so that it need not be fit for training.

    Raises:
        UserError: it is not a COCO file.
    """
    content = read_json(path, MAX_BYTES)
    try:
        images = {os.path.normpath(str(record["file_name"])): record["id"] for record in content["images"]}
        for identity in images.values():
            read_id(identity)
        categories = [{"id": each["id"], "name": str(each["name"])} for each in content["categories"]]
        return images, sorted(categories, key=lambda each: id_order(each["id"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as COCO annotations: {error!r}") from error


def image_ids(files: Sequence[Path], known: Mapping[str, Any] | None) -> list[Any]:
    """An id for each file: that of the listed name which the file's path ends in, or a running number from 1.

    Raises:
        UserError: a file is not listed, or two files are the same image.
    """
    if known is None:
        return list(range(1, len(files) + 1))
    ids = []
    for file in files:
        parts = file.resolve().parts
        ends = (os.path.abspath(file), *(str(Path(*parts[start:])) for start in range(len(parts))))
        name = next((end for end in ends if end in known), None)
        if name is None:
            raise UserError(f"{file}: --annotations lists no image of that name")
        ids.append(known[name])
    if len(set(ids)) < len(ids):
        raise UserError("--annotations: two of the files are the same image of its list; give each once")
    return ids
