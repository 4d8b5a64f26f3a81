"""What the evaluation of a detector measures: the metrics in results.json, and the parts of its analysis.json."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foundation.json_files import as_number
from foundation.run_kinds import Metric
from reporting.runs import ANALYSIS, CLASS_AP, Run, warn_once

FloatArray = NDArray[np.float64]
IOUS = {"0.5": "IoU 0.5", "0.75": "IoU 0.75", "mean": "mean over ten IoUs"}  # of a precision-recall curve
SIZES = {"APs": "small (below 32²)", "APm": "medium", "APl": "large (above 96²)"}  # areas in pixels of the image
VARIANTS = {"TTA": "test-time augmentation", "EMA": "the moving average of the weights"}  # by suffix of the task
ERRORS = ("classification", "localisation", "both", "duplicate", "background", "missed")

SCORE_DECIMALS = 4  # as evaluations store the best thresholds


@dataclass(frozen=True)
class Task:
    """One task of a detector.

    Attributes:
        name: its key in `results` and in analysis.json.
        title: of its plots.
        word: that stands before the name of a metric.
        metrics: their names, the most important first; a run need not have all.
        class_prefix: of the metric of a single class.
    """

    name: str
    title: str
    word: str
    metrics: tuple[str, ...]
    class_prefix: str = CLASS_AP

    def measured(self, runs: Iterable[Run]) -> tuple[Metric, ...]:
        """The metrics that a run names, even if their value is null; for VOC, AP50 comes first."""
        runs = list(runs)
        known = {key for run in runs for key in _results_of(run, self)}
        names = [name for name in self.metrics if name in known]
        if self.name == "bbox" and any(_is_voc(run) for run in runs):
            names.sort(key=lambda name: name != "AP50")
        return tuple(Metric(f"{self.word} {name}", ("results", self.name, name)) for name in names)

    def by_size(self, runs: Iterable[Run]) -> tuple[Metric, ...]:
        """AP of small, medium and large objects, if a run measured it."""
        metrics = [Metric(title, ("results", self.name, name)) for name, title in SIZES.items()]
        runs = list(runs)
        return tuple(each for each in metrics if any(run.measured(*each.path) is not None for run in runs))

    def of_classes(self, runs: Iterable[Run]) -> list[Metric]:
        """The metric of each single class that a run names."""
        keys = dict.fromkeys(key for run in runs for key in _results_of(run, self) if key.startswith(self.class_prefix))
        return [Metric(key.removeprefix(self.class_prefix), ("results", self.name, key)) for key in keys]


_AP = ("AP", "AP50", "AP75")
_LVIS = ("APr", "APc", "APf")  # rare, common, frequent classes
TASKS = (
    Task("bbox", "Boxes", "box", (*_AP, *_LVIS)),
    Task("segm", "Masks", "mask", (*_AP, *_LVIS)),
    Task("keypoints", "Keypoints", "keypoint", _AP),
    Task("sem_seg", "Semantic segmentation", "semantic", ("mIoU", "IoU", "pACC", "mACC", "iIoU"), class_prefix="IoU-"),
)


def variant(task: Task, suffix: str) -> Task:
    """The same task evaluated in another way, a key of `VARIANTS`."""
    return replace(task, name=f"{task.name}_{suffix}", word=f"{task.word} with {suffix},")


def measured_tasks(runs: Sequence[Run]) -> list[tuple[Task, tuple[Metric, ...]]]:
    """The tasks that runs were evaluated on, each with its metrics."""
    pairs = [(task, task.measured(runs)) for task in TASKS]
    return [(task, metrics) for task, metrics in pairs if metrics]


def online_accuracy(run: Run) -> dict[int, float]:
    """The accuracy of a pretraining's online probe by iteration, of the kind that it had; empty without a probe."""
    return run.series("knn_top1") or run.series("linear_top1")


def part(run: Run, task: Task, key: str) -> Mapping[str, Any]:
    """A part of a task's entry in analysis.json, such as `errors`; empty where there is none."""
    found = run.analysis.get(task.name, {}).get(key)
    return found if isinstance(found, dict) else {}


def analysed_tasks(runs: Sequence[Run], key: str) -> list[Task]:
    """The tasks for which a run has this part of the analysis."""
    return [task for task in TASKS if any(part(run, task, key) for run in runs)]


def notes(runs: Iterable[Run]) -> list[str]:
    """What the analyses say of their own numbers, each sentence once."""
    found = (run.analysis.get(task.name, {}).get("note") for run in runs for task in TASKS)
    return list(dict.fromkeys(note for note in found if isinstance(note, str)))


def precision_recall(run: Run, task: Task, key: str) -> tuple[FloatArray, FloatArray] | None:
    """Recall and precision at an IoU, a key of `IOUS`, both (R,); None where they were not measured."""
    curves = part(run, task, "precision_recall")
    recall, precision = number_list(curves.get("recall")), number_list(curves.get(key))
    if recall is None or precision is None or len(recall) != len(precision):
        if curves:
            warn_once(
                f"{run.path / run.predictions / ANALYSIS}: precision_recall needs equally long lists of numbers recall"
                f" and {key!r}"
            )
        return None
    return recall, precision


def threshold_curve(run: Run, task: Task, measure: str) -> tuple[FloatArray, FloatArray] | None:
    """Score thresholds and `precision`, `recall` or `f1` at each, both (T,); None where they were not measured.

    Precision is NaN where nothing is detected.
    """
    curve = part(run, task, "thresholds").get("curve")
    if not isinstance(curve, dict):
        return None
    scores, values = number_list(curve.get("score")), number_list(curve.get(measure), gaps=True)
    return None if scores is None or values is None or len(scores) != len(values) else (scores, values)


def best_thresholds(run: Run, task: Task) -> dict[str, Mapping[str, Any]]:
    """For each class with a best score threshold: `score`, `precision`, `recall` and `f1`, all in [0, 1]."""
    classes = part(run, task, "thresholds").get("classes")
    return {
        str(each["name"]): each
        for each in (classes if isinstance(classes, list) else ())
        if isinstance(each, dict)
        and "name" in each
        and all(as_number(each.get(key)) is not None for key in ("score", "precision", "recall", "f1"))
    }


def best_threshold(run: Run, task: Task) -> Mapping[str, Any] | None:
    """The score threshold with the best F1 over all classes, as for one class; None where it was not measured."""
    best = part(run, task, "thresholds").get("best")
    keys = ("score", "precision", "recall", "f1")
    return best if isinstance(best, dict) and all(as_number(best.get(key)) is not None for key in keys) else None


def score_text(score: float) -> str:
    """A score threshold, rounded down, so that who uses the printed one keeps the same detections."""
    shown = round(score, SCORE_DECIMALS)
    return f"{shown if shown <= score else shown - 10**-SCORE_DECIMALS:.{SCORE_DECIMALS}f}"


def confusion(run: Run, task: Task) -> tuple[list[str], NDArray[np.int64]] | None:
    """The names of the classes, with `background` as the last, and counts (K + 1, K + 1); None if not measured.

    Rows are the ground truth and columns the detections. The last row counts detections without an object, the last
    column objects that were missed.
    """
    found = part(run, task, "confusion")
    names, rows = found.get("names"), found.get("counts")
    if not isinstance(names, list) or not isinstance(rows, list) or len(names) != len(rows) or len(rows) < 2:
        return None
    lines = [number_list(row) for row in rows]
    if any(line is None or len(line) != len(names) or line.min() < 0 for line in lines):
        return None
    return [str(name) for name in names], np.array(lines).astype(np.int64)


def number_list(value: object, gaps: bool = False) -> FloatArray | None:
    """A list of finite numbers as an array (N,); None for anything else, and for an empty list.

    Args:
        gaps: whether null may stand in the list, which becomes NaN.
    """
    if not isinstance(value, list) or not value:
        return None
    numbers = [np.nan if gaps and each is None else as_number(each) for each in value]
    return None if None in numbers else np.array(numbers, dtype=np.float64)


def error_costs(runs: Iterable[Run], task: Task, kind: str) -> tuple[float, ...]:
    """For each run that has it: by how many points AP50 would rise without this kind of error."""
    costs = [as_number(part(run, task, "errors").get(kind)) for run in runs]
    return tuple(cost for cost in costs if cost is not None)


def class_sizes(runs: Iterable[Run], task: Task) -> dict[str, int]:
    """The number of objects of each class, from the first run with an analysis."""
    for run in runs:
        classes = run.analysis.get(task.name, {}).get("classes")
        if isinstance(classes, list):
            return {
                str(each["name"]): each["objects"]
                for each in classes
                if isinstance(each, dict) and "name" in each and isinstance(each.get("objects"), int)
            }
    return {}


def _results_of(run: Run, task: Task) -> Mapping[str, Any]:
    """What results.json says of a task."""
    results = run.results.get("results")
    found = results.get(task.name) if isinstance(results, dict) else None
    return found if isinstance(found, dict) else {}


def _is_voc(run: Run) -> bool:
    dataset = run.results.get("dataset")
    return isinstance(dataset, dict) and str(dataset.get("name", "")).startswith("voc_")
