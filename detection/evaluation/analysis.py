"""What a report draws of an evaluation: `analysis.json`.

It lies in the evaluator's folder and describes the last evaluation, one entry for each task:

    {"bbox": {
        "summary": {"AP": 41.2, "AP50": .., "AP75": .., "APs": .., "APm": .., "APl": ..,
                    "AR1": .., "AR10": .., "AR100": .., "ARs": .., "ARm": .., "ARl": ..},
        "classes": [{"name": "person", "objects": 11004, "AP": 55.1, "AP50": 83.0}, ..],
        "precision_recall": {"recall": [0.0, 0.01, .., 1.0], "0.5": [..], "0.75": [..], "mean": [..]},
        "errors": {"classification": 2.1, "localisation": 6.3, "both": .., "duplicate": .., "background": ..,
                   "missed": ..},
        "counts": {"detections": .., "correct": .., "ignored": .., "objects": .., "classification": .., ..},
        "thresholds": {"best": {"score": 0.61, "precision": .., "recall": .., "f1": ..},
                       "classes": [{"name": "person", "score": 0.58, "precision": .., "recall": .., "f1": ..}, ..],
                       "curve": {"score": [0.0, 0.001, .., 1.0], "precision": [..], "recall": [..], "f1": [..]}},
        "confusion": {"score": 0.61, "names": ["person", .., "background"], "counts": [[..], ..]},
        "note": null
     },
     "segm": {..}}

- All AP and AR are in percent; null means not evaluated, because there is no object of that class or size. Keypoints
  have ten numbers: none for small objects, AR50 and AR75, and no limits of 1 and 10 detections.
- `classes` are in the order of the ids of their categories; `objects` does not count crowds.
- `precision_recall` are fractions, averaged over the classes that have objects: precision at 101 recalls, at an
  IoU of 0.5, of 0.75, and on average over the ten thresholds. The mean of the last one is AP.
- `errors` is by how many points AP50 would rise if every error of that kind, and no other, were corrected; `counts`
  how many there are. `errors.py` defines the kinds. Both are null for keypoints, where the IoU with the background has
  no meaning, and `errors` is null where there is no object at all.
- `thresholds` and `confusion` are explained in `operating_points.py`; null for keypoints, and `confusion` also for more
  than 100 classes and where no detection is correct.
- `note` is a sentence for the report on how these numbers differ from COCO's or from those in results.json; null for
  datasets in COCO's format. The summary has the names of the dataset's own evaluation.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detection.evaluation import errors, operating_points
from detection.evaluation.operating_points import Compared
from foundation.files import write_atomic

FILE = "analysis.json"


def describe_task(
    *,
    summary: Mapping[str, float],
    classes: Sequence[Mapping[str, Any]],
    precision: np.ndarray,
    iou_thresholds: np.ndarray,
    images: Collection[Compared] = (),
    note: str | None = None,
) -> dict[str, Any]:
    """The entry of one task.

    Args:
        summary: metrics in [0, 1]; negative where nothing could be evaluated.
        classes: as `describe_class` gives them, in the order of their numbers.
        precision: at each IoU threshold, recall and class, (T, 101, K); -1 for a class without objects.
        iou_thresholds: (T,).
        images: what errors, thresholds and confusions are computed from; empty to leave these out.
        note: a sentence for the report.
    """
    entry: dict[str, Any] = {
        "summary": {name: percent(value) for name, value in summary.items()},
        "classes": list(classes),
        "precision_recall": errors.precision_recall_curves(precision, iou_thresholds),
        **dict.fromkeys(("errors", "counts", "thresholds", "confusion")),
        "note": note,
    }
    if images:
        joined = errors.join(errors.classify(*image) for image in images)
        names = [each["name"] for each in classes]
        gains = errors.gains(joined, len(names)) if len(joined.object_classes) else {}
        thresholds = operating_points.thresholds(joined, names)
        entry.update(errors=gains or None, counts=errors.counts(joined), thresholds=thresholds)
        if thresholds["best"]:
            entry["confusion"] = operating_points.confusion(images, names, thresholds["best"]["score"])
    return entry


def describe_class(name: str, objects: int, precision: np.ndarray) -> dict[str, Any]:
    """The entry of a class.

    Args:
        name: of the class.
        objects: their number.
        precision: at each IoU threshold, of which the first is 0.5, and recall, (T, 101).
    """
    return {
        "name": name,
        "objects": objects,
        "AP": percent(precision.mean()),
        "AP50": percent(precision[0].mean()),
    }


def percent(value: float) -> float | None:
    """A fraction as a percentage; None where it is negative or NaN, and so was not measured."""
    return float(100 * value) if value >= 0 else None


def write(folder: Path, tasks: Mapping[str, Any]) -> None:
    """Write the entries of all tasks into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, json.dumps(tasks).encode())
