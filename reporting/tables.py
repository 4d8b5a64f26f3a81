"""Tables of a report behind the main one: published results, classes, errors by kind, numbers of labels."""

from collections.abc import Sequence

from reporting.columns import Column, class_columns
from reporting.diagnosis import KINDS, LabelCurve, analysed, class_sizes, error_cost
from reporting.groups import Setting
from reporting.page import Block, Table
from reporting.published import of_recipe
from reporting.text import difference_to_baseline, signed_text, value_text

MOST_CLASSES = 100  # that are all listed
FEW_CLASSES = 20  # else these many from each end
MOST_COLUMNS = 8  # of classes


def published_table(setting: Setting) -> list[Block]:
    """What is published for the setting's recipe, in the columns of its own table."""
    rows = of_recipe(setting.conditions[0])
    columns = setting.columns
    if not rows or not columns:
        return []
    cells = []
    for row in rows:
        numbers = [row.values.get((column.path[1], column.path[2])) for column in columns]
        cells.append([row.label, row.source, *("" if number is None else f"{number:.1f}" for number in numbers)])
    title = f"Published for {setting.conditions[0]}, with all images and its whole schedule. Empty: not published."
    return [Table(["initialisation", "source", *(column.title for column in columns)], cells, title, labels=2)]


def class_table(setting: Setting) -> list[Block]:
    """AP of each class: of each initialisation, and for two or more the difference of the last to the baseline."""
    tasks = [(task, class_columns(task, setting.runs)) for task, _ in setting.tasks]
    tasks = [(task, columns) for task, columns in tasks if columns]
    if not tasks:
        return []
    if len(tasks) * (len(setting.groups) + 1) > MOST_COLUMNS:
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
        for _, columns in tasks:
            column = next((each for each in columns if each.title == name), None)
            row += [value_text(group.statistic(column)) if column else "" for group in setting.groups]
            if compared:
                row.append(signed_text(difference_to_baseline(setting, compared, column)) if column else "")
        rows.append(row)
    metric = tasks[0][0].classes.rstrip("-")
    return [Table(header, rows, f"{metric} of each class, {note} ({setting.name}).")]


def _order(setting: Setting, columns: Sequence[Column]) -> tuple[list[str], str]:
    """The classes by what the last initialisation gains on the baseline, or by AP where there is but one."""

    def key(column: Column) -> float:
        if len(setting.groups) > 1:
            gap = difference_to_baseline(setting, setting.groups[-1], column)
            return gap.value if gap else float("-inf")
        statistic = setting.baseline.statistic(column)
        return statistic.mean if statistic else float("-inf")

    names = [column.title for column in sorted(columns, key=key, reverse=True)]
    note = "the greatest gain first" if len(setting.groups) > 1 else "the best first"
    if len(names) > MOST_CLASSES:
        note += f"; of {len(names)} classes the first and last {FEW_CLASSES}"
        names = names[:FEW_CLASSES] + names[-FEW_CLASSES:]
    return names, note


def error_tables(settings: Sequence[Setting]) -> list[Block]:
    """What each kind of error costs, in points of AP50."""
    blocks: list[Block] = []
    for setting, tasks in analysed(settings, "errors"):
        for task in tasks:
            rows = [
                [group.label, *(value_text(error_cost(group, task, kind)) for kind in KINDS)]
                for group in setting.groups
            ]
            title = f"{task.title}: by how many points AP50 would rise without this kind of error ({setting.name})."
            blocks.append(Table(["initialisation", *KINDS], rows, title))
    return blocks


def label_tables(curves: Sequence[LabelCurve]) -> list[Block]:
    """What each initialisation reaches with each number of labelled images."""
    blocks: list[Block] = []
    for curve in curves:
        for column in curve.headline:
            rows = []
            for label in curve.labels:
                found = curve.statistics(label, column)
                rows.append([label, *(value_text(found.get(images)) for images in curve.settings)])
            header = ["training images", *(f"{images:,}" for images in curve.settings)]
            title = f"{column.heading}, in percent: {curve.recipe} evaluated on {curve.dataset}."
            blocks.append(Table(header, rows, title))
    return blocks
