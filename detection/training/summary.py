"""The results of a run in one line."""

import math
from collections.abc import Mapping

from foundation.names import counted

NAMES = {"bbox": "box", "segm": "mask", "keypoints": "keypoint", "sem_seg": "semantic"}
VARIANTS = {"_TTA": " with test-time augmentation", "_EMA": " of averaged weights"}
METRICS = ("AP", "mIoU", "IoU")  # the main one of each task
# AP below this cannot be distinguished from 0: with 100 images, the standard deviation of AP from the choice of the
# images alone is about 2.
LEAST_COMPARABLE = 2.0


def describe(results: Mapping[str, Mapping[str, float | None]], images: int) -> str:
    """The main metric of each task, as `box AP 2.6, mask AP 1.5 (120 images)`, and what to do if it is near 0.

    Args:
        results: metrics by task and name, in percent; NaN or None where there was nothing to evaluate.
        images: how many were evaluated.
    """
    parts, values = [], []
    for task, metrics in results.items():
        name = next((name for name in METRICS if name in metrics), None)
        if name is None:
            continue
        base, variant = task.removesuffix("_TTA").removesuffix("_EMA"), VARIANTS.get(task[-4:], "")
        label = f"{NAMES.get(base, base)} {name}{variant}"
        value = metrics[name]
        if value is None or math.isnan(value):
            parts.append(f"{label} not evaluated")
        else:
            parts.append(f"{label} {value:.1f}")
            values.append(value)
    line = f"{', '.join(parts)} ({counted(images, 'image')})"
    if values and max(values) < LEAST_COMPARABLE:
        line += (
            ". This is too low to compare initialisations: train longer (SOLVER.MAX_ITER) or on more images, and check"
            " the data with --check-data"
        )
    return line
