"""The plots of results and training: AP of each initialisation, AP over the number of labels, training curves."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from foundation.files import complete_file
from foundation.run_kinds import DETECTION, PRETRAIN, Metric
from reporting.analysis import FloatArray, online_accuracy
from reporting.groups import BASELINE, LabelCurve, Setting

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
MAX_IN_LINE = 4  # entries of a legend
MAX_LABEL = 40  # letters of an entry
SMOOTHED_SHARE = 0.1  # of the run that a point of the smoothed loss averages over
TERMS = {"total": "-", "big bang": "--", "attraction, weighted": ":"}  # of the loss, with their line styles
LEGEND_SHARE = 0.45  # of the height of the curves, added above them for the legend of the terms
Colours = Mapping[str, str]


def label_colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each initialisation, in the order of their first appearance."""
    others = [label for label in dict.fromkeys(labels) if label not in FIXED_COLOURS]
    return FIXED_COLOURS | {label: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, label in enumerate(others)}


def colours_of(settings: Sequence[Setting], colours: Colours) -> dict[str, str]:
    """The colours of the initialisations that settings have, in their order."""
    return {group.label: colours[group.label] for setting in settings for group in setting.groups}


@contextmanager
def panels(
    path: Path,
    title: str,
    names: Sequence[str],
    counts: Sequence[int],
    colours: Colours,
    size: tuple[float, float] = (4.2, 3.0),
    width: float = 0.0,
) -> Iterator[list[list[Axes]]]:
    """A figure with a title, to be filled and then written to `path`.

    Args:
        names: of the rows, written above them.
        counts: the number of panels of each row.
        colours: by label, for the legend at the bottom; empty for no legend.
        size: of a panel, in inches.
        width: of the figure, in inches, at least; that of two panels by default.

    Yields:
        The panels, row by row.
    """
    with rc_context(STYLE):  # type: ignore[arg-type]
        shape = (max(size[0] * max(counts), width or 2 * size[0]), 0.7 + (size[1] + 0.3) * len(names))
        figure = Figure(figsize=shape, layout="constrained")
        figure.suptitle(title, x=0.008, ha="left", fontsize=12, fontweight="bold")
        grid = []
        parts = figure.subfigures(len(names), 1, squeeze=False)[:, 0]
        for part, name, count in zip(parts, names, counts, strict=True):
            part.suptitle(name, x=0.008, ha="left", fontsize=9.5, color="#555555")
            grid.append(list(part.subplots(1, count, squeeze=False)[0]))
        yield grid
        if colours:
            handles = [Patch(color=colour, label=_cut(label)) for label, colour in colours.items()]
            figure.legend(handles=handles, loc="outside lower left", ncols=min(len(handles), MAX_IN_LINE))
        with complete_file(path) as draft:
            figure.savefig(draft, dpi=DPI)


def draw_transfer(settings: Sequence[Setting], colours: Colours, path: Path) -> bool:
    """Bars of what detectors reach: a row for each setting, a panel for each task. False if there is nothing."""
    rows = [setting for setting in settings if setting.kind.name == DETECTION and _is_measured(setting)]
    if not rows:
        return False
    names, counts = [setting.name for setting in rows], [len(setting.tasks) for setting in rows]
    title = "Detection and segmentation after fine-tuning"
    with panels(path, title, names, counts, colours_of(rows, colours)) as grid:
        for row, setting in zip(grid, rows, strict=True):
            for axes, (task, metrics) in zip(row, setting.tasks, strict=True):
                axes.set_title(task.title)
                _draw_bars(axes, setting, metrics[:BARS], colours)
            top = max(axes.get_ylim()[1] for axes in row)  # one scale, so that boxes and masks compare
            for axes in row:
                axes.set_ylim(0, top)
    return True


def draw_label_curves(curves: Sequence[LabelCurve], colours: Colours, path: Path) -> None:
    """The headline of each curve's tasks over the number of images; whiskers are the spread over runs."""
    names, counts = [curve.name for curve in curves], [len(curve.headline) for curve in curves]
    shown = {label: colours[label] for curve in curves for label in curve.labels}
    with panels(path, "AP over the number of labelled images", names, counts, shown) as grid:
        for row, curve in zip(grid, curves, strict=True):
            for axes, metric in zip(row, curve.headline, strict=True):
                axes.set_title(metric.heading)
                _draw_label_curve(axes, curve, metric, colours)


def draw_curves(settings: Sequence[Setting], colours: Colours, path: Path) -> bool:
    """A row of panels for pretraining and for each detection setting. False if there is nothing to draw."""
    kinds = (PRETRAIN, DETECTION)
    rows = [each for each in settings if each.kind.name in kinds and any(run.lines for run in each.runs)]
    if not rows:
        return False
    counts = [2 + _is_probed(each) if each.kind.name == PRETRAIN else 1 + len(each.tasks) for each in rows]
    names = [setting.name for setting in rows]
    with panels(path, "Training curves", names, counts, colours_of(rows, colours), size=(3.5, 2.7)) as grid:
        for row, setting in zip(grid, rows, strict=True):
            draw = _draw_pretraining if setting.kind.name == PRETRAIN else _draw_detection
            draw(row, setting, colours)
            _share_iterations(row)
    return True


def _share_iterations(row: Sequence[Axes]) -> None:
    """Give panels the axis of the whole training, so that a value which was measured once lies where that was."""
    last = max([1.0, *(float(axes.dataLim.x1) for axes in row if axes.lines)])
    for axes in row:
        axes.set_xlabel("iteration")
        if axes.lines:
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        axes.set_xlim(-0.02 * last, 1.02 * last)


def _cut(label: str) -> str:
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"


def _is_measured(setting: Setting) -> bool:
    return any(group.statistic(metric) for group in setting.groups for metric in setting.metrics)


def _draw_label_curve(axes: Axes, curve: LabelCurve, metric: Metric, colours: Colours) -> None:
    for label in curve.labels:
        points = curve.statistics(label, metric)
        means = [statistic.mean for statistic in points.values()]
        spreads = [statistic.spread or 0.0 for statistic in points.values()]
        axes.errorbar(list(points), means, spreads, fmt="o-", ms=5, lw=2, elinewidth=1, capsize=3, color=colours[label])
    axes.set_xscale("log")
    axes.set_xticks(list(curve.settings), [f"{images:,}" for images in curve.settings])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("labelled training images")
    axes.set_ylabel(f"{metric.path[-1]} (%)")
    axes.set_ylim(bottom=0)


def _draw_bars(axes: Axes, setting: Setting, metrics: Sequence[Metric], colours: Colours) -> None:
    """A place for each metric; whiskers are the spread, points the single runs."""
    width = 0.78 / len(setting.groups)
    for number, group in enumerate(setting.groups):
        offset = (number - (len(setting.groups) - 1) / 2) * width
        for position, metric in enumerate(metrics):
            statistic = group.statistic(metric)
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
    _mark_empty(axes)
    axes.set_xticks(range(len(metrics)), [metric.path[-1] for metric in metrics])
    axes.margins(y=0.12)
    axes.set_ylabel("average precision (%)" if all("AP" in each.path[-1] for each in metrics) else "percent")


def _is_probed(setting: Setting) -> bool:
    return any(online_accuracy(run) for group in setting.groups for run in group.runs)


def _draw_pretraining(row: Sequence[Axes], setting: Setting, colours: Colours) -> None:
    """The loss with its terms, the learning rate and, in a third panel, the online accuracy of each run."""
    loss, rate, *probe = row
    for group in setting.groups:
        colour = colours[group.label]
        for run in group.runs:
            # Other objectives have no such terms: they only measure CorInfoMax's.
            is_sum = run.config.get("OBJECTIVE.NAME", "corinfomax") == "corinfomax"
            total, big_bang = run.series("total"), run.series("big_bang") if is_sum else {}
            attraction = {i: value - big_bang[i] for i, value in total.items() if i in big_bang}
            for values, style in zip((total, big_bang, attraction), TERMS.values(), strict=True):
                _line(loss, values, colour, style)
            _line(rate, run.series("learning_rate"), colour, "-")
            for axes in probe:
                _line(axes, online_accuracy(run), colour, "o-")
    for axes, title in zip(row, ("Loss", "Learning rate", "Online accuracy"), strict=False):
        axes.set_title(title)
        _mark_empty(axes)
    for axes in probe:
        axes.set_ylabel("top-1 (%)")
    if loss.lines:
        handles = [Line2D([], [], color="#555555", ls=style, label=name) for name, style in TERMS.items()]
        low, high = loss.get_ylim()
        loss.set_ylim(low, high + LEGEND_SHARE * (high - low))  # room above the curves
        loss.legend(handles=handles, loc="upper right")
    rate.set_ylim(bottom=0)


def _line(axes: Axes, values: Mapping[int, float], colour: str, style: str) -> None:
    if values:
        axes.plot(list(values), list(values.values()), _visible(style, values), color=colour, lw=1.5, ms=4)


def _draw_detection(row: Sequence[Axes], setting: Setting, colours: Colours) -> None:
    """Each run as a thin line, the mean of a group as a thick one."""
    curves = [("total_loss", "Training loss, smoothed", "", "")]
    curves += [(metric.key, metric.heading, f"{metric.path[-1]} (%)", "o") for metric in setting.headline]
    for axes, (key, title, unit, marker) in zip(row, curves, strict=True):
        for group in setting.groups:
            series = [run.series(key) for run in group.runs]
            if key == "total_loss":
                series = [_smoothed(values) for values in series]
            _draw_group(axes, [values for values in series if values], colours[group.label], marker)
        axes.set_title(title)
        axes.set_ylabel(unit)
        highest = float(axes.dataLim.y1) if axes.lines else 0.0
        axes.set_ylim(0, 1.05 * highest if highest > 0 else 1)  # markers are not cut
        _mark_empty(axes)


def _draw_group(axes: Axes, series: Sequence[Mapping[int, float]], colour: str, marker: str) -> None:
    if not series:
        return
    if len(series) > 1:
        for values in series:
            style = _visible(f"{marker}-", values)
            axes.plot(list(values), list(values.values()), style, color=colour, lw=0.8, ms=2.5, alpha=0.4)
    shared = sorted(set.intersection(*(set(values) for values in series)))
    mean = [float(np.mean([values[i] for values in series])) for i in shared]
    axes.plot(shared, mean, _visible(f"{marker}-", shared), color=colour, lw=2, ms=5)


def _visible(style: str, values: Sized) -> str:
    """The style of a line; of a single value, which has no line, with a marker."""
    return style if len(values) > 1 or "o" in style else f"o{style}"


def _smoothed(values: Mapping[int, float]) -> dict[int, float]:
    """A centred moving average; at both ends over what there is."""
    half = round(len(values) * SMOOTHED_SHARE / 2)
    points: FloatArray = np.array(list(values.values()))
    return {iteration: float(points[max(0, i - half) : i + half + 1].mean()) for i, iteration in enumerate(values)}


def _mark_empty(axes: Axes) -> None:
    if not axes.lines and not axes.patches:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#888888")
