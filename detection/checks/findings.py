"""What can be wrong with a dataset, what a run does with it, and the list of what was found.

Levels: `error`: the run does not start. `warning`: data is lost, or learned wrongly. `note`: correct, but useful to
know. The consequences are those of the loader, the mapper and the evaluators, which the tests run on the defects.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from foundation.errors import UserError

EXAMPLES = 3  # shown of each defect


@dataclass(frozen=True)
class Consequence:
    """How bad a defect is (`error`, `warning` or `note`), and what happens or what to do."""

    level: str
    text: str


@dataclass(frozen=True)
class Defect:
    """Something that records can have, in the plural, with its consequences for training and for evaluation."""

    what: str
    training: Consequence
    evaluation: Consequence


def _fatal(what: str, advice: str) -> Defect:
    return Defect(what, Consequence("error", advice), Consequence("error", advice))


def _warning(what: str, training: str, evaluation: str) -> Defect:
    return Defect(what, Consequence("warning", training), Consequence("warning", evaluation))


def _note(what: str, training: str, evaluation: str) -> Defect:
    return Defect(what, Consequence("note", training), Consequence("note", evaluation))


CORRECT = "correct or remove them"

UNSUPPORTED = _fatal("unsupported kind of dataset", "choose another dataset, or another model")
MISSING_PARTS = _fatal("missing files or folders", "add them, or correct the path")
MISSING_OWN = Defect(
    MISSING_PARTS.what,
    Consequence(
        "error",
        "correct --train-json and --train-images; if the run or its data was moved, put a link at the old place",
    ),
    Consequence("error", "name the file with --test-json and the folder of its images with --test-images"),
)  # of a user's own dataset
UNREADABLE = _fatal("annotations that cannot be read", "correct or replace the file")
MALFORMED = _fatal("records with a missing or unusable value", CORRECT)
DUPLICATE_IMAGES = _fatal("images with the id of another", "give each image its own id")
DUPLICATE_ANNOTATIONS = _fatal("annotations with the id of another", "give each annotation its own id")
DUPLICATE_CATEGORIES = _fatal(
    "categories with the id or the name of another", "keep the one of each that annotations name"
)
UNKNOWN_IMAGES = _fatal("annotations of an image that is not listed", CORRECT)
UNKNOWN_CATEGORIES = _fatal("objects of a class that is not listed", CORRECT)
NO_IMAGES = _fatal("datasets without an image", "list at least one image")
NO_CLASSES = _fatal("datasets without a class", "list at least one category")
CLASS_COUNT = _fatal("number of classes that is not the model's", "set the key to the dataset's number of classes")
OTHER_CLASSES = _fatal("classes that differ from those of the training set", "name the classes alike")
REGISTERED_CLASSES = _fatal(
    "classes that differ from those that Detectron2 has for a dataset of this name",
    "name your own data with --train-json, --train-images, --test-json and --test-images",
)
IGNORED = _fatal("annotations marked `ignore`", "remove them, or mark crowds with iscrowd 1")
CONVERTED_LVIS = _fatal("values that LVIS's own tools do not read", "write them as LVIS's format has them")
MISSING_FILES = _fatal(
    "images whose file is missing", "add the files, correct file_name, or remove the images from the annotations"
)
MISSING_LABELS = _fatal("images whose file of labels is missing", "add the files, or remove the images from the list")
UNKNOWN_FILES = _fatal("files that Detectron2's reader would stop at", "remove them")
LABEL_SIZES = _fatal("labels of another size than their image", CORRECT)
WRONG_LABELS = _fatal("files of labels with a value that is not a class", CORRECT)
UNREADABLE_FILES = _fatal("image files that cannot be read", "replace the files, or remove the images from the list")
WRONG_SIZES = _fatal(
    "images of another size than annotated",
    "correct width and height in the annotations; where the two are exchanged, boxes and masks too may be of the image"
    " before it is turned as the camera noted (EXIF), which every reader here does",
)
STRIPS = _fatal(
    "images so long that resizing leaves nothing of the shorter side", "cut them, or remove them from the annotations"
)
DAMAGED_FILES = Defect(
    "image files that are damaged",
    Consequence("error", "training stops at one; replace the files, or remove the images from the list"),
    Consequence("error", "replace the files, or remove the images from the list"),
)
NO_MASKS = Defect(
    "objects without a mask",
    Consequence("error", "set MODEL.MASK_ON False to learn boxes only, or add polygons, or remove the annotations"),
    Consequence("error", "set MODEL.MASK_ON False to evaluate boxes only, or add polygons, or remove the annotations"),
)
CODED_MASKS = Defect(
    "objects whose mask is a run-length code",
    Consequence("error", "set INPUT.MASK_FORMAT bitmask"),
    Consequence("note", "evaluated like any other"),
)
CODE_SIZES = _fatal("run-length codes of another size than their image", CORRECT)
HAS_NO_MASKS = _fatal("datasets that have boxes only", "set MODEL.MASK_ON False")
HAS_NO_KEYPOINTS = _fatal("datasets without keypoints", "set MODEL.KEYPOINT_ON False")
KEYPOINT_COUNT = _fatal(
    "number of keypoints that is not the model's",
    "set MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, and as many numbers in TEST.KEYPOINT_OKS_SIGMAS",
)
TOLERANCES = _fatal("number of keypoints that is not the evaluation's", "give the key a number for each keypoint")
NO_KEYPOINTS = _fatal(
    "datasets without an image that has enough visible keypoints", "annotate keypoints with a visibility of 1 or 2"
)
WRONG_KEYPOINTS = _fatal("objects without x, y and visibility of each keypoint", CORRECT)
NOTHING_LEFT = _fatal(
    "datasets without an image that has objects",
    "annotate at least one object with iscrowd 0, which is not a crowd, and with a box and polygons that can be used",
)
NOT_ANNOTATED = Defect(
    "datasets without annotations",
    Consequence("error", "name annotated images for training"),
    Consequence("note", "the results are written, and not evaluated"),
)
REPEATED_FILES = _warning(
    "files listed as several images",
    "seen as often as listed; a random split (--val-fraction) keeps these images in one part",
    "counted as often as listed",
)
FRACTIONAL_BOXES = _fatal(
    "datasets whose boxes are fractions of the image", "write bbox as left, top, width and height in pixels"
)
CORNER_BOXES = _fatal(
    "datasets whose boxes are two corners", "write bbox as left, top, width and height, not left, top, right and bottom"
)
EMPTY_BOXES = _warning(
    "boxes without width or height", "the object is left out", "an object that no detection can match"
)
OUTSIDE_BOXES = _warning(
    "boxes wholly outside their image", "the object is left out", "an object that no detection can match"
)
PROTRUDING_BOXES = _warning(
    "boxes that reach out of their image", "clipped to the image", "not clipped, which lowers the IoU"
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
    "objects whose polygons enclose no area",
    "kept: their box teaches the mask head an empty mask",
    "an object that no mask can match",
)
ABSENT_CLASSES = _warning("classes without an object", "never learned", "no AP; left out of the mean")
SHARED_FILES = _warning(
    "images that are in training and in evaluation", "seen in training", "their AP is too high: they were trained on"
)
CROWDS = _note(
    "annotations of crowds (iscrowd 1)", "left out", "detections on them count neither as right nor as wrong"
)
MANY_CROWDS = _warning(
    "annotations of crowds (iscrowd 1), a fifth of all or more",
    "left out; set iscrowd 0 where an annotation is of one object",
    "detections on them count neither as right nor as wrong; set iscrowd 0 where an annotation is of one object",
)
DIFFICULT = _note(
    "objects marked difficult", "used like any other", "detections on them count neither as right nor as wrong"
)
CONVERTED = _note("values that were converted", "used as converted", "used as converted")
EMPTY_IMAGES = _note(
    "images without objects", "left out (DATALOADER.FILTER_EMPTY_ANNOTATIONS)", "each detection is false"
)
BACKGROUND_IMAGES = _note("images without objects", "used as background", "each detection is false")
FEW_KEYPOINTS = _note("images with too few visible keypoints", "left out", "no keypoint to find")
# Of these objects training or evaluation loses the whole or a part, and nothing in a run shows it.
LOST_OBJECTS = (EMPTY_BOXES, OUTSIDE_BOXES, SHORT_POLYGONS, SOME_SHORT_POLYGONS, MANY_CROWDS)


@dataclass(frozen=True)
class Found:
    """A defect, how many records have it, and the first of them in words."""

    defect: Defect
    count: int
    examples: tuple[str, ...]

    @property
    def text(self) -> str:
        """The defect and its examples."""
        more = f", and {self.count - len(self.examples):,} more" if self.count > len(self.examples) else ""
        return f"{self.defect.what}: {', '.join(self.examples)}{more}"


@dataclass
class Findings:
    """What was found in one dataset, in the order of the checks.

    Attributes:
        training: the dataset is trained on, not evaluated on.
        decode: image files are to be decoded, not only their headers read.
        found: the findings.
    """

    training: bool
    decode: bool = False
    found: list[Found] = field(default_factory=list)

    def add(self, defect: Defect, records: Sequence[Any] | NDArray[Any], name: Callable[[Any], str] = str) -> None:
        """Note the records that have a defect; `name` describes one. No records are no finding."""
        if len(records):
            self.note(Found(defect, len(records), tuple(name(each) for each in records[:EXAMPLES])))

    def note(self, found: Found) -> None:
        """Keep a finding."""
        self.found.append(found)

    def consequence(self, found: Found) -> Consequence:
        """What the finding means for this use of the dataset."""
        return found.defect.training if self.training else found.defect.evaluation

    def __iter__(self) -> Iterator[Found]:
        return iter(self.found)


@dataclass
class FatalFindings(Findings):
    """Stops at the first finding that would stop a run.

    Attributes:
        source: the dataset or its file, for the message.
    """

    source: str = ""

    def note(self, found: Found) -> None:
        """Keep a finding.

        Raises:
            UserError: it would stop a run.
        """
        consequence = self.consequence(found)
        if consequence.level == "error":
            count = f"{found.count:,} " if found.count > 1 else ""
            raise UserError(f"{self.source}: {count}{found.text}; {consequence.text}")
        super().note(found)


@dataclass(frozen=True)
class ListedImage:
    """An image of a dataset: its path below the folder of images, and its annotated size in pixels, 0 where none is."""

    file_name: str
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Content:
    """A dataset in the form that the checks of all formats share.

    Attributes:
        folder: that the images' names are relative to.
        images: as listed.
        owners: (A,) of the A objects, the index of the image.
        boxes: (A, 4) left, top, right, bottom in pixels.
        classes: (A,) index of the class; -1 of none.
        crowds: (A,) whether it is a crowd.
        labels: what to call each object.
        names: of the classes, in the order of the model.
        dropped: indices of objects that the reader leaves out.
    """

    folder: Path
    images: Sequence[ListedImage]
    owners: NDArray[numpy.int64]
    boxes: NDArray[numpy.float64]
    classes: NDArray[numpy.int64]
    crowds: NDArray[numpy.bool_]
    labels: Sequence[str]
    names: Sequence[str]
    dropped: Sequence[int] = ()

    def label(self, index: int) -> str:
        """An object in words: what it is called, and the image that it is in."""
        return f"{self.labels[index]} in {self.images[self.owners[index]].file_name}"
