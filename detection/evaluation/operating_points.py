"""A detector at one score threshold: precision, recall and F1 over the threshold, the best one, and confusions.

All at an IoU of 0.5, with the matches of AP50. The best threshold is chosen on the images that it is measured on, so F1
on others will be a little lower.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detection.evaluation.errors import MATCH_IOU, Outcome, Outcomes, match
from foundation.errors import UserError
from foundation.json_files import read_json

CURVE = np.arange(1001) / 1000  # score thresholds: those of a detector that is still unsure lie close together
DECIMALS = 4  # of a best threshold
MAX_CLASSES = 100  # of a confusion matrix that is kept
BACKGROUND = "background"


class Compared(NamedTuple):
    """D detections of one image beside its G objects; see `errors.classify`."""

    ious: np.ndarray  # (D, G)
    scores: np.ndarray  # (D,), the highest first
    classes: np.ndarray  # (D,)
    object_classes: np.ndarray  # (G,)
    crowd: np.ndarray  # (G,) bool
    exhaustive: np.ndarray | bool = True  # (D,) bool, or one for all


class Thresholds(NamedTuple):
    """The score thresholds with the best F1, overall and for classes by name."""

    overall: float
    by_class: Mapping[str, float]

    def of(self, name: str) -> float:
        """The threshold of a class; the overall one where the class has none."""
        return self.by_class.get(name, self.overall)


def thresholds(joined: Outcomes, names: Sequence[str]) -> dict[str, Any]:
    """The entry `thresholds` of analysis.json.

    Args:
        joined: the outcomes of all images.
        names: of the classes.

    Returns:
        `best`: {"score", "precision", "recall", "f1"} of all classes together, or None where nothing is correct;
        `classes`: the same with `name` for each class, `score` None where nothing of it is correct;
        `curve`: {"score", "precision", "recall", "f1"}, each a list of 1,001 numbers; precision is None where nothing
        is detected.
    """
    nothing = dict.fromkeys(("score", "precision", "recall", "f1"))
    classes = []
    for number, name in enumerate(names):
        own = joined.classes == number
        objects = int((joined.object_classes == number).sum())
        best = _best(joined.scores[own], joined.outcomes[own], objects)
        classes.append({"name": name, **(best or nothing)})
    objects = len(joined.object_classes)
    precision, recall, f1 = _measures(joined.scores, joined.outcomes, objects, CURVE)
    curve = {"score": CURVE, "recall": recall, "f1": f1}
    return {
        "best": _best(joined.scores, joined.outcomes, objects),
        "classes": classes,
        "curve": {
            **{key: values.round(6).tolist() for key, values in curve.items()},
            "precision": [None if np.isnan(value) else round(float(value), 6) for value in precision],
        },
    }


def confusion(images: Iterable[Compared], names: Sequence[str], score: float) -> dict[str, Any] | None:
    """The entry `confusion` of analysis.json, with the detections of at least this score.

    Each object is matched to a detection of its class, as for AP50, or else to a detection of another class that is
    matched to none of its own. Detections that are ignored are left out.

    Returns:
        `score`, `names` with `background` as the last, and `counts` (K + 1, K + 1): rows are the classes of objects,
        columns those of detections. The last column counts missed objects, the last row detections without an object.
        None where there are more than `MAX_CLASSES` classes.
    """
    size = len(names)
    if size > MAX_CLASSES:
        return None
    counts = np.zeros((size + 1, size + 1), dtype=np.int64)
    for image in images:
        kept = image.scores >= score
        ious, classes = image.ious[kept], image.classes[kept]
        same = classes[:, None] == image.object_classes
        ignored = (same & (ious >= MATCH_IOU))[:, image.crowd].any(axis=1)
        ignored |= ~np.broadcast_to(image.exhaustive, len(kept))[kept]
        ious, same, objects = ious[:, ~image.crowd], same[:, ~image.crowd], image.object_classes[~image.crowd]
        matches = match(np.where(same, ious, 0.0))
        free = np.ones(len(objects), bool)
        free[matches[matches >= 0]] = False
        open_ = (matches < 0) & ~ignored
        matches[open_] = match(np.where(free, ious, 0.0)[open_])
        np.add.at(counts, (objects[matches[matches >= 0]], classes[matches >= 0]), 1)
        missed = np.setdiff1d(np.arange(len(objects)), matches)
        np.add.at(counts, (objects[missed], size), 1)
        np.add.at(counts, (size, classes[(matches < 0) & ~ignored]), 1)
    return {"score": score, "names": [*names, BACKGROUND], "counts": counts.tolist()}


def read_thresholds(predictions: Path) -> Thresholds:
    """The best thresholds of boxes, as the evaluation of a run measured them.

    Args:
        predictions: the folder of the evaluation's results, in that of the run.

    Raises:
        UserError: the run was not evaluated, or by an earlier version, or nothing that it found was correct.
    """
    path = predictions / "analysis.json"
    advice = "evaluate the detector with train_net.py --eval-only, or give the threshold as a number"
    if not path.is_file():
        raise UserError(f"there is no {path}, from which the best score threshold is read: {advice}")
    content = read_json(path)
    try:
        entry = content["bbox"]["thresholds"]
        if entry["best"] is None:
            raise UserError(
                f"by {path} no detection of the evaluation is correct, so there is no best score threshold: give the "
                "threshold as a number, or train the detector longer"
            )
        found = {each["name"]: float(each["score"]) for each in entry["classes"] if each["score"] is not None}
        return Thresholds(float(entry["best"]["score"]), found)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not name the best score threshold of boxes: {advice}") from error


def _best(scores: np.ndarray, outcomes: np.ndarray, objects: int) -> dict[str, float] | None:
    """The threshold with the highest F1; of equal ones the highest. None where nothing is correct."""
    if not (outcomes == Outcome.CORRECT).any():
        return None
    candidates = np.unique(np.floor(scores * 10**DECIMALS) / 10**DECIMALS)[::-1]
    precision, recall, f1 = _measures(scores, outcomes, objects, candidates)
    place = int(f1.argmax())
    measures = {"precision": precision[place], "recall": recall[place], "f1": f1[place]}
    return {"score": float(candidates[place]), **{name: round(float(value), 6) for name, value in measures.items()}}


def _measures(
    scores: np.ndarray, outcomes: np.ndarray, objects: int, levels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of the detections that score at least each of T levels, (T,) each.

    Precision is NaN without a detection, recall is 0 without an object.
    """
    counted = outcomes != Outcome.IGNORED
    all_scores, correct_scores = np.sort(scores[counted]), np.sort(scores[outcomes == Outcome.CORRECT])
    detected = len(all_scores) - np.searchsorted(all_scores, levels)
    correct = len(correct_scores) - np.searchsorted(correct_scores, levels)
    precision = np.where(detected > 0, correct / np.maximum(detected, 1), np.nan)
    recall = correct / max(objects, 1)
    return precision, recall, 2 * correct / np.maximum(detected + objects, 1)
