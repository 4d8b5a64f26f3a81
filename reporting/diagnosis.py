"""The plots behind one AP: precision over recall, errors by kind, score thresholds and confusions between classes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from reporting.analysis import (
    ERRORS,
    IOUS,
    Task,
    analysed_tasks,
    best_threshold,
    confusion,
    error_costs,
    precision_recall,
    threshold_curve,
)
from reporting.figures import Colours, colours_of, panels
from reporting.groups import Group, Setting, Statistic
from reporting.runs import Run

MAX_NAMED_CLASSES = 30  # of a confusion matrix with the names of its classes
MAX_WRITTEN_CLASSES = 12  # of one with the shares written into its cells
MAX_CLASS_NAME = 18  # letters
PANEL = 3.2  # inches: a side of a panel of a confusion matrix
NAMES_WIDTH = 0.6  # inches: the names at the left of a matrix take more than those below it
LEAST_WIDTH = 6.0  # inches, of a figure of matrices: for its title
EMPTY_ROW = "#ececec"  # of a class without objects


def analysed(settings: Sequence[Setting], key: str) -> list[tuple[Setting, list[Task]]]:
    """The settings, each with the tasks, for which a run has this part of the analysis."""
    pairs = [(setting, analysed_tasks(setting.runs, key)) for setting in settings]
    return [(setting, tasks) for setting, tasks in pairs if tasks]


def draw_precision(settings: Sequence[Setting], colours: Colours, path: Path) -> bool:
    """Precision over recall: a row for each setting and task, a panel for each IoU. False if there is none."""
    rows = [(setting, task) for setting, tasks in analysed(settings, "precision_recall") for task in tasks]
    return _draw_curves(rows, colours, path, "Precision over recall", IOUS, precision_recall, ("recall", "precision"))


def draw_thresholds(settings: Sequence[Setting], colours: Colours, path: Path) -> bool:
    """Precision, recall and F1 over the score threshold: a row for each setting and task. False if there is none."""
    rows = [(setting, task) for setting, tasks in analysed(settings, "thresholds") for task in tasks]
    measures = {"precision": "Precision", "recall": "Recall", "f1": "F1"}
    title = "Precision, recall and F1 over the score threshold"
    return _draw_curves(rows, colours, path, title, measures, threshold_curve, ("score threshold", ""), _best_point)


def _best_point(run: Run, task: Task, measure: str) -> tuple[float, float] | None:
    """The best score threshold of a run and the measure there."""
    best = best_threshold(run, task)
    return (float(best["score"]), float(best[measure])) if best else None


def _draw_curves(
    rows: Sequence[tuple[Setting, Task]],
    colours: Colours,
    path: Path,
    title: str,
    columns: Mapping[str, str],
    curve_of: Callable[[Run, Task, str], tuple[np.ndarray, np.ndarray] | None],
    labels: tuple[str, str],
    point_of: Callable[[Run, Task, str], tuple[float, float] | None] = lambda *_: None,
) -> bool:
    """Curves in the unit square: a row of panels for each setting and task. False if there is no row.

    Args:
        rows: the settings and tasks.
        colours: of the groups.
        path: of the picture.
        title: of the picture.
        columns: key -> title of each panel of a row.
        curve_of: (run, task, key) -> x and y, or None.
        labels: of the axes; that of y is written once for each row.
        point_of: (run, task, key) -> x and y of a point that is marked, or None.
    """
    if not rows:
        return False
    names, shown = _row_names(rows), colours_of([setting for setting, _ in rows], colours)
    with panels(path, title, names, [len(columns)] * len(rows), shown, size=(3.2, 2.8)) as grid:
        for row, (setting, task) in zip(grid, rows, strict=True):
            for axes, (key, heading) in zip(row, columns.items(), strict=True):
                for group in setting.groups:
                    curves = [curve for run in group.runs if (curve := curve_of(run, task, key)) is not None]
                    _draw_runs(axes, curves, colours[group.label])
                    for point in filter(None, (point_of(run, task, key) for run in group.runs)):
                        axes.plot(*point, "o", ms=4, mfc=colours[group.label], mec="white", mew=0.7, clip_on=False)
                axes.set_title(heading)
                axes.set_xlabel(labels[0])
                axes.set(xlim=(0, 1), ylim=(0, 1.02))
            row[0].set_ylabel(labels[1])
    return True


def draw_errors(settings: Sequence[Setting], colours: Colours, path: Path) -> bool:
    """Bars of what each kind of error costs: a row for each setting, a panel for each task. False if there is none."""
    rows = analysed(settings, "errors")
    if not rows:
        return False
    names, counts = [setting.name for setting, _ in rows], [len(tasks) for _, tasks in rows]
    shown = colours_of([setting for setting, _ in rows], colours)
    with panels(path, "Cost of each kind of error", names, counts, shown, size=(5.0, 3.0)) as grid:
        for row, (setting, tasks) in zip(grid, rows, strict=True):
            for axes, task in zip(row, tasks, strict=True):
                axes.set_title(task.title)
                _draw_errors(axes, setting, task, colours)
    return True


def draw_confusion(settings: Sequence[Setting], path: Path) -> bool:
    """Confusion matrices: a row for each setting, a panel for each initialisation. False if there is none.

    Each is of the group's first run that has one, of boxes, or of masks where boxes were not evaluated.
    """
    rows: list[tuple[Setting, list[tuple[Group, list[str], np.ndarray]]]] = []
    for setting, tasks in analysed(settings, "confusion"):
        found = [(group, matrix) for group in setting.groups for matrix in [_first_matrix(group, tasks[0])] if matrix]
        rows += [(setting, [(group, *matrix) for group, matrix in found])] if found else []
    if not rows:
        return False
    most = max(len(names) for _, matrices in rows for _, names, _ in matrices)
    side = min(6.5, max(PANEL, 1.6 + 0.3 * most))
    titles, counts = [setting.name for setting, _ in rows], [len(matrices) for _, matrices in rows]
    size = (side + NAMES_WIDTH, side)
    with panels(path, "Confusions between classes", titles, counts, {}, size, LEAST_WIDTH) as grid:
        for row, (_, matrices) in zip(grid, rows, strict=True):
            for axes, (group, names, counted) in zip(row, matrices, strict=True):
                axes.set_title(group.label)
                _draw_matrix(axes, names, counted)
    return True


def error_cost(group: Group, task: Task, kind: str) -> Statistic | None:
    """By how many points AP50 would rise without this kind of error; None where no run has it."""
    costs = error_costs(group.runs, task, kind)
    return Statistic(costs) if costs else None


def _row_names(rows: Sequence[tuple[Setting, Task]]) -> list[str]:
    return [f"{task.title}: {setting.name}" for setting, task in rows]


def _first_matrix(group: Group, task: Task) -> tuple[list[str], np.ndarray] | None:
    return next((found for run in group.runs if (found := confusion(run, task)) is not None), None)


def _draw_runs(axes: Axes, lines: Sequence[tuple[np.ndarray, np.ndarray]], colour: str) -> None:
    """Each run as a thin line; their mean as a thick one, if all have the same abscissae."""
    if len(lines) > 1:
        for x, y in lines:
            axes.plot(x, y, color=colour, lw=0.8, alpha=0.4)
    shared = [(x, y) for x, y in lines if np.array_equal(x, lines[0][0])]
    if shared:
        axes.plot(shared[0][0], np.mean([y for _, y in shared], axis=0), color=colour, lw=2)


def _draw_errors(axes: Axes, setting: Setting, task: Task, colours: Colours) -> None:
    width = 0.78 / len(setting.groups)
    for number, group in enumerate(setting.groups):
        offset = (number - (len(setting.groups) - 1) / 2) * width
        for position, kind in enumerate(ERRORS):
            statistic = error_cost(group, task, kind)
            if statistic is None:
                continue
            x = position + offset
            axes.bar(x, statistic.mean, width * 0.92, color=colours[group.label])
            if statistic.spread is not None:
                axes.errorbar(x, statistic.mean, statistic.spread, color="#1a1a1a", capsize=2, linewidth=1)
    axes.set_xticks(range(len(ERRORS)), ERRORS, fontsize=8)
    axes.set_ylabel("points of AP50")
    axes.set_ylim(bottom=0)


def _draw_matrix(axes: Axes, names: Sequence[str], counts: np.ndarray) -> None:
    """Shares of each row, (K + 1, K + 1); the last row and column stand for the background. A row of none is grey."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    empty: list[int] = np.nonzero(totals[:, 0] == 0)[0].tolist()
    axes.set_facecolor(EMPTY_ROW)
    axes.imshow(
        np.ma.masked_where(np.broadcast_to(totals == 0, shares.shape), shares), "Blues", aspect="auto", vmin=0, vmax=1
    )
    axes.grid(visible=False)
    if len(names) <= MAX_NAMED_CLASSES:
        labels = [name if len(name) <= MAX_CLASS_NAME else f"{name[: MAX_CLASS_NAME - 1]}…" for name in names]
        axes.set_xticks(range(len(names)), [*labels[:-1], "missed"], rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), [*labels[:-1], "no object"], fontsize=7)
    if len(names) <= MAX_WRITTEN_CLASSES:
        for row, column in np.argwhere(counts > 0):
            ink = "white" if shares[row, column] > 0.6 else "#1a1a1a"
            axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", fontsize=7, color=ink)
        for row in empty:
            text = "no objects" if row < len(names) - 1 else "none"
            axes.text((len(names) - 1) / 2, row, text, ha="center", va="center", fontsize=7, color="#6b6b6b")
    axes.set_xlabel("detected as (cells: % of the row)")
    axes.set_ylabel("ground truth")
