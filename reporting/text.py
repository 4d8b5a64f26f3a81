"""What a report says: tables, and sentences that follow from their numbers alone."""

from collections.abc import Iterator, Sequence
from typing import Any

from reporting.columns import Column
from reporting.groups import (
    REPEAT_KEYS,
    Difference,
    Group,
    Setting,
    Statistic,
    difference,
    differing_keys,
)
from reporting.page import Block, Heading, Paragraph, Points, Table
from reporting.runs import Run

LONGEST_VALUE = 60  # letters of a config value that are shown


def summary(setting: Setting) -> list[Block]:
    """What a setting found, each number with the spread that it must be held against."""
    sentences = list(_comparisons(setting))
    return [Paragraph(f"{setting.kind.title}: {setting.name}"), Points(sentences)] if sentences else []


def pretraining_tables(setting: Setting) -> list[Block]:
    """What each pretraining run was, and how its loss and online accuracy ended."""
    header = ["run", "objective", "epochs", "batch", "seed", "iterations", "loss", "kNN top-1, %", "images/s"]
    rows = []
    for group in setting.groups:
        for run in group.runs:
            schedule = [run.config.get("TRAIN.EPOCHS"), run.config.get("TRAIN.BATCH_SIZE"), run.seed]
            words = [run.path.resolve().name, group.label, *map(_text, schedule)]
            rows.append(words + _pretraining_numbers(run))
    title = f"{setting.name}. Loss and online kNN accuracy: first value logged, and last. Images a second: mean."
    return [Table(header, rows, title, labels=5), *config_table(setting)]


def evaluation_tables(setting: Setting) -> list[Block]:
    """A setting's measurements with the differences to the baseline."""
    columns = setting.columns
    header = ["initialisation", "seeds", "runs", *(column.title for column in columns)]
    rows = [_measurements(group, columns) for group in setting.groups]
    others = setting.groups[1:]
    for group in others:
        cells = [signed_text(difference_to_baseline(setting, group, column)) for column in columns]
        rows.append([f"{group.label} − {setting.baseline.label}", "", "", *cells])
    title = f"{setting.name}. All numbers in percent"
    if any(len(group.runs) > 1 for group in setting.groups):
        title += ": mean ± sample standard deviation over runs"
        title += ", and for a difference the root of the sum of both variances" if others else ""
    if any("" in row[3:] for row in rows):
        title += ". An empty cell was not measured"
    table = Table(header, rows, f"{title}.", labels=2, summary=len(setting.groups) if others else None)
    return [table]


def run_table(runs: Sequence[Run]) -> list[Block]:
    """Every run that the report was made from."""
    rows = [[str(run.path), run.kind, run.init, _text(run.seed)] for run in runs]
    title = "What this page was made from."
    return [Heading("Runs"), Table(["directory", "kind", "initialisation", "seed"], rows, title, labels=4)]


def _comparisons(setting: Setting) -> Iterator[str]:
    base = setting.baseline
    for group in setting.groups[1:]:
        for column in setting.headline:
            reference, measured = base.statistic(column), group.statistic(column)
            if reference and measured:
                yield (
                    f"{column.heading}: {value_text(measured)} from {group.label} ({_count(measured)}),"
                    f" {value_text(reference)} from {base.label} ({_count(reference)}):"
                    f" {_verdict(group.label, base.label, reference, measured)}."
                )
        keys = [key for key in differing_keys([*base.runs, *group.runs]) if key not in REPEAT_KEYS]
        if keys:
            yield (
                f"{group.label} and {base.label} also differ in {', '.join(keys)}:"
                " the initialisation is not their only difference."
            )


def _verdict(name: str, base_name: str, base: Statistic, other: Statistic) -> str:
    """What two statistics say about each other, and no more."""
    gap = difference(base, other)
    by = f"a difference of {_number(gap.value, sign=True)}"
    if gap.spread is None:
        return f"{by}, of which the spread over seeds was not measured"
    if abs(gap.value) <= gap.spread:
        return f"{by}, within the spread ({_number(gap.spread)}): these runs do not tell the two apart"
    apart = ""
    if min(other.values) > max(base.values):
        apart = f"; every run of {name} is above every run of {base_name}"
    elif max(other.values) < min(base.values):
        apart = f"; every run of {name} is below every run of {base_name}"
    return f"{by}, more than the spread ({_number(gap.spread)}){apart}"


def _measurements(group: Group, columns: Sequence[Column]) -> list[str]:
    cells = [group.label, group.seeds, str(len(group.runs))]
    for column in columns:
        statistic = group.statistic(column)
        cells.append(value_text(statistic))
        if statistic and len(statistic.values) < len(group.runs):
            cells[-1] += f" (n = {len(statistic.values)})"
    return cells


def difference_to_baseline(setting: Setting, group: Group, column: Column) -> Difference | None:
    """By how much a group is above the baseline; None where one of them was not measured."""
    base, other = setting.baseline.statistic(column), group.statistic(column)
    return difference(base, other) if base and other else None


def _pretraining_numbers(run: Run) -> list[str]:
    total, accuracy = run.series("total"), run.series("knn_top1")
    speed = list(run.series("images_per_second").values())
    return [
        str(max(total) + 1) if total else "",
        _first_and_last(list(total.values())),
        _first_and_last(list(accuracy.values())),
        f"{sum(speed) / len(speed):.0f}" if speed else "",
    ]


def _first_and_last(values: Sequence[float]) -> str:
    if not values:
        return ""
    first, last = _number(values[0]), _number(values[-1])
    return f"{first} → {last}" if len(values) > 1 else last


def config_table(setting: Setting) -> list[Block]:
    """How the configs of a setting's runs differed."""
    runs = [run for group in setting.groups for run in group.runs]
    if sum(bool(run.config) for run in runs) < 2:
        return []
    keys = differing_keys(runs)
    if not keys:
        return [Paragraph(f"The configs of these {len(runs)} runs are equal ({setting.name}).")]
    rows = [[key, *(_values(group, key) for group in setting.groups)] for key in keys]
    header = ["config key", *(group.label for group in setting.groups)]
    return [Table(header, rows, f"Config values that differ between these runs ({setting.name}).", len(header))]


def _values(group: Group, key: str) -> str:
    return ", ".join(dict.fromkeys(_text(run.config.get(key)) for run in group.runs if run.config))


def _text(value: Any) -> str:
    if value is None:
        return ""
    text = str(value) or "(empty)"
    return text if len(text) <= LONGEST_VALUE else f"…{text[1 - LONGEST_VALUE :]}"


def value_text(statistic: Statistic | None) -> str:
    """Mean and spread; empty where nothing was measured."""
    if statistic is None:
        return ""
    spread = "" if statistic.spread is None else f" ± {_number(statistic.spread)}"
    return f"{_number(statistic.mean)}{spread}"


def _count(statistic: Statistic) -> str:
    count = len(statistic.values)
    return "1 run" if count == 1 else f"{count} runs"


def signed_text(gap: Difference | None) -> str:
    """A difference with its sign and spread; empty where nothing was measured."""
    if gap is None:
        return ""
    spread = "" if gap.spread is None else f" ± {_number(gap.spread)}"
    return f"{_number(gap.value, sign=True)}{spread}"


def _number(value: float, sign: bool = False) -> str:
    """One decimal, with a true minus."""
    text = f"{value:+.1f}" if sign else f"{value:.1f}"
    return text.replace("-0.0", "0.0").replace("+0.0", "0.0").replace("-", "−")
