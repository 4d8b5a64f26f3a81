"""The main tables of a report, and the sentences that follow from their numbers."""

from collections.abc import Iterator, Sequence
from typing import Any

from foundation import published
from foundation.names import counted, short_names
from foundation.run_kinds import PRETRAIN, Metric
from reporting.analysis import online_accuracy
from reporting.groups import (
    REPEAT_KEYS,
    Difference,
    Group,
    Setting,
    Statistic,
    difference,
    differing_keys,
    shared_keys,
)
from reporting.page import Block, BulletList, Heading, Paragraph, Table
from reporting.runs import Run, Skipped

LONGEST_VALUE = 60  # letters of a config value that are shown
IDENTITY_KEYS = ("weights", "encoder_sha256", "images")  # of results.json
COMPARED_WITH_PUBLISHED = ("linear", "finetune")  # in a sentence; for detectors there is only the table


def summary(setting: Setting) -> list[Block]:
    """The differences to the baseline with their spread, and to published numbers, as sentences."""
    sentences = [*_comparisons(setting), *_published_sentences(setting)]
    return [Paragraph(f"{setting.kind.title}: {setting.name}"), BulletList(sentences)] if sentences else []


def pretraining_tables(setting: Setting) -> list[Block]:
    """The schedule of each pretraining run, with its first and last loss and online accuracy."""
    probed = any(online_accuracy(run) for run in setting.runs)
    header = ["run", "objective", "epochs", "batch", "seed", "iterations", "loss"]
    header += [*(["online top-1 (%)"] if probed else []), "images/s"]
    paths = [run.path for run in setting.runs]
    names = dict(zip(paths, short_names([path.resolve() for path in paths]), strict=True))
    rows = []
    for group in setting.groups:
        for run in group.runs:
            schedule = [run.config.get("TRAIN.EPOCHS"), run.config.get("TRAIN.BATCH_SIZE"), run.seed]
            words = [names[run.path], group.label, *map(_text, schedule)]
            rows.append(words + _pretraining_numbers(run, probed))
    logged = "Loss and accuracy of the online probe" if probed else "Loss"
    title = f"{setting.name}. {logged}: first value logged, and last. Images a second: mean."
    return [Table(header, rows, title, labels=5)]


def evaluation_tables(setting: Setting) -> list[Block]:
    """A setting's measurements with the differences to the baseline."""
    metrics = setting.metrics
    header = ["initialisation", "seeds", "runs", *(metric.title for metric in metrics)]
    rows = [_measurements(group, metrics) for group in setting.groups]
    others = setting.groups[1:]
    for group in others:
        cells = [signed_text(setting.difference(group, metric)) for metric in metrics]
        rows.append([f"{group.label} − {setting.baseline.label}", "", "", *cells])
    title = f"{setting.name}. All numbers in percent"
    if any(len(group.runs) > 1 for group in setting.groups):
        title += ": mean ± sample standard deviation over runs"
        title += ", and for a difference the root of the sum of both variances" if others else ""
    if any("" in row[3:] for row in rows):
        title += ". An empty cell was not measured"
    table = Table(header, rows, f"{title}.", labels=2, summary=len(setting.groups) if others else None)
    return [table]


def repeat_table(setting: Setting) -> list[Block]:
    """What differs between runs that are averaged as repetitions, except seeds and the places of files."""
    rows = []
    for group in setting.groups:
        for key, values in _differing_values(group).items():
            words = [
                f"{_text(each) or '(none)'} (seed {run.seed})" for each, run in zip(values, group.runs, strict=True)
            ]
            rows.append([group.label, key, "; ".join(words)])
    if not rows:
        return []
    title = f"Runs that are averaged as repetitions of one another differ in these values too ({setting.name})."
    return [Table(["initialisation", "key", "values"], rows, title, labels=3)]


def run_table(runs: Sequence[Run], skipped: Sequence[Skipped]) -> list[Block]:
    """Every run that was found: those that the report was made from, and those that it leaves out."""
    folders = {run.path: run for run in runs}  # a run with several evaluation sets is listed once
    rows = [[str(path), run.kind.name, run.init, _text(run.seed), run.state] for path, run in folders.items()]
    rows += [[str(run.path), run.kind, "", "", f"left out: {run.reason}"] for run in skipped]
    title = "The runs that this page was made from" + (", and those that were left out." if skipped else ".")
    return [Heading("Runs"), Table(["folder", "kind", "initialisation", "seed", "state"], rows, title, labels=5)]


def _published_sentences(setting: Setting) -> Iterator[str]:
    """The mean of each initialisation beside the number that is published for it, where there is one."""
    if setting.kind.name not in COMPARED_WITH_PUBLISHED:
        return
    for group in setting.groups:
        for metric in setting.headline:
            statistic = group.statistic(metric)
            if statistic is not None:
                recipe, command = setting.conditions[0], setting.kind.name
                text = published.compare(statistic.mean, recipe, command, metric.key, group.runs[0].init)
                if text is not None:
                    yield f"{metric.heading} of {group.label}, {text}."


def _differing_values(group: Group) -> dict[str, list[Any]]:
    """By key of config.yaml or results.json, the values of the runs of a group, one for each, where they differ."""
    keys = [key for key in differing_keys(group.runs) if key != "SEED"]
    values: dict[str, list[Any]] = {key: [run.config.get(key) for run in group.runs] for key in keys}
    for key in IDENTITY_KEYS:
        found = [run.results.get(key) for run in group.runs]
        is_known = key == "weights" and "MODEL.WEIGHTS" in values
        if len(set(map(str, found))) > 1 and not is_known:
            values[key] = found
    return values


def _comparisons(setting: Setting) -> Iterator[str]:
    base = setting.baseline
    for group in setting.groups[1:]:
        for metric in setting.headline:
            reference, measured = base.statistic(metric), group.statistic(metric)
            if reference and measured:
                yield (
                    f"{metric.heading}: {value_text(measured)} from {group.label} ({_count(measured)}),"
                    f" {value_text(reference)} from {base.label} ({_count(reference)}):"
                    f" {_difference_text(group.label, base.label, reference, measured)}."
                )
        runs = [*base.runs, *group.runs]
        counted = shared_keys(runs) - REPEAT_KEYS
        keys = [key for key in differing_keys(runs) if key in counted]
        if keys and setting.kind.name != PRETRAIN:
            yield (
                f"{group.label} and {base.label} also differ in {', '.join(keys)}:"
                " the initialisation is not their only difference."
            )


def _difference_text(name: str, base_name: str, base: Statistic, other: Statistic) -> str:
    """The difference of two means beside its spread, as a sentence."""
    gap = difference(base, other)
    by = f"a difference of {_number(gap.value, sign=True)}"
    if gap.spread is None:
        return f"{by}; its spread over seeds was not measured"
    if abs(gap.value) <= gap.spread:
        return f"{by}, within the spread ({_number(gap.spread)}): these runs do not tell the two apart"
    apart = ""
    if min(other.values) > max(base.values):
        apart = f"; every run of {name} is above every run of {base_name}"
    elif max(other.values) < min(base.values):
        apart = f"; every run of {name} is below every run of {base_name}"
    return f"{by}, more than the spread ({_number(gap.spread)}){apart}"


def _measurements(group: Group, metrics: Sequence[Metric]) -> list[str]:
    cells = [group.label, group.seeds, str(len(group.runs))]
    for metric in metrics:
        statistic = group.statistic(metric)
        cells.append(value_text(statistic))
        if statistic and len(statistic.values) < len(group.runs):
            cells[-1] += f" (n = {len(statistic.values)})"
    return cells


def _pretraining_numbers(run: Run, probed: bool) -> list[str]:
    """Iterations, loss, the online accuracy where a run of the table has one, and the speed."""
    total, speed = run.series("total"), list(run.series("images_per_second").values())
    return [
        str(max(total) + 1) if total else "",
        _first_and_last(list(total.values())),
        *([_first_and_last(list(online_accuracy(run).values()))] if probed else []),
        f"{sum(speed) / len(speed):.0f}" if speed else "",
    ]


def _first_and_last(values: Sequence[float]) -> str:
    if not values:
        return ""
    first, last = _number(values[0]), _number(values[-1])
    return f"{first} → {last}" if len(values) > 1 else last


def config_table(setting: Setting) -> list[Block]:
    """The config values that differ between the runs of a setting."""
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
    return counted(len(statistic.values), "run")


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
