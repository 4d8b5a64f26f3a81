"""COCO's scores of a list of detections: by faster-coco-eval where it is installed, else by pycocotools.

Both give the same numbers. Detections are dicts in COCO's results format, `dataset` is what the annotations' JSON
file holds. Nothing that is passed in is changed.

Overlaps of masks are pycocotools' in both cases. faster-coco-eval would decode each mask twice and encode it once
before it compares any; pycocotools decodes only those of a class and an image in which there are objects too.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as masks

from cli.errors import UserError

logger = logging.getLogger(__name__)

SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KEYPOINT_SUMMARY = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
SHAPES = {"bbox": ("bbox",), "segm": ("segmentation",), "keypoints": ("bbox", "keypoints")}


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
        if task == "segm" and hasattr(evaluation.params, "compute_rle"):  # faster-coco-eval's
            overlaps = mask_overlaps(truth, found, max(limits))
            evaluation.params.compute_rle = False
            evaluation.computeIoU = lambda image, category: overlaps.get((image, category), [])
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


def mask_overlaps(
    truth: Iterable[Mapping[str, Any]], found: Iterable[Mapping[str, Any]], limit: int
) -> dict[tuple[int, int], np.ndarray]:
    """Intersection over union of the masks of each image and category that has both objects and detections.

    Args:
        truth: objects, with their masks as compressed run-length codes.
        found: detections, likewise.
        limit: the most detections of a category in an image that count, those with the highest scores.

    Returns:
        by image and category: of each detection, the highest score first, with each object, (D, G); of a crowd the
        union is the detection alone.
    """
    of_objects, of_detections = (defaultdict(list), defaultdict(list))
    for entry in truth:
        of_objects[entry["image_id"], entry["category_id"]].append(entry)
    for entry in found:
        of_detections[entry["image_id"], entry["category_id"]].append(entry)
    overlaps = {}
    for place in of_objects.keys() & of_detections.keys():
        ranked = sorted(of_detections[place], key=lambda entry: -entry["score"])[:limit]
        regions = [[entry["segmentation"] for entry in entries] for entries in (ranked, of_objects[place])]
        overlaps[place] = masks.iou(*regions, [entry["iscrowd"] for entry in of_objects[place]])
    return overlaps


def _index(library: Libraries, dataset: Mapping[str, Any], entries: list[dict[str, Any]]) -> Any:
    indexed = library.annotations()
    indexed.dataset = {**dataset, "annotations": entries}
    indexed.createIndex()
    return indexed


def _set_sigmas(params: Any, sigmas: Sequence[float], truth: Sequence[Mapping[str, Any]]) -> None:
    if sigmas:
        params.kpt_oks_sigmas = np.array(sigmas)
    points = len(truth[0]["keypoints"]) // 3 if truth else len(params.kpt_oks_sigmas)
    if points != len(params.kpt_oks_sigmas):
        raise UserError(
            f"the annotations have {points} keypoints, but TEST.KEYPOINT_OKS_SIGMAS is for"
            f" {len(params.kpt_oks_sigmas)}: give a number for each"
        )
