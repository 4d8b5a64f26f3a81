"""Precision as a function of recall, as COCO takes it, and average precision."""

import numpy as np

RECALLS = np.linspace(0, 1, 101)


def interpolated_precision(correct: np.ndarray, objects: int) -> np.ndarray:
    """Precision at the 101 recalls, (101,): the best at this recall or any higher one; 0 beyond the highest.

    Args:
        correct: for each detection, the surest first, whether it found an object, (D,) bool.
        objects: how many there are to be found, at least one.
    """
    found = np.cumsum(correct)
    precision = found / np.arange(1, len(correct) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(found / objects, RECALLS)
    return np.append(best, 0.0)[np.minimum(place, len(best))]


def average_precision(correct: np.ndarray, objects: int) -> float:
    """COCO's, in [0, 1]. Where nothing is left to be found it is 1 if nothing is detected, else 0."""
    if objects == 0:
        return float(len(correct) == 0)
    return float(interpolated_precision(correct, objects).mean())


def curves(precision: np.ndarray, overlaps: np.ndarray) -> dict[str, list[float]]:
    """Precision at each recall, averaged over the classes that have objects.

    Args:
        precision: of an evaluation, at each overlap, recall and class, (T, 101, K); -1 for a class without objects.
        overlaps: the T least overlaps of a detection with an object, 0.5 and 0.75 among them.

    Returns:
        `recall`, and the precision at an overlap of `0.5`, of `0.75`, and their `mean` over all T; each 101 numbers,
        or none where no class has objects.
    """
    there = precision[:, :, (precision > -1).all(axis=(0, 1))]
    if not there.size:
        return {"recall": RECALLS.tolist(), "0.5": [], "0.75": [], "mean": []}
    at = {f"{level:g}": int(np.argmin(np.abs(overlaps - level))) for level in (0.5, 0.75)}
    return {
        "recall": RECALLS.tolist(),
        **{name: there[place].mean(axis=1).tolist() for name, place in at.items()},
        "mean": there.mean(axis=(0, 2)).tolist(),
    }
