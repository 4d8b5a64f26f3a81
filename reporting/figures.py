"""The plots of a report: AP of each initialisation, and the curves of training."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from reporting.columns import Column
from reporting.groups import BASELINE, Group, Setting
from reporting.runs import PRETRAIN

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "text.parse_math": False,  # names may hold a dollar sign
}
# Okabe and Ito's palette, which readers with any colour vision tell apart. Two names have the same in every report.
FIXED_COLOURS = {BASELINE: "#767676", "corinfomax": "#0072b2"}
OTHER_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DPI = 200
BARS = 3  # of a task
MOST_IN_LINE = 5  # entries of a legend
SMOOTHED_SHARE = 0.1  # of the run that a point of the smoothed loss averages over
Colours = Mapping[str, str]
Points = NDArray[np.float64]


def label_colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each initialisation, in the order of their first appearance."""
    others = [label for label in dict.fromkeys(labels) if label not in FIXED_COLOURS]
    return FIXED_COLOURS | {label: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, label in enumerate(others)}


def draw_transfer(settings: Sequence[Setting], colours: Colours, path: Path) -> bool:
    """Bars of what detectors reach: a row for each setting, a panel for each task. False if there is nothing."""
    rows = [setting for setting in settings if setting.kind.name == "detection" and _is_measured(setting)]
    if not rows:
        return False
    most = max(len(setting.tasks) for setting in rows)
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(4.2 * max(most, 1.2), 0.35 + 3.0 * len(rows)), layout="constrained")
        counts = [len(setting.tasks) for setting in rows]
        for row, setting in zip(panels(figure, rows, counts, named=len(rows) > 1), rows, strict=True):
            for axes, (task, columns) in zip(row, setting.tasks, strict=True):
                axes.set_title(task.title)
                _draw_bars(axes, setting, columns[:BARS], colours)
            top = max(axes.get_ylim()[1] for axes in row)  # one scale, so that boxes and masks compare
            for axes in row:
                axes.set_ylim(0, top)
        add_legend(figure, rows, colours)
        figure.savefig(path, dpi=DPI)
    return True


def panels(figure: Figure, rows: Sequence[Setting], counts: Sequence[int], named: bool) -> list[list[Axes]]:
    """A row of so many axes for each setting, under its name where rows must be told apart."""
    grid = []
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, setting, count in zip(parts, rows, counts, strict=True):
        if named:
            part.suptitle(setting.name, x=0.008, ha="left", fontsize=9.5, color="#555555")
        grid.append(list(part.subplots(1, count, squeeze=False)[0]))
    return grid


def add_legend(figure: Figure, settings: Sequence[Setting], colours: Colours) -> None:
    """The initialisations and their colours, above all panels."""
    labels = dict.fromkeys(group.label for setting in settings for group in setting.groups)
    handles = [Patch(color=colours[label], label=label) for label in labels]
    figure.legend(handles=handles, loc="outside upper right", ncols=min(len(handles), MOST_IN_LINE))


def _is_measured(setting: Setting) -> bool:
    return any(group.statistic(column) for group in setting.groups for column in setting.columns)


def _draw_bars(axes: Axes, setting: Setting, columns: Sequence[Column], colours: Colours) -> None:
    """A place for each column; whiskers are the spread, points the single runs."""
    width = 0.78 / len(setting.groups)
    for number, group in enumerate(setting.groups):
        offset = (number - (len(setting.groups) - 1) / 2) * width
        for position, column in enumerate(columns):
            statistic = group.statistic(column)
            if statistic is None:
                continue
            x, spread = position + offset, statistic.spread or 0.0
            axes.bar(x, statistic.mean, width * 0.92, color=colours[group.label])
            if statistic.spread is not None:
                axes.errorbar(x, statistic.mean, spread, color="#1a1a1a", capsize=3, linewidth=1)
                points = np.linspace(-0.2, 0.2, len(statistic.values)) * width
                axes.plot(x + points, statistic.values, "o", ms=3, mfc="white", mec="#1a1a1a", mew=0.7)
            highest = max(statistic.mean + spread, *statistic.values)
            axes.annotate(
                f"{statistic.mean:.1f}",
                (x, highest),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=8 if len(setting.groups) < 4 else 6.5,
            )
    if not axes.patches:
        _say_not_measured(axes)
    axes.set_xticks(range(len(columns)), [column.path[-1] for column in columns])
    axes.margins(y=0.12)
    axes.set_ylabel("%")


def draw_curves(settings: Sequence[Setting], colours: Colours, path: Path) -> bool:
    """A row of panels for pretraining and for each detection setting. False if there is nothing to draw."""
    rows = [
        setting
        for setting in settings
        if setting.kind.name in (PRETRAIN, "detection") and any(run.lines for run in setting.runs)
    ]
    if not rows:
        return False
    counts = [3 if setting.kind.name == PRETRAIN else 1 + len(setting.tasks) for setting in rows]
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(3.5 * max(counts), 0.35 + 2.7 * len(rows)), layout="constrained")
        # Of one pretraining and one detection setting, the panels' titles say which is which.
        for row, setting in zip(panels(figure, rows, counts, named=len(rows) > 2), rows, strict=True):
            draw = _draw_pretraining if setting.kind.name == PRETRAIN else _draw_detection
            draw(row, setting, colours)
            for axes in row:
                axes.set_xlabel("iteration")
                axes.margins(x=0.02)
        figure.savefig(path, dpi=DPI)
    return True


def _draw_pretraining(row: Sequence[Axes], setting: Setting, colours: Colours) -> None:
    terms, rate, probe = row
    for group in setting.groups:
        colour = colours[group.label]
        for number, run in enumerate(group.runs):
            total, big_bang = run.series("total"), run.series("big_bang")
            attraction = {i: value - big_bang[i] for i, value in total.items() if i in big_bang}
            for name, values, style in (
                ("total", total, "-"),
                ("big bang", big_bang, "--"),
                ("attraction, weighted", attraction, ":"),
            ):
                _line(terms, values, colour, style, f"{group.label}: {name}" if not number else "")
            _line(rate, run.series("learning_rate"), colour, "-", group.label if not number else "")
            _line(probe, run.series("knn_top1"), colour, "o-", group.label if not number else "")
    for axes, title in zip(row, ("Pretraining loss", "Learning rate", "Online kNN top-1, %"), strict=True):
        axes.set_title(title)
        _finish(axes)
    rate.set_ylim(bottom=0)


def _line(axes: Axes, values: Mapping[int, float], colour: str, style: str, label: str) -> None:
    if not values:
        return
    axes.plot(list(values), list(values.values()), style, color=colour, lw=1.5, ms=4, label=label or "_")


def _draw_detection(row: Sequence[Axes], setting: Setting, colours: Colours) -> None:
    """Each run as a thin line, the mean of a group as a thick one."""
    curves = [("total_loss", "Detection loss, smoothed", "")]
    curves += [("/".join(column.path[1:]), f"{column.heading}, %", "o") for column in setting.headline]
    for axes, (key, title, marker) in zip(row, curves, strict=True):
        for group in setting.groups:
            series = [run.series(key) for run in group.runs]
            if key == "total_loss":
                series = [_smoothed(values) for values in series]
            _draw_group(axes, group, [values for values in series if values], colours[group.label], marker)
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        _finish(axes)


def _draw_group(axes: Axes, group: Group, series: Sequence[Mapping[int, float]], colour: str, marker: str) -> None:
    if not series:
        return
    if len(series) > 1:
        for values in series:
            axes.plot(list(values), list(values.values()), f"{marker}-", color=colour, lw=0.8, ms=2.5, alpha=0.4)
    shared = sorted(set.intersection(*(set(values) for values in series)))
    mean = [float(np.mean([values[i] for values in series])) for i in shared]
    axes.plot(shared, mean, f"{marker}-", color=colour, lw=2, ms=5, label=group.label)


def _smoothed(values: Mapping[int, float]) -> dict[int, float]:
    """A centred moving average; at both ends over what there is."""
    half = round(len(values) * SMOOTHED_SHARE / 2)
    points: Points = np.array(list(values.values()))
    return {iteration: float(points[max(0, i - half) : i + half + 1].mean()) for i, iteration in enumerate(values)}


def _finish(axes: Axes) -> None:
    """A legend, if there is a line."""
    if axes.lines:
        axes.legend(fontsize=8)
    else:
        _say_not_measured(axes)


def _say_not_measured(axes: Axes) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#888888")
