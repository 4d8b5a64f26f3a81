"""Annotations in COCO's format, and in LVIS's, which is the same with the images' folders in their URL.

One pass over the records, and arrays from there on: COCO's 860,000 annotations take seconds.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from detection.checks import findings as defects
from detection.checks.findings import Content, Findings, Picture, Use

Record = Mapping[str, Any]
CHUNK = 20_000  # objects whose polygons are looked at together, to bound the memory
LEAST_AREA = 1e-6  # square pixels that a polygon must enclose
NUMBERS = (int, float)


def read(path: Path, use: Use, findings: Findings) -> Content | None:
    """What a file of annotations holds, with everything wrong in it noted; None if nothing can be made of it."""
    try:
        lists = json.loads(path.read_bytes())
        images, annotations, categories = (lists[key] for key in ("images", "annotations", "categories"))
        if not all(isinstance(each, list) for each in (images, annotations, categories)):
            raise TypeError("images, annotations and categories must be lists")
    except OSError as error:
        findings.add(defects.UNREADABLE, [f"{path} ({error.strerror or error})"])
        return None
    except (ValueError, KeyError, TypeError) as error:
        findings.add(defects.UNREADABLE, [f"{path} (not COCO's instances format: {error!r})"])
        return None
    images = _whole(images, _is_image, "images", findings)
    categories = _whole(categories, _is_category, "categories", findings)
    annotations = _whole(annotations, _is_annotation, "annotations", findings)
    for records, defect in (
        (images, defects.DUPLICATE_IMAGES),
        (annotations, defects.DUPLICATE_ANNOTATIONS),
        (categories, defects.DUPLICATE_CATEGORIES),
    ):
        findings.add(defect, _repeated(records), "id {}".format)
    content, annotations = _content(images, annotations, categories, findings)
    findings.add(
        defects.IGNORED, [i for i, each in enumerate(annotations) if each.get("ignore", 0) != 0], content.label
    )
    if use.masks:
        _check_masks(annotations, content, use, findings)
    if use.keypoints:
        _check_keypoints(annotations, content, use.keypoints, findings)
    return content


def _content(
    images: Sequence[Record], annotations: Sequence[Record], categories: Sequence[Record], findings: Findings
) -> tuple[Content, list[Record]]:
    """The records as arrays, and the annotations that have an image, which they are of."""
    rows = {record["id"]: index for index, record in enumerate(images)}
    order = {identity: index for index, identity in enumerate(sorted({each["id"] for each in categories}))}
    names = {order[each["id"]]: str(each["name"]) for each in categories}
    lost = [each for each in annotations if each["image_id"] not in rows]
    findings.add(defects.UNKNOWN_IMAGES, lost, lambda each: f"annotation {each['id']} of image {each['image_id']}")
    strange = [each for each in annotations if each["category_id"] not in order]
    findings.add(
        defects.UNKNOWN_CATEGORIES, strange, lambda each: f"annotation {each['id']} of category {each['category_id']}"
    )
    kept = [each for each in annotations if each["image_id"] in rows]
    boxes = numpy.array([each["bbox"] for each in kept], dtype=numpy.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    content = Content(
        pictures=[Picture(_file_name(each), each["width"], each["height"]) for each in images],
        owners=numpy.array([rows[each["image_id"]] for each in kept], dtype=numpy.int64),
        boxes=boxes,
        classes=numpy.array([order.get(each["category_id"], -1) for each in kept], dtype=numpy.int64),
        crowds=numpy.array([each.get("iscrowd", 0) != 0 for each in kept], dtype=bool),
        labels=[f"annotation {each['id']}" for each in kept],
        names=[names[index] for index in range(len(names))],
    )
    return content, kept


def _file_name(image: Record) -> str:
    """LVIS takes its images from COCO's folders, which only the URL names."""
    if "coco_url" in image and ("neg_category_ids" in image or "file_name" not in image):
        return "/".join(str(image["coco_url"]).split("/")[-2:])
    return str(image["file_name"])


def _is_image(record: Record) -> bool:
    named = isinstance(record.get("file_name"), str) or isinstance(record.get("coco_url"), str)
    return named and all(type(record.get(key)) is int for key in ("width", "height")) and _has_id(record)


def _is_category(record: Record) -> bool:
    return "name" in record and _has_id(record)


def _is_annotation(record: Record) -> bool:
    box = record.get("bbox")
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(value) in NUMBERS for value in box)
        and _has_id(record)
        and isinstance(record.get("image_id"), int | str)
        and isinstance(record.get("category_id"), int)
    )


def _has_id(record: Record) -> bool:
    return isinstance(record.get("id"), int | str)


def _whole(records: Sequence[Any], test: Any, name: str, findings: Findings) -> list[Record]:
    """The records that pass; the others are noted by their place in the list."""
    passed = [isinstance(record, dict) and test(record) for record in records]
    findings.add(defects.MALFORMED, [i for i, good in enumerate(passed) if not good], lambda i: f"{name}[{i}]")
    return [record for record, good in zip(records, passed, strict=True) if good]


def _repeated(records: Iterable[Record]) -> list[Any]:
    """The ids of the records that come after another with the same one."""
    counts = Counter(record["id"] for record in records)
    return [identity for identity, count in counts.items() for _ in range(count - 1)]


def _check_masks(annotations: Sequence[Record], content: Content, use: Use, findings: Findings) -> None:
    """Of the objects that are no crowds; a crowd's mask is not trained on."""
    objects = [i for i, crowd in enumerate(content.crowds.tolist()) if not crowd]
    masks = {i: annotations[i].get("segmentation") for i in objects}
    findings.add(defects.NO_MASKS, [i for i, mask in masks.items() if not mask], content.label)
    coded = [i for i, mask in masks.items() if mask and isinstance(mask, dict)]
    if use.polygons or not use.training:
        findings.add(defects.CODED_MASKS, coded, content.label)
    sizes = {i: (content.pictures[content.owners[i]].height, content.pictures[content.owners[i]].width) for i in coded}
    other = [i for i in coded if tuple(annotations[i]["segmentation"].get("size", ())) != sizes[i]]
    findings.add(defects.CODE_SIZES, other, content.label)
    drawn = [i for i, mask in masks.items() if mask and isinstance(mask, list)]
    malformed: list[int] = [i for i, mask in masks.items() if mask and not isinstance(mask, list | dict)]
    judged: dict[str, list[int]] = {"malformed": malformed, "short": [], "some": [], "flat": []}
    for start in range(0, len(drawn), CHUNK):
        for index, kind in _judge_polygons({i: annotations[i]["segmentation"] for i in drawn[start : start + CHUNK]}):
            judged[kind].append(index)
    for defect, indices in (
        (defects.MALFORMED, malformed),
        (defects.SHORT_POLYGONS, judged["short"]),
        (defects.SOME_SHORT_POLYGONS, judged["some"]),
        (defects.FLAT_POLYGONS, judged["flat"]),
    ):
        findings.add(defect, indices, content.label)


def _judge_polygons(masks: Mapping[int, Sequence[Sequence[float]]]) -> Iterable[tuple[int, str]]:
    """What is wrong with the polygons of objects, given by index: an index and a word for each that is not right."""
    rows: dict[int, list[bool]] = {}
    good: list[Sequence[float]] = []
    for index, polygons in masks.items():
        if not all(isinstance(each, list) for each in polygons):
            yield index, "malformed"
            continue
        rows[index] = [len(each) >= 6 and len(each) % 2 == 0 for each in polygons]
        good += [each for each, fits in zip(polygons, rows[index], strict=True) if fits]
    try:
        areas = iter(polygon_areas(good).tolist())
    except (TypeError, ValueError):  # something that is no number: one by one, to name the object
        if len(masks) == 1:
            yield next(iter(masks)), "malformed"
        else:
            for index in rows:
                yield from _judge_polygons({index: masks[index]})
        return
    for index, fits in rows.items():
        area = sum(next(areas) for _ in range(sum(fits)))
        if area != area:  # not a number: JSON's null
            yield index, "malformed"
        elif not any(fits):
            yield index, "short"
        elif not all(fits):
            yield index, "some"
        elif area < LEAST_AREA:
            yield index, "flat"


def polygon_areas(polygons: Sequence[Sequence[float]]) -> NDArray[numpy.float64]:
    """Area of each polygon, given as x0, y0, x1, y1, ..., by the sum of the cross products of its edges.

    Raises:
        TypeError, ValueError: a coordinate is not a number.
    """
    if not polygons:
        return numpy.zeros(0)
    counts = numpy.fromiter(map(len, polygons), numpy.int64) // 2
    points = numpy.fromiter(chain.from_iterable(polygons), numpy.float64).reshape(-1, 2)
    ends = numpy.cumsum(counts)
    following = numpy.arange(1, len(points) + 1)
    following[ends - 1] = ends - counts
    cross = points[:, 0] * points[following, 1] - points[following, 0] * points[:, 1]
    return numpy.abs(numpy.add.reduceat(cross, ends - counts)) / 2


def _check_keypoints(annotations: Sequence[Record], content: Content, count: int, findings: Findings) -> None:
    wrong, seen = [], set()
    for index, record in enumerate(annotations):
        points = record.get("keypoints") or []
        if (
            not isinstance(points, list)
            or len(points) != 3 * count
            or not all(type(value) in NUMBERS for value in points)
        ):
            wrong.append(index)
        elif any(visible > 0 for visible in points[2::3]):
            seen.add(int(content.owners[index]))
    findings.add(defects.WRONG_KEYPOINTS, wrong, content.label)
    without = sorted(set(content.owners.tolist()) - seen)
    findings.add(defects.FEW_KEYPOINTS, without, lambda index: content.pictures[index].file_name)
