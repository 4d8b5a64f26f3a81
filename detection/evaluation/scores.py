"""COCO's scores of a list of detections: by faster-coco-eval where it is installed, else by pycocotools.

Both give the same numbers. Detections are dicts in COCO's results format, `dataset` is what the annotations' JSON
file holds. Nothing that is passed in is changed.

Overlaps of boxes and masks are pycocotools' in both cases, computed once for all classes of an image, since the
analysis of errors asks for them too. faster-coco-eval would decode each mask twice and encode it once to compare it.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as masks

from foundation.errors import UserError

logger = logging.getLogger(__name__)

SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KEYPOINT_SUMMARY = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
SHAPES = {"bbox": ("bbox",), "segm": ("segmentation",), "keypoints": ("bbox", "keypoints")}


class Compared(NamedTuple):
    """The detections of an image that count, the surest first, beside its objects."""

    found: list[dict[str, Any]]
    truth: list[dict[str, Any]]
    overlaps: np.ndarray  # intersection over union, of a crowd over the detection; (detections, objects)


class Libraries(NamedTuple):
    """The classes for annotations and for their evaluation, and the latter's further arguments."""

    annotations: Any
    evaluation: Any
    options: dict[str, Any]


@functools.cache
def libraries() -> Libraries:
    """The faster library, or pycocotools and one line in the log."""
    if importlib.util.find_spec("faster_coco_eval") is not None:
        fast = importlib.import_module("faster_coco_eval")
        return Libraries(fast.COCO, fast.COCOeval_faster, {"print_function": logger.debug})
    logger.warning("faster-coco-eval is not installed: COCO AP by pycocotools, which gives the same, slower")
    coco = importlib.import_module("pycocotools.coco").COCO
    # As pycocotools, whose summary assumes 100 detections an image, for any number of them.
    return Libraries(coco, importlib.import_module("detectron2.evaluation.coco_evaluation").COCOevalMaxDets, {})


def score(
    dataset: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    task: str,
    limits: Sequence[int] = (1, 10, 100),
    image_ids: Sequence[int] | None = None,
    sigmas: Sequence[float] = (),
) -> Any:
    """An evaluation in pycocotools' form, with `stats` and `eval`; without detections too.

    Of boxes and masks it has `compared` besides: `Compared`, by image.

    Args:
        dataset: images, annotations and categories.
        results: detections, with the category ids of `dataset`.
        task: bbox, segm or keypoints.
        limits: detections of a class in an image that count, for AR1, AR10 and all else. Keypoints: 20, always.
        image_ids: the images that count; by default all.
        sigmas: of the keypoints, if they are not COCO's 17.

    Raises:
        UserError: the number of keypoints is not that of the sigmas.
    """
    library = libraries()
    truth, found = objects(dataset["annotations"]), detections(results, task)
    if task == "segm":
        encode_polygons(truth, dataset["images"])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        both = [_index(library, dataset, entries) for entries in (truth, found)]
        evaluation = library.evaluation(*both, task, **library.options)
        evaluation.params.catIds = sorted(category["id"] for category in dataset["categories"])
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        if task == "keypoints":
            _set_sigmas(evaluation.params, sigmas, truth)
        else:
            evaluation.params.maxDets = list(limits)
            _compare(evaluation, SHAPES[task][0])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    if said.getvalue():  # pycocotools prints
        logger.debug("%s", said.getvalue())
    return evaluation


def objects(annotations: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The annotations, with the fields that both libraries demand and custom data may lack, numbered anew from 1.

    To pycocotools an object with the id 0 can be found by no detection.
    """
    return [
        {"iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3], **entry, "id": number}
        for number, entry in enumerate(annotations, 1)
    ]


def detections(results: Sequence[Mapping[str, Any]], task: str) -> list[dict[str, Any]]:
    """The results as annotations with an id and an area: of the mask, where it is masks that are compared."""
    kept = ("image_id", "category_id", "score", *SHAPES[task])
    found = [{key: entry[key] for key in kept} for entry in results]
    areas: Iterable[float]
    if task == "segm":
        areas = (float(masks.area(entry["segmentation"])) for entry in found)
    else:
        areas = (entry["bbox"][2] * entry["bbox"][3] for entry in found)
    for number, (entry, area) in enumerate(zip(found, areas, strict=True), 1):
        entry.update(id=number, area=area, iscrowd=0)
    return found


def encode_polygons(annotations: Iterable[dict[str, Any]], images: Iterable[Mapping[str, Any]]) -> None:
    """Replace the masks of objects by COCO's compressed run-length codes; polygons of fewer than 3 points are left out.

    Args:
        annotations: of objects, changed in place.
        images: with their id, height and width.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    for entry in annotations:
        mask, size = entry["segmentation"], sizes[entry["image_id"]]
        if isinstance(mask, list):
            polygons = [polygon for polygon in mask if len(polygon) >= 6]
            nothing = {"size": size, "counts": [size[0] * size[1]]}
            mask = masks.merge(masks.frPyObjects(polygons, *size)) if polygons else nothing
        if isinstance(mask["counts"], list):
            mask = masks.frPyObjects(mask, *size)
        entry["segmentation"] = mask


def _index(library: Libraries, dataset: Mapping[str, Any], entries: list[dict[str, Any]]) -> Any:
    indexed = library.annotations()
    indexed.dataset = {**dataset, "annotations": entries}
    indexed.createIndex()
    return indexed


def _compare(evaluation: Any, shape: str) -> None:
    """Compute all overlaps, and have the evaluation take those of each image and category from them."""
    evaluation.compared = {}
    of_category = {}
    for image in evaluation.params.imgIds:
        truth = evaluation.cocoGt.imgToAnns[image]
        found = surest(evaluation.cocoDt.imgToAnns[image], max(evaluation.params.maxDets))
        regions = [[entry[shape] for entry in entries] for entries in (found, truth)]
        overlaps = np.reshape(masks.iou(*regions, [entry["iscrowd"] for entry in truth]), (len(found), len(truth)))
        evaluation.compared[image] = Compared(found, truth, overlaps)
        theirs, ours = (np.array([entry["category_id"] for entry in entries]) for entries in (truth, found))
        for category in np.intersect1d(theirs, ours).tolist():
            of_category[image, category] = overlaps[np.ix_(ours == category, theirs == category)]
    evaluation.params.compute_rle = False  # faster-coco-eval would, to compare them
    evaluation.computeIoU = lambda image, category: of_category.get((image, category), [])


def surest(found: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The detections of one image, the highest score first, at most `limit` of each category."""
    ordered = sorted(found, key=lambda entry: -entry["score"])
    if len(ordered) <= limit:
        return ordered
    seen: Counter[int] = Counter()
    kept = []
    for entry in ordered:
        seen[entry["category_id"]] += 1
        if seen[entry["category_id"]] <= limit:
            kept.append(entry)
    return kept


def _set_sigmas(params: Any, sigmas: Sequence[float], truth: Sequence[Mapping[str, Any]]) -> None:
    if sigmas:
        params.kpt_oks_sigmas = np.array(sigmas)
    points = len(truth[0]["keypoints"]) // 3 if truth else len(params.kpt_oks_sigmas)
    if points != len(params.kpt_oks_sigmas):
        raise UserError(
            f"the annotations have {points} keypoints, but TEST.KEYPOINT_OKS_SIGMAS is for"
            f" {len(params.kpt_oks_sigmas)}: give a number for each"
        )
