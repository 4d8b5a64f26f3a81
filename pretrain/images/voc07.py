"""PASCAL VOC 2007 for classification: images with the classes that are present, from the layout of its archives."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foundation.errors import UserError
from pretrain.images.files import FileSource
from pretrain.images.tars import UNLABELED

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
IGNORED = -1  # of `present`: the class is there but hard to see


@dataclass(frozen=True)
class MultiLabelSource(FileSource):
    """Image files in which several classes may be present, so that none has a single label."""

    present: np.ndarray  # (N, C) of 1, 0 and IGNORED


def read_voc07(root: Path, classes: Sequence[str] = CLASSES) -> tuple[MultiLabelSource, MultiLabelSource]:
    """The images of `trainval` and of `test`.

    Args:
        root: the folder `VOC2007`, with `JPEGImages` and `ImageSets/Main/<class>_<split>.txt`. Each line of these has
            an image's name and 1, -1, or 0 where the class is present but hard to see.
        classes: their names.

    Raises:
        UserError: a file is missing, a line is not of that form, or the lists name different images.
    """
    trainval, test = (_read_split(root, split, classes) for split in ("trainval", "test"))
    return trainval, test


def _read_split(root: Path, split: str, classes: Sequence[str]) -> MultiLabelSource:
    columns, names = [], None
    for name in classes:
        path = root / "ImageSets" / "Main" / f"{name}_{split}.txt"
        if not path.is_file():
            raise UserError(
                f"{path} does not exist; --voc07 is the folder VOC2007 of the unpacked trainval and test sets"
            )
        try:
            lines = [words for line in path.read_text().splitlines() if (words := line.split())]
            present = [{1: 1, 0: IGNORED, -1: 0}[int(words[1])] for words in lines]
        except (OSError, IndexError, KeyError, ValueError) as error:
            raise UserError(f"{path}: each line must be an image's name and 1, 0 or -1 ({error!r})") from error
        if names is not None and [words[0] for words in lines] != names:
            raise UserError(f"{path} names different images from the list of {classes[0]}; unpack VOC2007 again")
        names = [words[0] for words in lines]
        columns.append(present)
    images = [root / "JPEGImages" / f"{name}.jpg" for name in names or []]
    absent = [path for path in images if not os.path.isfile(path)]  # False for a name that is too long, too
    if absent or not images:
        raise UserError(
            f"{root}: {len(absent)} of {len(images)} images of {split} are missing, {absent[0] if absent else 'all'}; "
            "unpack VOC2007 again"
        )
    return MultiLabelSource(images, [UNLABELED] * len(images), classes, np.array(columns).T)
