"""Annotations in COCO's format: the one reader, used by training, by evaluation and by the checks.

What can mean only one thing is converted: numbers given as text, whole numbers given as floats, polygons given as
points, numbers as names. What cannot is a `Problem` that names the record and the key. `docs/data.md` has the table.
"""

import contextlib
import functools
import gc
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from detection.data.masks import mask_area, read_mask, read_number, read_whole
from foundation.coco_ids import id_order, read_id
from foundation.errors import UserError
from foundation.images import MAX_PIXELS
from foundation.json_files import read_json

MAX_BYTES = 16 * 1024**3  # of a file of annotations; COCO's largest has 0.5 GB
NUMBERS = (int, float)
COMPUTED_AREAS = "areas that are not a positive number"

Record = dict[str, Any]


class Fault(Enum):
    """What can be wrong with a record."""

    VALUE = "a value that is missing or cannot be used"
    MASK = "a mask that cannot be used"
    MASK_SIZE = "a run-length code of another size than the image"
    KEYPOINTS = "keypoints that cannot be used"
    IGNORED = "marked `ignore`"
    DUPLICATE_IMAGE = "an image with the id of another"
    DUPLICATE_ANNOTATION = "an annotation with the id of another"
    DUPLICATE_CATEGORY = "a category with the id or the name of another"
    UNKNOWN_IMAGE = "an annotation of an image that is not listed"
    UNKNOWN_CATEGORY = "an annotation of a category that is not listed"


# Whether these matter depends on what the model learns: the record is used, without its mask or its keypoints.
PARTIAL = (Fault.MASK, Fault.MASK_SIZE, Fault.KEYPOINTS)


class Problem(NamedTuple):
    """A record that cannot be used as it is, or not in all its parts."""

    fault: Fault
    text: str  # the record, the key, the value and what it must be


@dataclass
class Annotations:
    """The content of a file in COCO's format, in one form.

    Attributes:
        path: of the file.
        images: `id`, `file_name`, `width` and `height`, in the order of the file.
        annotations: `id`, `image_id`, `category_id`, `bbox` (x, y, width, height), `iscrowd` and `area`; where there
            are any, `segmentation` (`masks.Mask.regions`), `dropped_polygons` (`masks.Mask.dropped`), `broken_mask`
            (it cannot be used) and `keypoints` with `num_keypoints`; in the order of the file.
        categories: `id`, `name`, where there are any `keypoints` and `skeleton`; in the order of the model's classes,
            which is that of their ids.
        annotated: whether the file has a list of annotations. COCO's test sets have none.
        problems: records that are left out or incomplete.
        converted: how many values of each kind were converted.
    """

    path: Path
    images: list[Record] = field(default_factory=list)
    annotations: list[Record] = field(default_factory=list)
    categories: list[Record] = field(default_factory=list)
    annotated: bool = True
    problems: list[Problem] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Without Python's garbage collector, which would look through millions of new objects again and again: half of the
    time of reading COCO.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_annotations(path: Path, lvis: bool = False) -> Annotations:
    """Read a file in COCO's format.

    Args:
        path: of the file.
        lvis: LVIS's variant: images are named by their URL in COCO, and more fields are required.

    Raises:
        UserError: it cannot be read, is not JSON or has no lists of images and categories. Records with mistakes are
            no error here but `problems`.
    """
    with collector_paused():
        content = read_json(path, MAX_BYTES, object_hook=_compact)
        if not isinstance(content, dict):
            raise UserError(
                f"{path} is not in COCO's format: it must be an object with images, annotations and categories"
            )
        for key in ("images", "annotations", "categories"):
            if not isinstance(content.get(key, [] if key == "annotations" else None), list):
                raise UserError(f"{path} is not in COCO's format: there is no list {key!r}")
        return _Reader(path, lvis).read(content)


def read_categories(path: Path) -> list[str]:
    """Names of the classes of a file in COCO's format, in the order of the model's classes: by their ids.

    Raises:
        UserError: the file is missing, not in the format, or a category cannot be used.
    """
    return [each["name"] for each in category_records(path)]


def category_records(path: Path) -> Sequence[Mapping[str, Any]]:
    """The categories of a file, as `Annotations` has them. The file is read once as long as it does not change.

    Raises:
        UserError: the file is missing, not in the format, or a category cannot be used.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return _category_records(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _category_records(path: Path, modified: int, size: int) -> Sequence[Mapping[str, Any]]:
    with collector_paused():
        content = read_json(path, MAX_BYTES, object_hook=_compact)
    records = content.get("categories") if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise UserError(f"{path} is not in COCO's format: there is no list 'categories'")
    read = _Reader(path, lvis=False).read({"images": [], "annotations": [], "categories": records})
    refuse_problems(read)
    return tuple(read.categories)


def keypoint_names(categories: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the keypoints of an object; empty where no category has any, or two have different ones."""
    named = [each["keypoints"] for each in categories if "keypoints" in each]
    return list(named[0]) if named and all(each == named[0] for each in named) else []


def _compact(record: Record) -> Record:
    """Called with each object as soon as it is parsed: polygons take a quarter of the memory as arrays of numbers."""
    polygons = record.get("segmentation")
    if type(polygons) is list:
        with contextlib.suppress(TypeError, OverflowError):  # of another form: left to the reader
            record["segmentation"] = [array("d", each) for each in polygons]
    return record


def refuse_problems(read: Annotations) -> None:
    """See that every record can be used, but for masks and keypoints, which not every model learns.

    Raises:
        UserError: one cannot be used.
    """
    for problem in read.problems:
        if problem.fault not in PARTIAL:
            raise UserError(f"{read.path}: {problem.text}; --check-data lists everything that is wrong")


class _Reader:
    """Brings the records of one file into one form, and collects what is wrong with them."""

    def __init__(self, path: Path, lvis: bool) -> None:
        self._result = Annotations(path)
        self._lvis = lvis
        self._images: dict[int | str, Record] = {}
        self._categories: dict[int | str, Record] = {}

    def read(self, content: Mapping[str, Any]) -> Annotations:
        result = self._result
        result.annotated = "annotations" in content
        result.images = list(self._records("images", content["images"], self._image))
        categories = list(self._records("categories", content["categories"], self._category))
        result.categories = sorted(categories, key=lambda each: id_order(each["id"]))
        seen: set[int | str] = set()
        convert = functools.partial(self._annotation, seen)
        result.annotations = list(self._records("annotations", content.get("annotations", []), convert))
        return result

    def _records(
        self, name: str, records: list[Any], convert: Callable[[str, Record], Record | None]
    ) -> Iterator[Record]:
        for index in range(len(records)):
            record, where = records[index], f"{name}[{index}]"
            records[index] = None  # what has been converted need not stay in memory twice
            if not isinstance(record, dict):
                self._note(Fault.VALUE, f"{where} is {_shown(record)}: must be an object")
                continue
            try:
                converted = convert(where, record)
            except _BadValue as error:
                self._note(Fault.VALUE, str(error))
                continue
            if converted is not None:
                yield converted

    def _image(self, where: str, record: Record) -> Record | None:
        identity = self._id(where, record, "id")
        if self._lvis:
            self._require(where, record, ("coco_url", "neg_category_ids", "not_exhaustive_category_ids"))
            name = "/".join(self._name(where, record, "coco_url").split("/")[-2:])
        else:
            name = self._name(where, record, "file_name")
        width, height = (self._side(where, record, key) for key in ("width", "height"))
        if width * height > MAX_PIXELS:
            raise _BadValue(where, "width", record["width"], f"times height must be at most {MAX_PIXELS:,} pixels")
        image = {"id": self._own_id(record["id"]), "file_name": name, "width": width, "height": height}
        if identity in self._images:
            self._note(Fault.DUPLICATE_IMAGE, f"{where}.id is {_shown(record['id'])}, which another image has")
            return None
        self._images[identity] = image
        return image

    def _category(self, where: str, record: Record) -> Record | None:
        identity = self._id(where, record, "id")
        category: Record = {"id": self._own_id(record["id"]), "name": self._name(where, record, "name")}
        if self._lvis:
            self._require(where, record, ("frequency",))
        if identity in self._categories:
            key, value = "id", record["id"]
        elif any(each["name"] == category["name"] for each in self._categories.values()):
            key, value = "name", record["name"]
        else:
            points = record.get("keypoints")
            if isinstance(points, list) and points and all(isinstance(each, str) for each in points):
                category["keypoints"] = points
                category["skeleton"] = _skeleton(record.get("skeleton"), len(points))
            self._categories[identity] = category
            return category
        text = f"{where}.{key} is {_shown(value)}, which another category has: keep the one that annotations name"
        self._note(Fault.DUPLICATE_CATEGORY, text)
        return None

    def _annotation(self, seen: set[int | str], where: str, record: Record) -> Record | None:
        identity = self._id(where, record, "id")
        image = self._images.get(self._id(where, record, "image_id"))
        category = self._categories.get(self._id(where, record, "category_id"))
        box = self._box(where, record)
        crowd = self._flag(where, record, "iscrowd")
        if self._lvis:
            self._require(where, record, ("segmentation", "area"))
        if identity in seen:
            text = f"{where}.id is {_shown(record['id'])}, which another annotation has"
            self._note(Fault.DUPLICATE_ANNOTATION, text)
            return None
        seen.add(identity)
        if image is None:
            text = f"{where}.image_id is {_shown(record['image_id'])}, which no image has"
            self._note(Fault.UNKNOWN_IMAGE, text)
            return None
        if category is None:
            text = f"{where}.category_id is {_shown(record['category_id'])}, which no category has"
            self._note(Fault.UNKNOWN_CATEGORY, text)
            return None
        if record.get("ignore") and self._flag(where, record, "ignore"):
            self._note(Fault.IGNORED, f"{where}.ignore is {_shown(record['ignore'])}")
        result = {
            "id": identity,
            "image_id": image["id"],
            "category_id": category["id"],
            "bbox": box,
            "iscrowd": crowd,
        }
        if record.get("segmentation") is not None:
            self._add_mask(where, record["segmentation"], image, result)
        if record.get("keypoints"):
            self._add_keypoints(where, record["keypoints"], result)
        result["area"] = self._area(record.get("area"), image, result)
        return result

    def _add_mask(self, where: str, value: Any, image: Record, result: Record) -> None:
        try:
            mask = read_mask(value)
        except ValueError as error:
            self._note(Fault.MASK, f"{where}.segmentation {error}")
            result["broken_mask"] = True
            return
        if mask.converted:
            self._result.converted[mask.converted] += 1
        if mask.dropped:
            result["dropped_polygons"] = mask.dropped
        if isinstance(mask.regions, dict) and mask.regions["size"] != [image["height"], image["width"]]:
            height, width = mask.regions["size"]
            text = f"{where}.segmentation has the size {height} x {width}, its image {image['height']} x"
            self._note(Fault.MASK_SIZE, f"{text} {image['width']}")
            result["broken_mask"] = True
        elif mask.regions is not None:
            result["segmentation"] = mask.regions

    def _add_keypoints(self, where: str, value: Any, result: Record) -> None:
        try:
            points = _keypoints(value)
        except ValueError as error:
            self._note(Fault.KEYPOINTS, f"{where}.keypoints {error}")
            return
        result["keypoints"] = points
        result["num_keypoints"] = sum(visible > 0 for visible in points[2::3])

    def _area(self, value: Any, image: Record, result: Record) -> float:
        """As given if it is a positive number, else that of the mask, else that of the box."""
        try:
            area = value if type(value) is float and 0 < value < math.inf else read_number(value)
        except ValueError:
            area = 0
        if area <= 0:
            self._result.converted[COMPUTED_AREAS] += 1
            regions = result.get("segmentation")
            area = mask_area(regions, image["height"], image["width"]) if regions else 0
        return area if area > 0 else max(result["bbox"][2] * result["bbox"][3], 0)

    def _box(self, where: str, record: Record) -> list[float]:
        box = record.get("bbox")
        if not isinstance(box, list) or len(box) != 4:
            raise _BadValue(where, "bbox", box, "must be x, y, width and height")
        if all(type(value) in NUMBERS for value in box) and _is_finite(box):
            return box
        try:
            numbers = [read_number(value) for value in box]
        except ValueError as error:
            raise _BadValue(where, "bbox", box, "must be x, y, width and height") from error
        self._result.converted["bbox as text"] += 1
        return numbers

    def _side(self, where: str, record: Record, key: str) -> int:
        value = record.get(key)
        if type(value) is not int:
            try:
                value = read_whole(value)
            except ValueError as error:
                raise _BadValue(where, key, record.get(key), "must be a whole number of pixels") from error
            self._result.converted[f"{key} as text or float"] += 1
        if value < 1:
            raise _BadValue(where, key, record[key], "must be at least 1 pixel")
        return value

    def _flag(self, where: str, record: Record, key: str) -> int:
        value = record.get(key)
        if value is None:
            return 0
        if type(value) is not int:
            try:
                value = int(value) if isinstance(value, bool) else read_whole(value)
            except ValueError as error:
                raise _BadValue(where, key, record[key], "must be 0 or 1") from error
            self._result.converted[f"{key} as text, float or true/false"] += 1
        if value not in (0, 1):
            raise _BadValue(where, key, record[key], "must be 0 or 1")
        return int(value)

    def _id(self, where: str, record: Record, key: str) -> int | str:
        value = record.get(key)
        if type(value) is int:
            return value
        try:
            identity = read_id(value)
        except ValueError as error:
            raise _BadValue(where, key, value, str(error)) from error
        if type(identity) is not type(value):
            self._result.converted[f"{key} as text or float"] += 1
        return identity

    @staticmethod
    def _own_id(value: Any) -> int | str:
        """As the file has it, so that results can be compared with the file by other tools."""
        return int(value) if isinstance(value, float) else value

    def _name(self, where: str, record: Record, key: str) -> str:
        value = record.get(key)
        if type(value) is int:
            self._result.converted[f"{key} as a number"] += 1
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise _BadValue(where, key, value, "must be text")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise _BadValue(where, key, value, "must be text without half of a character pair")
        return value

    def _require(self, where: str, record: Record, keys: Sequence[str]) -> None:
        for key in keys:
            if key not in record:
                raise _BadValue(where, key, None, "LVIS's format requires it")

    def _note(self, fault: Fault, text: str) -> None:
        self._result.problems.append(Problem(fault, text))


class _BadValue(ValueError):
    """A value that cannot be used; the message names the record and the key."""

    def __init__(self, where: str, key: str, value: Any, rule: str) -> None:
        said = "is missing or null" if value is None else f"is {_shown(value)}"
        super().__init__(f"{where}.{key} {said}: {rule}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _is_finite(numbers: Sequence[float]) -> bool:
    try:
        return math.isfinite(sum(numbers))
    except OverflowError:  # an integer beyond the range of floats
        return False


def _keypoints(value: Any) -> list[float]:
    """x, y and visibility of each point in one list; triples are joined, numbers may be text.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, list) and all(isinstance(each, list) and len(each) == 3 for each in value):
        value = [number for each in value for number in each]
    if not isinstance(value, list) or len(value) % 3:
        raise ValueError("must be x, y and visibility of each point")
    points = [number if type(number) in NUMBERS else read_number(number) for number in value]
    if not _is_finite(points) or not set(points[2::3]) <= {0, 1, 2}:
        raise ValueError("must be finite, with a visibility of 0, 1 or 2")
    return points


def _skeleton(value: Any, points: int) -> list[tuple[int, int]]:
    """Pairs of keypoints that belong together, counted from 1; what is not such a pair is left out."""
    pairs = value if isinstance(value, list) else []
    return [
        (pair[0], pair[1])
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and all(type(end) is int and 1 <= end <= points for end in pair)
    ]
