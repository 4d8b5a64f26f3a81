"""What lies behind one AP: precision over recall, errors by kind, and how AP grows with the number of labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from foundation.errors import UserError
from reporting.columns import TASKS, Column, Task
from reporting.figures import DPI, STYLE, Colours, Points, add_legend, panels
from reporting.groups import Group, Setting, Statistic
from reporting.runs import Run

CURVES = {"0.5": "overlap 0.5", "0.75": "overlap 0.75", "mean": "mean of ten overlaps"}
KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")


@dataclass(frozen=True)
class LabelCurve:
    """One recipe and evaluation set with several numbers of training images.

    Attributes:
        settings: by the number of images, ascending.
    """

    recipe: str
    dataset: str
    settings: Mapping[int, Setting]

    @property
    def labels(self) -> list[str]:
        """The initialisations, in the order of their first appearance."""
        return list(dict.fromkeys(group.label for setting in self.settings.values() for group in setting.groups))

    @property
    def headline(self) -> list[Column]:
        """The columns that any of the settings is about."""
        return list(dict.fromkeys(column for setting in self.settings.values() for column in setting.headline))

    @property
    def is_line(self) -> bool:
        """Whether an initialisation was measured with more than one number of images."""
        return any(len(self.statistics(label, column)) > 1 for label in self.labels for column in self.headline)

    def statistics(self, label: str, column: Column) -> dict[int, Statistic]:
        """What an initialisation reached, by the number of images, where it was measured."""
        found = {}
        for images, setting in self.settings.items():
            for group in setting.groups:
                statistic = group.statistic(column) if group.label == label else None
                if statistic:
                    found[images] = statistic
        return found


def label_curves(settings: Sequence[Setting]) -> list[LabelCurve]:
    """The recipes that were trained on several numbers of images; of several schedules on one, the longest."""
    by_recipe: dict[tuple[str, str], dict[int, Setting]] = {}
    for setting in settings:
        if setting.kind.name != "detection":
            continue
        recipe, dataset, images, iterations = setting.conditions
        if not isinstance(images, int) or not isinstance(iterations, int) or images < 1:
            continue
        found = by_recipe.setdefault((str(recipe), str(dataset)), {})
        before = found.get(images)
        if before is None or before.conditions[3] < iterations:  # type: ignore[operator]
            found[images] = setting
    curves = [
        LabelCurve(recipe, dataset, dict(sorted(found.items()))) for (recipe, dataset), found in by_recipe.items()
    ]
    return [curve for curve in curves if curve.is_line]


def leading(settings: Sequence[Setting]) -> list[Setting]:
    """The settings without those that a label curve sums up: of each curve only the one with the most images."""
    curves = label_curves(settings)
    last = [list(curve.settings.values())[-1] for curve in curves]
    summed = {(curve.recipe, curve.dataset) for curve in curves}
    return [
        each
        for each in settings
        if each in last or each.kind.name != "detection" or tuple(map(str, each.conditions[:2])) not in summed
    ]


def draw_label_curves(curves: Sequence[LabelCurve], colours: Colours, path: Path) -> None:
    """The headline of each curve's tasks over the number of images; whiskers are the spread over runs."""
    rows = [next(iter(curve.settings.values())) for curve in curves]
    counts = [len(curve.headline) for curve in curves]
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(4.2 * max(*counts, 1.2), 0.35 + 3.2 * len(rows)), layout="constrained")
        for row, curve in zip(panels(figure, rows, counts, named=False), curves, strict=True):
            for axes, column in zip(row, curve.headline, strict=True):
                _draw_label_curve(axes, curve, column, colours)
                axes.set_title(column.heading if len(curves) == 1 else f"{column.heading}: {curve.recipe}")
        add_legend(figure, [setting for curve in curves for setting in curve.settings.values()], colours)
        figure.savefig(path, dpi=DPI)


def _draw_label_curve(axes: Axes, curve: LabelCurve, column: Column, colours: Colours) -> None:
    for label in curve.labels:
        points = curve.statistics(label, column)
        means = [statistic.mean for statistic in points.values()]
        spreads = [statistic.spread or 0.0 for statistic in points.values()]
        axes.errorbar(list(points), means, spreads, fmt="o-", ms=5, lw=2, elinewidth=1, capsize=3, color=colours[label])
    axes.set_xscale("log")
    axes.set_xticks(list(curve.settings), [f"{images:,}" for images in curve.settings])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("labelled training images")
    axes.set_ylabel("%")
    axes.set_ylim(bottom=0)


def analysed(settings: Sequence[Setting], key: str) -> list[tuple[Setting, list[Task]]]:
    """The settings, each with the tasks, for which a run has this part of its analysis."""
    found = []
    for setting in settings:
        tasks = [task for task in TASKS if any(_part(run, task, key) for run in setting.runs)]
        if tasks:
            found.append((setting, tasks))
    return found


def draw_precision(settings: Sequence[Setting], colours: Colours, path: Path) -> bool:
    """Precision over recall: a row for each setting and task, a panel for each overlap. False if there is none."""
    rows = [(setting, task) for setting, tasks in analysed(settings, "precision_recall") for task in tasks]
    if not rows:
        return False
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(3.2 * len(CURVES), 0.35 + 2.8 * len(rows)), layout="constrained")
        owners = [setting for setting, _ in rows]
        named = len(set(map(id, owners))) > 1
        grid = panels(figure, owners, [len(CURVES)] * len(rows), named=named)
        for row, (setting, task) in zip(grid, rows, strict=True):
            for axes, (key, title) in zip(row, CURVES.items(), strict=True):
                for group in setting.groups:
                    _draw_precision(axes, group, task, key, colours[group.label])
                axes.set_title(f"{task.title}, {title}")
                axes.set_xlabel("recall")
                axes.set(xlim=(0, 1), ylim=(0, 1.02))
            row[0].set_ylabel("precision")
        add_legend(figure, owners, colours)
        figure.savefig(path, dpi=DPI)
    return True


def _draw_precision(axes: Axes, group: Group, task: Task, key: str, colour: str) -> None:
    """Each run as a thin line, the mean as a thick one. Precision where nothing is recalled is 0."""
    lines = []
    for run in group.runs:
        curves = _part(run, task, "precision_recall")
        if curves:
            lines.append((_numbers(run, curves, "recall"), _numbers(run, curves, key)))
    for recall, precision in lines:
        axes.plot(recall, precision, color=colour, lw=0.8, alpha=0.4 if len(lines) > 1 else 0.0)
    if lines:
        axes.plot(lines[0][0], np.mean([precision for _, precision in lines], axis=0), color=colour, lw=2)


def draw_errors(settings: Sequence[Setting], colours: Colours, path: Path) -> bool:
    """Bars of what each kind of error costs: a row for each setting, a panel for each task. False if there is none."""
    rows = analysed(settings, "errors")
    if not rows:
        return False
    counts = [len(tasks) for _, tasks in rows]
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(5.0 * max(*counts, 1.2), 0.35 + 3.0 * len(rows)), layout="constrained")
        owners = [setting for setting, _ in rows]
        for row, (setting, tasks) in zip(panels(figure, owners, counts, named=len(rows) > 1), rows, strict=True):
            for axes, task in zip(row, tasks, strict=True):
                axes.set_title(task.title)
                _draw_errors(axes, setting, task, colours)
        add_legend(figure, owners, colours)
        figure.savefig(path, dpi=DPI)
    return True


def _draw_errors(axes: Axes, setting: Setting, task: Task, colours: Colours) -> None:
    width = 0.78 / len(setting.groups)
    for number, group in enumerate(setting.groups):
        offset = (number - (len(setting.groups) - 1) / 2) * width
        for position, kind in enumerate(KINDS):
            statistic = error_cost(group, task, kind)
            if statistic is None:
                continue
            axes.bar(position + offset, statistic.mean, width * 0.92, color=colours[group.label])
            if statistic.spread is not None:
                axes.errorbar(
                    position + offset, statistic.mean, statistic.spread, color="#1a1a1a", capsize=2, linewidth=1
                )
    axes.set_xticks(range(len(KINDS)), KINDS, fontsize=8)
    axes.set_ylabel("points of AP50")
    axes.set_ylim(bottom=0)


def error_cost(group: Group, task: Task, kind: str) -> Statistic | None:
    """By how many points AP50 would rise without this kind of error; None where no run has it."""
    values = []
    for run in group.runs:
        errors = _part(run, task, "errors")
        cost = errors.get(kind) if errors is not None else None
        if isinstance(cost, int | float):
            values.append(float(cost))
    return Statistic(tuple(values)) if values else None


def class_sizes(runs: Sequence[Run], task: Task) -> dict[str, int]:
    """The number of objects of each class, as the first run with an analysis has it."""
    for run in runs:
        classes = (run.analysis.get(task.name) or {}).get("classes")
        if isinstance(classes, list):
            return {str(each["name"]): int(each["objects"]) for each in classes if {"name", "objects"} <= each.keys()}
    return {}


def _part(run: Run, task: Task, key: str) -> Mapping[str, object] | None:
    part = (run.analysis.get(task.name) or {}).get(key)
    return part if isinstance(part, dict) and part else None


def _numbers(run: Run, curves: Mapping[str, object], key: str) -> Points:
    try:
        return np.array(curves[key], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        path = run.path / "predictions" / "analysis.json"
        raise UserError(f"{path} is damaged: precision_recall needs a list of numbers {key!r}") from error
