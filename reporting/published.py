"""Published results of a recipe, as the head of its file in `configs/detection` lists them.

The comment names what is measured in parentheses, then has a row for each initialisation, indented, with its
words and numbers apart by two blanks or more, a bar between the tasks, and its source behind them if it differs:

    # Published, train2017 -> val2017 (He et al. 2020, table 5d; AP, AP50, AP75 of boxes | of masks):
    #     supervised ImageNet-1K  40.0  59.9  43.1  | 34.7  56.5  36.9
    #     MoCo, 200 epochs        81.5  55.9  62.6      MoCo, detection/README.md
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

Metric = tuple[str, str]  # task and name, as in results.json
TASKS = {"boxes": "bbox", "masks": "segm", "keypoints": "keypoints"}
MEASURED = re.compile(r"\((?P<source>[^()]*; )?(?P<metrics>AP[^()]*)\)")
ROW = re.compile(r"^ {3,}(?P<label>\S.*?) {2,}(?P<numbers>[-\d.|][-\d.| ]*?)(?: {2,}(?P<source>[^\d\s|-].*))?$")
SAME = "the same"  # as the row above


@dataclass(frozen=True)
class Published:
    """A row: what the encoder was, where it is reported, and percentages."""

    label: str
    source: str
    values: Mapping[Metric, float]


def of_recipe(name: object) -> list[Published]:
    """The published results of a recipe by its bare name; none if there is no such recipe, or it lists none."""
    path = Path(str(resources.files("configs"))) / "detection" / f"{name}.yaml"
    if not isinstance(name, str) or Path(name).name != name or not path.is_file():
        return []
    return parse(path.read_text())


def parse(text: str) -> list[Published]:
    """The rows in a recipe's comments."""
    rows: list[Published] = []
    metrics: list[list[Metric]] = []
    intro: list[str] = []  # of the rows that follow
    source = ""
    inside = False
    for line in text.splitlines():
        if not line.startswith("#"):
            inside = False
            continue
        words = line[1:]
        inside = inside or words.startswith(" Published,")
        match = ROW.match(words) if inside else None
        if match is None:
            intro = [*intro, words.strip()] if inside else []
            continue
        if intro:
            found = MEASURED.search(" ".join(intro))
            metrics = _metrics(found["metrics"]) if found else metrics
            source = _source(" ".join(intro))
            intro = []
        if match["source"] and match["source"] != SAME:
            source = match["source"]
        values = _values(match["numbers"], metrics)
        if values:
            rows.append(Published(match["label"], source, values))
    return rows


def _metrics(text: str) -> list[list[Metric]]:
    """The metrics of each task: `AP, AP50 of boxes | of masks` names those of the second by those of the first."""
    tasks = []
    names: list[str] = []
    for part in text.split("|"):
        listed, _, thing = part.strip().rpartition("of ")
        if thing not in TASKS:  # of one task only, which goes without saying
            listed, thing = thing, "boxes"
        names = [name.strip() for name in listed.split(",") if name.strip()] or names
        tasks.append([(TASKS[thing], name) for name in names])
    return tasks


def _values(text: str, metrics: Sequence[Sequence[Metric]]) -> dict[Metric, float]:
    values = {}
    for numbers, names in zip(text.split("|"), metrics, strict=False):
        for number, name in zip(numbers.split(), names, strict=False):
            if number != "-":
                values[name] = float(number)
    return values


def _source(intro: str) -> str:
    """What an introduction says besides the split and the metrics."""
    text = MEASURED.sub(lambda found: (found["source"] or "").removesuffix("; "), intro)
    return re.sub(r"^Published, .*? -> \S+", "", text).strip(" .:")
