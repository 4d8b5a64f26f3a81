"""What can be wrong with annotations, what a run does with each, and the list of what was found.

Each consequence was read off Detectron2's loader, mapper and evaluators, and the tests run those on the
defect. `error`: the run does not start, or ends at the record. `warning`: data is lost, or learned wrongly.
`note`: as it should be, but good to know.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
from numpy.typing import NDArray

EXAMPLES = 3  # that are shown of each defect


@dataclass(frozen=True)
class Use:
    """What a dataset is for.

    Attributes:
        training: as opposed to evaluation.
        masks: the model has a mask head.
        polygons: it is trained on polygons (`INPUT.MASK_FORMAT polygon`), not on bitmaps.
        keypoints: how many points the model looks for on an object; 0 for none.
        drops_empty: images without objects are left out of training.
        classes: how many the model tells apart.
    """

    training: bool
    masks: bool
    polygons: bool
    keypoints: int
    drops_empty: bool
    classes: int


@dataclass(frozen=True)
class Consequence:
    """How bad it is (`error`, `warning` or `note`), and what happens."""

    level: str
    text: str


@dataclass(frozen=True)
class Defect:
    """Something that records can have, in the plural, with what training and evaluation make of it."""

    what: str
    training: Consequence
    evaluation: Consequence


def _fatal(what: str, text: str = "the run does not start") -> Defect:
    return Defect(what, Consequence("error", text), Consequence("error", text))


def _warning(what: str, training: str, evaluation: str) -> Defect:
    return Defect(what, Consequence("warning", training), Consequence("warning", evaluation))


def _note(what: str, training: str, evaluation: str) -> Defect:
    return Defect(what, Consequence("note", training), Consequence("note", evaluation))


UNREADABLE = _fatal("annotations that cannot be read")
MALFORMED = _fatal("records with a field missing or of a wrong type")
DUPLICATE_IMAGES = _fatal("images with the id of another")
DUPLICATE_ANNOTATIONS = _fatal("annotations with the id of another")
DUPLICATE_CATEGORIES = _fatal("categories with the id of another")
UNKNOWN_IMAGES = _fatal("annotations of an image that is not listed")
UNKNOWN_CATEGORIES = _fatal("annotations of a category that is not listed")
CLASS_COUNT = _fatal("numbers of classes that are not the model's NUM_CLASSES")
IGNORED = _fatal("annotations marked `ignore`, which Detectron2 refuses; COCO's mark is `iscrowd`")
MISSING_FILES = _fatal("images whose file is not there")
MISSING_LABELS = _fatal("images whose file of labels is not there")
LABEL_SIZES = _fatal("labels of another size than their image", "the run ends when it comes to one")
UNREADABLE_FILES = _fatal("files that are no image", "the run ends when it comes to one")
WRONG_SIZES = _fatal(
    "images of another size than annotated", "the run ends when it comes to one (Detectron2's SizeMismatchError)"
)
NO_MASKS = _fatal("objects without a mask", "the run does not start, since the model has a mask head")
CODED_MASKS = Defect(
    "objects whose mask is a run-length code",
    Consequence("error", "the run does not start; set INPUT.MASK_FORMAT bitmask"),
    Consequence("note", "evaluated like any other"),
)
CODE_SIZES = Defect(
    "run-length codes of another size than their image",
    Consequence("error", "the run ends when it comes to one"),
    Consequence("warning", "an object that no mask can match"),
)
WRONG_KEYPOINTS = _fatal("objects without x, y and visibility of each of the model's keypoints")
NOTHING_LEFT = _fatal("datasets without an image that has objects")
REPEATED_FILES = _warning("files listed as several images", "seen as often as listed", "counted as often as listed")
EMPTY_BOXES = _warning(
    "boxes without width or height", "the object is left out", "an object that no detection can match"
)
OUTSIDE_BOXES = _warning(
    "boxes wholly outside their image", "the object is left out", "an object that no detection can match"
)
PROTRUDING_BOXES = _warning(
    "boxes that reach out of their image", "clipped to the image", "taken as they are, which costs overlap"
)
SHORT_POLYGONS = _warning(
    "objects whose polygons all have fewer than 3 points",
    "the object is left out, its box too",
    "an object that no mask can match",
)
SOME_SHORT_POLYGONS = _warning(
    "objects with a polygon of fewer than 3 points beside others", "the polygon is left out", "the polygon is left out"
)
FLAT_POLYGONS = _warning(
    "objects whose polygons enclose nothing",
    "kept: their box teaches the mask head an empty mask",
    "an object that no mask can match",
)
ABSENT_CLASSES = _warning("classes without an object", "never learned", "no AP; left out of the mean")
OTHER_CLASSES = _fatal("classes that differ from those of the training set")
SHARED_FILES = _warning(
    "images that are in training and in evaluation", "seen in training", "their AP is too high: they were trained on"
)
CROWDS = _note(
    "annotations of crowds (iscrowd 1)", "left out", "detections on them count neither as right nor as wrong"
)
DIFFICULT = _note("objects marked difficult", "used like any other", "detections on them count neither way")
EMPTY_IMAGES = _note(
    "images without objects", "left out (DATALOADER.FILTER_EMPTY_ANNOTATIONS)", "each detection is false"
)
BACKGROUND_IMAGES = _note("images without objects", "used as background", "each detection is false")
FEW_KEYPOINTS = _note("images without a visible keypoint", "left out", "no keypoint to find")


@dataclass(frozen=True)
class Found:
    """A defect, how many records have it, and the first of them in words."""

    defect: Defect
    count: int
    examples: tuple[str, ...]


@dataclass
class Findings:
    """What was found in a dataset, in the order in which it was looked for."""

    found: list[Found] = field(default_factory=list)

    def add(self, defect: Defect, records: Sequence[Any] | NDArray[Any], name: Callable[[Any], str] = str) -> None:
        """Note the records that have a defect; `name` puts one into words. None is no finding."""
        if len(records):
            self.found.append(Found(defect, len(records), tuple(name(each) for each in records[:EXAMPLES])))

    def __iter__(self) -> Iterator[Found]:
        return iter(self.found)


@dataclass(frozen=True)
class Picture:
    """A listed image: its path below the folder of images, and its size in pixels, 0 where none is annotated."""

    file_name: str
    width: int
    height: int


@dataclass(frozen=True)
class Content:
    """A dataset as all formats come down to, with what could be read of it.

    Attributes:
        owners: (A,) of the A objects, the index of the image.
        boxes: (A, 4) left, top, right, bottom in pixels.
        classes: (A,) index of the class; -1 of none.
        crowds: (A,) whether it is a crowd.
        labels: what to call each object.
        names: of the classes, in the order of the model.
    """

    pictures: Sequence[Picture]
    owners: NDArray[numpy.int64]
    boxes: NDArray[numpy.float64]
    classes: NDArray[numpy.int64]
    crowds: NDArray[numpy.bool_]
    labels: Sequence[str]
    names: Sequence[str]

    def label(self, index: int) -> str:
        """An object in words: what it is called, and the image that it is in."""
        return f"{self.labels[index]} in {self.pictures[self.owners[index]].file_name}"
