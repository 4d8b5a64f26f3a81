"""What `analysis.json` says of one task, from its evaluation. `detection/evaluation/coco.py` describes the format."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from detection.evaluation import errors, precision_recall
from detection.evaluation.scores import KEYPOINT_SUMMARY, SUMMARY


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
        judged = errors.join(judge_images(evaluation))
        gains = errors.gains(judged, len(entry["classes"])) if len(judged.object_classes) else {}
        entry.update(errors=gains or None, counts=errors.counts(judged))
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


def judge_images(evaluation: Any) -> Iterator[errors.Judged]:
    """The kinds of detections and objects, image by image, with as many detections as the evaluation takes."""
    numbers = {category: number for number, category in enumerate(evaluation.params.catIds)}
    for image in evaluation.params.imgIds:
        found, truth, overlaps = evaluation.compared[image]
        yield errors.judge(
            overlaps,
            np.array([entry["score"] for entry in found]),
            np.array([numbers[entry["category_id"]] for entry in found], int),
            np.array([numbers[entry["category_id"]] for entry in truth], int),
            np.array([entry["iscrowd"] for entry in truth], bool),
        )


def _precision(evaluation: Any) -> np.ndarray:
    """Of objects of any size, with the most detections: (thresholds, recalls, classes); -1 for no object."""
    precision: np.ndarray = evaluation.eval["precision"][:, :, :, 0, -1]
    return precision


def _percent(value: float) -> float | None:
    return float(100 * value) if value >= 0 else None
