"""Average precision, and the errors of a detector by kind, with the AP50 that each kind costs.

The kinds of error are after Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors" (ECCV 2020,
section 2). Every detection that is not correct, that is, matched to an object at an IoU of 0.5, is of the first kind
that fits:

- localisation: the IoU with an object of its class is below 0.5 (and at least 0.1);
- classification: the IoU with an object of another class is 0.5 or more;
- duplicate: the IoU with an object of its class is 0.5 or more, but a higher-scoring detection is matched to it;
- background: the IoU with every object is below 0.1;
- both: only with objects of other classes is the IoU 0.1 to 0.5: wrong place and wrong class.

And an object is missed if no detection is matched to it and none would be with its place or its class corrected.

To correct means: a wrong place or class becomes the right one, and of several detections that would then match the same
object the highest-scoring one does, while the others are removed; the other detections are removed; missed objects no
longer count. With all kinds corrected AP50 is 100. Crowds are no objects here: a detection in one is ignored.

The authors' program differs in one point: it takes the highest-scoring detection over wrong places and wrong classes
together even when only one of the two is corrected, so that its gains of these kinds are a little smaller.
"""

from collections.abc import Collection, Iterable
from enum import IntEnum
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np

RECALLS = np.linspace(0, 1, 101)
MATCH_IOU, BACKGROUND_IOU = 0.5, 0.1  # of a match at least; of a detection of background less


class Outcome(IntEnum):
    """What becomes of a detection, and `MISSED`, which becomes of objects."""

    CORRECT = 0
    IGNORED = 1
    CLASSIFICATION = 2
    LOCALISATION = 3
    BOTH = 4
    DUPLICATE = 5
    BACKGROUND = 6
    MISSED = 7


ERRORS = (
    Outcome.CLASSIFICATION,
    Outcome.LOCALISATION,
    Outcome.BOTH,
    Outcome.DUPLICATE,
    Outcome.BACKGROUND,
    Outcome.MISSED,
)
MOVABLE = (Outcome.CLASSIFICATION, Outcome.LOCALISATION)


class Outcomes(NamedTuple):
    """D detections of one or more images, and their G objects, without crowds."""

    scores: np.ndarray  # (D,)
    classes: np.ndarray  # (D,)
    outcomes: np.ndarray  # (D,) Outcome
    targets: np.ndarray  # (D,) the object that a wrong place or class is about; -1 for other outcomes
    object_classes: np.ndarray  # (G,)
    matched: np.ndarray  # (G,) bool
    missed: np.ndarray  # (G,) bool


def interpolated_precision(correct: np.ndarray, objects: int) -> np.ndarray:
    """Precision at COCO's 101 recalls, (101,): the best at this recall or any higher one; 0 beyond the highest.

    Args:
        correct: for each detection, the highest-scoring first, whether it is matched to an object, (D,) bool.
        objects: the number of objects, at least one.
    """
    matched = np.cumsum(correct)
    precision = matched / np.arange(1, len(correct) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(matched / objects, RECALLS)
    return np.append(best, 0.0)[np.minimum(place, len(best))]


def average_precision(correct: np.ndarray, objects: int) -> float:
    """COCO's, in [0, 1]. Without objects it is 1 if nothing is detected, else 0."""
    if objects == 0:
        return float(len(correct) == 0)
    return float(interpolated_precision(correct, objects).mean())


def precision_recall_curves(precision: np.ndarray, thresholds: np.ndarray) -> dict[str, list[float]]:
    """Precision at each recall, averaged over the classes that have objects.

    Args:
        precision: of an evaluation, at each IoU threshold, recall and class, (T, 101, K); -1 for a class without
            objects.
        thresholds: the T IoU thresholds, 0.5 and 0.75 among them.

    Returns:
        `recall`, and the precision at an IoU of `0.5`, of `0.75`, and their `mean` over all T; each 101 numbers, or
        none where no class has objects.
    """
    there = precision[:, :, (precision > -1).all(axis=(0, 1))]
    if not there.size:
        return {"recall": RECALLS.tolist(), "0.5": [], "0.75": [], "mean": []}
    at = {f"{level:g}": int(np.argmin(np.abs(thresholds - level))) for level in (0.5, 0.75)}
    return {
        "recall": RECALLS.tolist(),
        **{name: there[place].mean(axis=1).tolist() for name, place in at.items()},
        "mean": there.mean(axis=(0, 2)).tolist(),
    }


def classify(
    ious: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    object_classes: np.ndarray,
    crowd: np.ndarray,
    exhaustive: np.ndarray | bool = True,
) -> Outcomes:
    """The outcomes of one image's detections, and which of its objects are matched.

    Args:
        ious: of each detection with each object; with a crowd, the intersection over the detection's area, (D, G).
        scores: of the detections, the highest first, (D,).
        classes: of the detections, (D,).
        object_classes: (G,).
        crowd: whether it is one, (G,) bool.
        exhaustive: whether all objects of a detection's class are annotated in the image, (D,) bool or one for all;
            where they are not, a detection without a match is ignored, because it may be right.
    """
    same = classes[:, None] == object_classes
    ignored = (same & (ious >= MATCH_IOU))[:, crowd].any(axis=1) | np.logical_not(exhaustive)
    same, ious, object_classes = same[:, ~crowd], ious[:, ~crowd], object_classes[~crowd]
    own, other = np.where(same, ious, 0.0), np.where(same, 0.0, ious)
    best_own, best_other = own.max(axis=1, initial=0.0), other.max(axis=1, initial=0.0)
    matches = match(own)
    outcomes = np.full(len(scores), int(Outcome.BOTH), np.int8)
    for outcome, applies in (  # each overrules those before
        (Outcome.BACKGROUND, np.maximum(best_own, best_other) < BACKGROUND_IOU),
        (Outcome.DUPLICATE, best_own >= MATCH_IOU),
        (Outcome.CLASSIFICATION, best_other >= MATCH_IOU),
        (Outcome.LOCALISATION, (best_own >= BACKGROUND_IOU) & (best_own < MATCH_IOU)),
        (Outcome.IGNORED, ignored),
        (Outcome.CORRECT, matches >= 0),
    ):
        outcomes[applies] = int(outcome)  # NumPy takes long with the members of an enumeration
    targets = np.full(len(scores), -1)
    for outcome, table in ((Outcome.LOCALISATION, own), (Outcome.CLASSIFICATION, other)):
        (places,) = np.nonzero(outcomes == int(outcome))
        if len(places):
            targets[places] = table[places].argmax(axis=1)
    matched, missed = np.zeros(len(object_classes), bool), np.ones(len(object_classes), bool)
    matched[matches[matches >= 0]] = True
    missed[targets[targets >= 0]] = False
    return Outcomes(scores, classes, outcomes, targets, object_classes, matched, missed & ~matched)


def match(ious: np.ndarray) -> np.ndarray:
    """The object that each detection is matched to, or -1, (D,).

    In turn each detection, the highest-scoring first, takes the object with the highest IoU among those left, if that
    is 0.5 or more; of equals the last, as in pycocotools.

    Args:
        ious: of each detection with each object of its class, 0 for others, (D, G); the highest-scoring first.
    """
    matches, taken = np.full(len(ious), -1), set()
    rows, columns = np.nonzero(ious >= MATCH_IOU)
    pairs = zip(rows.tolist(), columns.tolist(), ious[rows, columns].tolist(), strict=True)
    for row, candidates in groupby(pairs, key=itemgetter(0)):
        left = [(iou, column) for _, column, iou in candidates if column not in taken]
        if left:
            matches[row] = max(left)[1]  # of equals the last
            taken.add(matches[row])
    return matches


def join(images: Iterable[Outcomes]) -> Outcomes:
    """All images as one."""
    parts = list(images)
    starts = np.cumsum([0, *(len(part.object_classes) for part in parts[:-1])])
    shifted = [
        part._replace(targets=np.where(part.targets >= 0, part.targets + start, -1))
        for part, start in zip(parts, starts, strict=True)
    ]
    return Outcomes(*(np.concatenate(column) for column in zip(*shifted, strict=True)))


def counts(joined: Outcomes) -> dict[str, int]:
    """How many detections have each outcome, and how many objects are missed."""
    numbers = np.bincount(joined.outcomes, minlength=len(Outcome))
    numbers[Outcome.MISSED] = joined.missed.sum()
    totals = {"detections": len(joined.outcomes), "objects": len(joined.object_classes)}
    return {**totals, **{outcome.name.lower(): int(numbers[outcome]) for outcome in Outcome}}


def gains(joined: Outcomes, classes: int) -> dict[str, float]:
    """By how many points AP50 would rise with each kind of error, and no other, corrected; never negative."""
    order = np.argsort(-joined.scores, kind="stable")  # once for all kinds: what is sorted is sorted again at once
    by_detection = ("scores", "classes", "outcomes", "targets")
    joined = joined._replace(**{name: getattr(joined, name)[order] for name in by_detection})
    now = corrected_ap50(joined, classes, ())
    return {error.name.lower(): 100 * (corrected_ap50(joined, classes, {error}) - now) for error in ERRORS}


def corrected_ap50(joined: Outcomes, classes: int, corrected: Collection[Outcome]) -> float:
    """AP at an IoU of 0.5, in [0, 1], with all errors of some kinds corrected; NaN without any object.

    Args:
        joined: the detections of all images.
        classes: their number K; a class is a number in [0, K). Those without objects do not count.
        corrected: the kinds of error.
    """
    winners = _winners(joined, corrected)
    kept = ~np.isin(joined.outcomes, [Outcome.IGNORED, *corrected])
    kept[winners] = True
    correct, detected_class = joined.outcomes == Outcome.CORRECT, joined.classes.copy()
    correct[winners] = True
    detected_class[winners] = joined.object_classes[joined.targets[winners]]
    counted = ~joined.missed if Outcome.MISSED in corrected else np.ones(len(joined.missed), bool)
    objects = np.bincount(joined.object_classes[counted], minlength=classes)
    order = np.argsort(-joined.scores, kind="stable")
    order = order[kept[order]]
    order = order[np.argsort(detected_class[order], kind="stable")]  # by class, each with the highest score first
    ends = np.searchsorted(detected_class[order], np.arange(classes + 1)).tolist()
    averages = [
        average_precision(correct[order[ends[index] : ends[index + 1]]], objects[index])
        for index in np.unique(joined.object_classes).tolist()
    ]
    return float(np.mean(averages)) if averages else float("nan")


def _winners(joined: Outcomes, corrected: Collection[Outcome]) -> np.ndarray:
    """Of the detections that would match an object without a match, the highest-scoring one for each object."""
    movable = np.flatnonzero(np.isin(joined.outcomes, [outcome for outcome in MOVABLE if outcome in corrected]))
    movable = movable[~joined.matched[joined.targets[movable]]]
    order = movable[np.argsort(-joined.scores[movable], kind="stable")]
    _, first = np.unique(joined.targets[order], return_index=True)
    return order[first]
