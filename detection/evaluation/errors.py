"""What a detector does wrong, by kind, and how much of AP50 each kind costs.

After Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors" (ECCV 2020, section 2). Every
detection that found no object at an overlap of 0.5 is of the first kind that fits:

- localisation: it overlaps an object of its class, but by less than 0.5 (and at least 0.1);
- classification: it overlaps an object of another class by 0.5 or more;
- duplicate: it overlaps an object of its class by 0.5 or more, which a surer detection has found;
- background: it overlaps no object by 0.1;
- both: it overlaps objects of other classes only, by 0.1 to 0.5: wrong place and wrong class.

And an object is missed if no detection found it and none would by having its place or its class put right.

To put right means: a wrong place or class becomes the right one, and of several detections that would find the same
object thereby the surest does, while the rest vanish; the other detections vanish; missed objects no longer count.
With all kinds put right AP50 is 100. Crowds are no objects here: what lies in one counts neither for nor against.

The authors' program differs in one point: it takes the surest over wrong places and wrong classes together even when
only one of the two is put right, so that its gains of these kinds are a little smaller.
"""

from collections.abc import Collection, Iterable
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from detection.evaluation.precision_recall import average_precision

FOUND, GROUND = 0.5, 0.1  # overlaps from which an object is found, and from which it is not only background


class Kind(IntEnum):
    """What becomes of a detection, and `MISSED`, which becomes of objects."""

    CORRECT = 0
    IGNORED = 1
    CLASSIFICATION = 2
    LOCALISATION = 3
    BOTH = 4
    DUPLICATE = 5
    BACKGROUND = 6
    MISSED = 7


ERRORS = (Kind.CLASSIFICATION, Kind.LOCALISATION, Kind.BOTH, Kind.DUPLICATE, Kind.BACKGROUND, Kind.MISSED)
MOVABLE = (Kind.CLASSIFICATION, Kind.LOCALISATION)


class Judged(NamedTuple):
    """D detections of one or more images, and their G objects, without crowds."""

    scores: np.ndarray  # (D,)
    classes: np.ndarray  # (D,)
    kinds: np.ndarray  # (D,) Kind
    targets: np.ndarray  # (D,) the object that a wrong place or class is about; -1 for other kinds
    object_classes: np.ndarray  # (G,)
    found: np.ndarray  # (G,) bool
    missed: np.ndarray  # (G,) bool


def judge(
    overlaps: np.ndarray, scores: np.ndarray, classes: np.ndarray, object_classes: np.ndarray, crowd: np.ndarray
) -> Judged:
    """The kinds of one image's detections, and which of its objects they find.

    Args:
        overlaps: of each detection with each object: intersection over union, or with a crowd, over the detection,
            (D, G).
        scores: of the detections, the highest first, (D,).
        classes: of the detections, (D,).
        object_classes: (G,).
        crowd: whether it is one, (G,) bool.
    """
    same = classes[:, None] == object_classes
    ignored = (same & (overlaps >= FOUND))[:, crowd].any(axis=1)
    same, overlaps, object_classes = same[:, ~crowd], overlaps[:, ~crowd], object_classes[~crowd]
    own, other = np.where(same, overlaps, 0.0), np.where(same, 0.0, overlaps)
    best_own, best_other = own.max(axis=1, initial=0.0), other.max(axis=1, initial=0.0)
    finds = match(own)
    kinds = np.full(len(scores), Kind.BOTH, np.int8)
    for kind, applies in (  # each overrules those before
        (Kind.BACKGROUND, np.maximum(best_own, best_other) < GROUND),
        (Kind.DUPLICATE, best_own >= FOUND),
        (Kind.CLASSIFICATION, best_other >= FOUND),
        (Kind.LOCALISATION, (best_own >= GROUND) & (best_own < FOUND)),
        (Kind.IGNORED, ignored),
        (Kind.CORRECT, finds >= 0),
    ):
        kinds[applies] = kind
    targets = np.full(len(scores), -1)
    for kind, table in ((Kind.LOCALISATION, own), (Kind.CLASSIFICATION, other)):
        if (kinds == kind).any():
            targets[kinds == kind] = table[kinds == kind].argmax(axis=1)
    found, missed = np.zeros(len(object_classes), bool), np.ones(len(object_classes), bool)
    found[finds[finds >= 0]] = True
    missed[targets[targets >= 0]] = False
    return Judged(scores, classes, kinds, targets, object_classes, found, missed & ~found)


def match(overlaps: np.ndarray) -> np.ndarray:
    """The object that each detection finds, or -1, (D,).

    In turn each detection, the surest first, takes that object among those still left which it overlaps most, if by
    0.5 or more; of equals the last, as pycocotools has it.

    Args:
        overlaps: of each detection with each object of its class, 0 for others, (D, G); the surest first.
    """
    finds = np.full(len(overlaps), -1)
    left = np.ones(overlaps.shape[1])
    for place in np.flatnonzero((overlaps >= FOUND).any(axis=1)):
        candidates = (overlaps[place] * left)[::-1]
        best = int(candidates.argmax())
        if candidates[best] >= FOUND:
            finds[place] = len(left) - 1 - best
            left[finds[place]] = 0.0
    return finds


def join(images: Iterable[Judged]) -> Judged:
    """All images as one."""
    parts = list(images)
    starts = np.cumsum([0, *(len(part.object_classes) for part in parts[:-1])])
    shifted = [
        part._replace(targets=np.where(part.targets >= 0, part.targets + start, -1))
        for part, start in zip(parts, starts, strict=True)
    ]
    return Judged(*(np.concatenate(column) for column in zip(*shifted, strict=True)))


def counts(judged: Judged) -> dict[str, int]:
    """How many detections are of each kind, and how many objects are missed."""
    kinds = np.bincount(judged.kinds, minlength=len(Kind))
    kinds[Kind.MISSED] = judged.missed.sum()
    numbers = {"detections": len(judged.kinds), "objects": len(judged.object_classes)}
    return {**numbers, **{kind.name.lower(): int(kinds[kind]) for kind in Kind}}


def gains(judged: Judged, classes: int) -> dict[str, float]:
    """By how many points AP50 would rise with each kind of error, and no other, put right; never negative."""
    now = corrected_ap50(judged, classes, ())
    return {kind.name.lower(): 100 * (corrected_ap50(judged, classes, {kind}) - now) for kind in ERRORS}


def corrected_ap50(judged: Judged, classes: int, kinds: Collection[Kind]) -> float:
    """AP at an overlap of 0.5, in [0, 1], with all errors of these kinds put right; NaN without any object.

    Args:
        judged: the detections of all images.
        classes: their number K; a class is a number in [0, K). Those without objects do not count.
        kinds: the errors to put right.
    """
    winners = _winners(judged, kinds)
    kept = ~np.isin(judged.kinds, [Kind.IGNORED, *kinds])
    kept[winners] = True
    correct, found_class = judged.kinds == Kind.CORRECT, judged.classes.copy()
    correct[winners] = True
    found_class[winners] = judged.object_classes[judged.targets[winners]]
    counted = ~judged.missed if Kind.MISSED in kinds else np.ones(len(judged.missed), bool)
    objects = np.bincount(judged.object_classes[counted], minlength=classes)
    order = np.argsort(-judged.scores, kind="stable")
    order = order[kept[order]]
    averages = [
        average_precision(correct[order[found_class[order] == index]], objects[index])
        for index in np.unique(judged.object_classes)
    ]
    return float(np.mean(averages)) if averages else float("nan")


def _winners(judged: Judged, kinds: Collection[Kind]) -> np.ndarray:
    """Of the detections that would find an object not found otherwise, the surest for each object."""
    movable = np.flatnonzero(np.isin(judged.kinds, [kind for kind in MOVABLE if kind in kinds]))
    movable = movable[~judged.found[judged.targets[movable]]]
    order = movable[np.argsort(-judged.scores[movable], kind="stable")]
    _, first = np.unique(judged.targets[order], return_index=True)
    return order[first]
