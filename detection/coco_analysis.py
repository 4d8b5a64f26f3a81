"""What `analysis.json` says of one task, from its evaluation. `detection/coco_evaluation.py` describes the format."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from pycocotools import mask as masks

from detection import error_kinds, precision_recall
from detection.coco_scores import KEYPOINT_SUMMARY, SUMMARY


def analyse(evaluation: Any) -> dict[str, Any]:
    """The entry of one task.

    Args:
        evaluation: as `coco_scores.score` returns it.
    """
    task = evaluation.params.iouType
    entry: dict[str, Any] = {
        "summary": dict(
            zip(KEYPOINT_SUMMARY if task == "keypoints" else SUMMARY, map(_percent, evaluation.stats), strict=True)
        ),
        "classes": describe_classes(evaluation),
        "precision_recall": precision_recall.curves(_precision(evaluation), evaluation.params.iouThrs),
        "errors": None,
        "counts": None,
    }
    if task != "keypoints":
        judged = error_kinds.join(judge_images(evaluation))
        gains = error_kinds.gains(judged, len(entry["classes"])) if len(judged.object_classes) else {}
        entry.update(errors=gains or None, counts=error_kinds.counts(judged))
    return entry


def describe_classes(evaluation: Any) -> list[dict[str, Any]]:
    """Name, number of objects, AP and AP50 of each class, by ascending category id, which is the model's order."""
    chosen = set(evaluation.params.imgIds)
    objects = dict.fromkeys(evaluation.params.catIds, 0)
    for entry in evaluation.cocoGt.dataset["annotations"]:
        if entry["image_id"] in chosen and not entry["ignore"]:
            objects[entry["category_id"]] += 1
    precision = _precision(evaluation)
    return [
        {
            "name": evaluation.cocoGt.cats[category]["name"],
            "objects": number,
            "AP": _percent(precision[:, :, place].mean()),
            "AP50": _percent(precision[0, :, place].mean()),
        }
        for place, (category, number) in enumerate(objects.items())
    ]


def judge_images(evaluation: Any) -> Iterator[error_kinds.Judged]:
    """The kinds of detections and objects, image by image, with as many detections as the evaluation takes."""
    numbers = {category: number for number, category in enumerate(evaluation.params.catIds)}
    shape = "segmentation" if evaluation.params.iouType == "segm" else "bbox"
    limit = evaluation.params.maxDets[-1]
    for image in evaluation.params.imgIds:
        truth = evaluation.cocoGt.imgToAnns[image]
        found = evaluation.cocoDt.imgToAnns[image]
        scores = np.array([entry["score"] for entry in found])
        classes = np.array([numbers[entry["category_id"]] for entry in found], int)
        order = surest(scores, classes, limit)
        crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in truth], bool)
        regions = [entry[shape] for entry in truth]
        overlaps = masks.iou([found[place][shape] for place in order], regions, crowd.tolist())
        yield error_kinds.judge(
            np.reshape(overlaps, (len(order), len(truth))),
            scores[order],
            classes[order],
            np.array([numbers[entry["category_id"]] for entry in truth], int),
            crowd,
        )


def surest(scores: np.ndarray, classes: np.ndarray, limit: int) -> np.ndarray:
    """Places of the detections of one image, the highest score first, at most `limit` of each class."""
    order = np.argsort(-scores, kind="stable")
    if len(order) <= limit:
        return order
    ranks = np.empty(len(order), int)
    for index in np.unique(classes):
        its = classes[order] == index
        ranks[its] = np.arange(its.sum())
    return order[ranks < limit]


def _precision(evaluation: Any) -> np.ndarray:
    """Of objects of any size, with the most detections: (thresholds, recalls, classes); -1 for no object."""
    precision: np.ndarray = evaluation.eval["precision"][:, :, :, 0, -1]
    return precision


def _percent(value: float) -> float | None:
    return float(100 * value) if value >= 0 else None
