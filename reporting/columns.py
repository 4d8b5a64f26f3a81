"""What evaluations measure: the numbers of results.json, and which of them a table shows of a setting."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reporting.runs import Run


@dataclass(frozen=True)
class Column:
    """A number of results.json, and what a table calls it."""

    title: str
    path: tuple[str, ...]

    @property
    def heading(self) -> str:
        """The title with a capital letter first, but for the names that have none."""
        return self.title if self.title.startswith("kNN") else self.title[0].upper() + self.title[1:]


@dataclass(frozen=True)
class Task:
    """What one evaluation measures.

    Attributes:
        name: its key in `results`.
        title: of its plots.
        word: that stands before a metric's name.
        metrics: their names, those first that are spoken of most; a run need not have all.
        classes: what the metric of a single class begins with.
    """

    name: str
    title: str
    word: str
    metrics: tuple[str, ...]
    classes: str = "AP-"

    def columns(self, runs: Iterable[Run]) -> tuple[Column, ...]:
        """The metrics that a run names, be it as not measured (null); of a dataset like VOC AP50 comes first."""
        there = [run for run in runs if isinstance(run.results.get("results"), dict)]
        known = {key for run in there for key in (run.results["results"].get(self.name) or {})}
        metrics = [name for name in self.metrics if name in known]
        if self.name == "bbox" and any(is_voc(run) for run in there):
            metrics.sort(key=lambda name: name != "AP50")
        return tuple(Column(f"{self.word} {name}", ("results", self.name, name)) for name in metrics)


_AP = ("AP", "AP50", "AP75")
_LVIS = ("APr", "APc", "APf")  # rare, common, frequent classes
TASKS = (
    Task("bbox", "Boxes", "box", (*_AP, *_LVIS)),
    Task("segm", "Masks", "mask", (*_AP, *_LVIS)),
    Task("keypoints", "Keypoints", "keypoint", _AP),
    Task("sem_seg", "Semantic segmentation", "semantic", ("mIoU", "IoU", "pACC", "mACC", "iIoU"), classes="IoU-"),
)


def is_voc(run: Run) -> bool:
    """Whether a run was evaluated on VOC, whose tables are led by AP50."""
    dataset = run.results.get("dataset")
    return isinstance(dataset, dict) and str(dataset.get("name", "")).startswith("voc_")


def measured_tasks(runs: Sequence[Run]) -> list[tuple[Task, tuple[Column, ...]]]:
    """The tasks that runs were evaluated on, each with its columns."""
    pairs = [(task, task.columns(runs)) for task in TASKS]
    return [(task, columns) for task, columns in pairs if columns]


def class_columns(task: Task, runs: Sequence[Run]) -> list[Column]:
    """The metric of each single class that runs name."""
    named: dict[str, None] = {}
    for run in runs:
        results = run.results.get("results")
        named |= dict.fromkeys((results.get(task.name) or {}) if isinstance(results, dict) else ())
    start = task.classes
    keys = [key for key in named if key.startswith(start)]
    return [Column(key.removeprefix(start), ("results", task.name, key)) for key in keys]
