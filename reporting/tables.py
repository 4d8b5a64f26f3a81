"""The further tables of a report: published results, object sizes, classes, thresholds, errors, numbers of labels."""

from collections import Counter
from collections.abc import Sequence

from foundation.published import of_recipe
from foundation.run_kinds import Metric
from reporting.analysis import ERRORS, VARIANTS, Task, best_threshold, best_thresholds, class_sizes, score_text, variant
from reporting.diagnosis import analysed, error_cost
from reporting.groups import Group, LabelCurve, Setting, difference
from reporting.page import Block, Table
from reporting.runs import Run
from reporting.text import signed_text, value_text

MAX_CLASSES = 100  # that are all listed
FEW_CLASSES = 20  # otherwise so many from each end
MAX_COLUMNS = 8  # of the table of classes


def published_table(setting: Setting) -> list[Block]:
    """What is published for the setting's recipe, in the columns of its own table."""
    rows = of_recipe(setting.conditions[0], setting.kind.name)
    metrics = [metric for metric in setting.metrics if any(metric.key in row.values for row in rows)]
    if not metrics:
        return []
    columns = [_decimals_aligned([row.values.get(metric.key) for row in rows]) for metric in metrics]
    cells = [[row.label, row.source, *numbers] for row, *numbers in zip(rows, *columns, strict=True) if any(numbers)]
    title = f"Published for {setting.conditions[0]}, with all images and its whole schedule. Empty: not published."
    return [Table(["initialisation", "source", *(metric.title for metric in metrics)], cells, title, labels=2)]


def _decimals_aligned(numbers: Sequence[float | None]) -> list[str]:
    """Numbers with as many decimals as any of them has; empty for None."""
    decimals = max(len(f"{number:g}".partition(".")[2]) for number in numbers if number is not None)
    return ["" if number is None else f"{number:.{max(1, decimals)}f}" for number in numbers]


def size_table(setting: Setting) -> list[Block]:
    """AP by the size of objects: of each initialisation, and the difference of the others to the baseline."""
    tasks = [(task, task.by_size(setting.runs)) for task, _ in setting.tasks]
    tasks = [(task, metrics) for task, metrics in tasks if metrics]
    if not tasks:
        return []
    header = ["initialisation", *(f"{task.word}, {metric.title}" for task, metrics in tasks for metric in metrics)]
    every = [metric for _, metrics in tasks for metric in metrics]
    rows = [[group.label, *(value_text(group.statistic(metric)) for metric in every)] for group in setting.groups]
    for group in setting.groups[1:]:
        cells = [signed_text(setting.difference(group, metric)) for metric in every]
        rows.append([f"{group.label} − {setting.baseline.label}", *cells])
    summary = len(setting.groups) if len(setting.groups) > 1 else None
    title = f"AP by the area of the objects in pixels, in percent ({setting.name})."
    return [Table(header, rows, title, summary=summary)]


def variant_tables(setting: Setting) -> list[Block]:
    """The metrics with test-time augmentation and with averaged weights, and what each gains."""
    blocks: list[Block] = []
    for suffix, description in VARIANTS.items():
        pairs = [
            (Metric(metric.title, ("results", task.name, metric.path[-1])), metric)
            for task, _ in setting.tasks
            for metric in variant(task, suffix).measured(setting.runs)
        ]
        rows = [[group.label, *(_with_gain(group, *pair) for pair in pairs)] for group in setting.groups]
        title = f"With {description}, in percent; in parentheses the gain from it ({setting.name})."
        blocks += [Table(["initialisation", *(metric.title for _, metric in pairs)], rows, title)] if pairs else []
    return blocks


def _with_gain(group: Group, plain: Metric, other: Metric) -> str:
    before, after = group.statistic(plain), group.statistic(other)
    gain = f" ({difference(before, after).value:+.1f})".replace("-", "−") if before and after else ""
    return f"{value_text(after)}{gain}"


def best_table(setting: Setting) -> list[Block]:
    """The best checkpoint of each run beside its last one."""
    rows = []
    for group in setting.groups:
        for run in group.runs:
            best = run.results.get("best")
            value = run.measured("best", "value")
            if not isinstance(best, dict) or value is None:
                continue
            key = str(best.get("metric", ""))
            last = run.measured("results", *key.split("/", 1))
            seed = "" if run.seed is None else str(run.seed)
            cells = [
                f"{value:.1f}",
                f"{run.measured('best', 'iterations') or 0:,.0f}",
                "" if last is None else f"{last:.1f}",
            ]
            rows.append([group.label, seed, key, *cells])
    if not rows:
        return []
    title = (
        "The best checkpoint of each run by an evaluation during training. It is chosen on the evaluation set itself;"
        f" all other tables are of the last one, as the protocol has it ({setting.name})."
    )
    header = ["initialisation", "seed", "metric", "best (%)", "at iteration", "last (%)"]
    return [Table(header, rows, title, labels=3)]


def dataset_tables(settings: Sequence[Setting]) -> list[Block]:
    """Detectors that were evaluated on several sets: a table for each metric, with a column for each set."""
    by_training: dict[tuple[object, ...], list[Setting]] = {}
    for setting in settings:
        by_training.setdefault(setting.conditions[:3], []).append(setting)
    blocks: list[Block] = []
    for alike in by_training.values():
        counts = Counter(detector for setting in alike for detector in {run.detector for run in setting.runs})
        members = [setting for setting in alike if any(counts[run.detector] > 1 for run in setting.runs)]
        if not members:
            continue
        names = [setting.shortened[-1] for setting in members]
        for metric in dict.fromkeys(metric for setting in members for metric in setting.headline):
            rows = []
            for label in dict.fromkeys(group.label for setting in members for group in setting.groups):
                found = [next((each for each in one.groups if each.label == label), None) for one in members]
                rows.append([label, *("" if group is None else value_text(group.statistic(metric)) for group in found)])
            title = f"{metric.heading}, in percent, on several evaluation sets ({members[0].trained})."
            blocks.append(Table(["initialisation", *names], rows, title))
    return blocks


def threshold_table(setting: Setting) -> list[Block]:
    """The score threshold with the best F1, overall and by class, of the first run of each initialisation."""
    blocks: list[Block] = []
    for _, tasks in analysed([setting], "thresholds"):
        for task in tasks:
            rows = [row for group in setting.groups for row in _thresholds(group.label, group.runs[0], task)]
            title = (
                f"{task.title}: the score threshold with the best F1 at an IoU of 0.5, for all classes and for each"
                f" ({setting.name}). It is chosen on the evaluation set itself, so F1 on other images will be lower."
            )
            header = ["initialisation", "class", "threshold", "precision", "recall", "F1"]
            blocks += [Table(header, rows, title, labels=2)] if rows else []
    return blocks


def _thresholds(label: str, run: Run, task: Task) -> list[list[str]]:
    best, classes = best_threshold(run, task), best_thresholds(run, task)
    if len(classes) > MAX_CLASSES:
        classes = {}
    entries = ([("all", best)] if best else []) + list(classes.items())
    keys = ("precision", "recall", "f1")
    return [
        [label, name, score_text(float(entry["score"])), *(f"{float(entry[key]):.2f}" for key in keys)]
        for name, entry in entries
    ]


def class_table(setting: Setting) -> list[Block]:
    """AP of each class: of each initialisation, and for two or more the difference of the last to the baseline."""
    tasks = [(task, task.of_classes(setting.runs)) for task, _ in setting.tasks]
    tasks = [(task, metrics) for task, metrics in tasks if metrics]
    if not tasks:
        return []
    if len(tasks) * (len(setting.groups) + 1) > MAX_COLUMNS:
        tasks = tasks[:1]
    compared = setting.groups[-1] if len(setting.groups) > 1 else None
    order, note = _order(setting, tasks[0][1])
    sizes = class_sizes(setting.runs, tasks[0][0])
    header = ["class", "objects"] if sizes else ["class"]
    for task, _ in tasks:
        header += [f"{group.label}, {task.word}" for group in setting.groups]
        header += [f"{compared.label} − {setting.baseline.label}, {task.word}"] if compared else []
    rows = []
    for name in order:
        row = [name, f"{sizes[name]:,}" if name in sizes else ""] if sizes else [name]
        for _, metrics in tasks:
            metric = next((each for each in metrics if each.title == name), None)
            row += [value_text(group.statistic(metric)) if metric else "" for group in setting.groups]
            if compared:
                row.append(signed_text(setting.difference(compared, metric)) if metric else "")
        rows.append(row)
    name = tasks[0][0].class_prefix.rstrip("-")
    return [Table(header, rows, f"{name} of each class, {note} ({setting.name}).")]


def _order(setting: Setting, metrics: Sequence[Metric]) -> tuple[list[str], str]:
    """The classes by what the last initialisation gains on the baseline, or by AP where there is but one."""

    def key(metric: Metric) -> float:
        if len(setting.groups) > 1:
            gap = setting.difference(setting.groups[-1], metric)
            return gap.value if gap else float("-inf")
        statistic = setting.baseline.statistic(metric)
        return statistic.mean if statistic else float("-inf")

    names = [metric.title for metric in sorted(metrics, key=key, reverse=True)]
    note = "the greatest gain first" if len(setting.groups) > 1 else "the best first"
    if len(names) > MAX_CLASSES:
        note += f"; of {len(names)} classes the first and last {FEW_CLASSES}"
        names = names[:FEW_CLASSES] + names[-FEW_CLASSES:]
    return names, note


def error_tables(settings: Sequence[Setting]) -> list[Block]:
    """What each kind of error costs, in points of AP50."""
    blocks: list[Block] = []
    for setting, tasks in analysed(settings, "errors"):
        for task in tasks:
            rows = [
                [group.label, *(value_text(error_cost(group, task, kind)) for kind in ERRORS)]
                for group in setting.groups
            ]
            title = f"{task.title}: by how many points AP50 would rise without this kind of error ({setting.name})."
            blocks.append(Table(["initialisation", *ERRORS], rows, title))
    return blocks


def label_tables(curves: Sequence[LabelCurve]) -> list[Block]:
    """What each initialisation reaches with each number of labelled images."""
    blocks: list[Block] = []
    for curve in curves:
        for metric in curve.headline:
            rows = []
            for label in curve.labels:
                found = curve.statistics(label, metric)
                rows.append([label, *(value_text(found.get(images)) for images in curve.settings)])
            header = ["training images", *(f"{images:,}" for images in curve.settings)]
            title = f"{metric.heading}, in percent ({curve.name})."
            blocks.append(Table(header, rows, title))
    return blocks
