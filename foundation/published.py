"""Published results of the recipes, from `configs/published.yaml`, and how a measured number compares with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from foundation.config import config_folder
from foundation.yaml_files import read_yaml

REFERENCE = "CorInfoMax"
TOLERANCE = 1e-9  # numbers of two decimals differ by exactly a margin only up to rounding


@dataclass(frozen=True)
class Published:
    """A row of a published table, restricted to one recipe.

    Attributes:
        label: the method or initialisation.
        source: where it is published.
        values: percentages by metric, named as in results.json: `linear_top1`, `bbox/AP`.
        margins: by metric, the difference from which on two results differ significantly, where the source has it.
    """

    label: str
    source: str
    values: Mapping[str, float]
    margins: Mapping[str, float]


def of_recipe(recipe: object, command: str) -> list[Published]:
    """The published results of a recipe, by its bare name; empty if there are none.

    Args:
        recipe: such as `cifar10_R18`.
        command: whose recipe it is, as the `kind` in results.json: `linear`, `finetune` or `detection`.
    """
    rows = []
    for table in _tables():
        if table["command"] != command:
            continue
        places = [place for place, column in enumerate(table["columns"]) if column["recipe"] == recipe]
        metrics = {table["columns"][place]["metric"]: place for place in places}
        margins = {name: table["columns"][place].get("margin") for name, place in metrics.items()}
        for label, numbers in table["rows"].items() if places else ():
            values = {name: numbers[place] for name, place in metrics.items() if numbers[place] is not None}
            known = {name: margin for name, margin in margins.items() if margin is not None}
            if values:
                rows.append(Published(label, table["source"], values, known))
    return rows


def compare(value: float, recipe: object, command: str, metric: str, label: str = REFERENCE) -> str | None:
    """A measured percentage beside the published one, such as `71.30: within the margin of 71.61 (CorInfoMax, ...)`.

    Args:
        value: in percent.
        recipe, command: as for `of_recipe`.
        metric: as in `Published.values`.
        label: the published row to compare with, or the name of an objective (`barlow_twins`); case does not count.

    Returns:
        None where nothing is published of this label, recipe and metric.
    """
    for row in of_recipe(recipe, command):
        if row.label.lower() == label.replace("_", " ").lower() and metric in row.values:
            relation = _relation(value, row.values[metric], row.margins.get(metric))
            return f"{value:.2f}: {relation} ({row.label}, {row.source})"
    return None


def _relation(value: float, published: float, margin: float | None) -> str:
    gap = abs(value - published)
    if margin is None:
        side = "above" if value > published else "below"
        return f"equal to {published:.2f}" if gap < TOLERANCE else f"{gap:.2f} {side} {published:.2f}"
    if gap < margin - TOLERANCE:
        return f"within the margin of {published:.2f}"
    side = "above" if value > published else "below"
    return f"{gap:.2f} {side} {published:.2f}, not within the margin of {margin:.2f}"


@cache
def _tables() -> list[dict[str, Any]]:
    content: dict[str, list[dict[str, Any]]] = read_yaml(config_folder("published.yaml"))
    return content["tables"]
