"""Which runs are compared, which repeat one another, and the statistics over them.

A setting is one experiment: the same recipe, schedule and data. In it, a group is one initialisation, with a
run for each seed.
"""

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundation.names import legible, short_names
from foundation.run_kinds import DETECTION, KINDS, PRETRAIN, Metric, RunKind
from reporting.analysis import Task, measured_tasks
from reporting.runs import Run, warn_once

BASELINE = "random"
WHERE_KEYS = {"OUTPUT_DIR"}  # config keys that only say where a run's files are
DATASET_KEYS = (("DATA.NAME",), ("dataset",))  # conditions that name a dataset of images
NAMED_BY_ROOT = ("folder", "webdataset")  # these datasets are told apart by their place only
REPEAT_KEYS = {  # may differ between repetitions of one experiment: chance, origin of the weights, machine, bookkeeping
    *("SEED", "DATASETS.FRACTION_SEED", "MODEL.WEIGHTS", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS"),
    *(
        "DATA.ROOT",
        "DATA.WORKERS",
        "LOG.PERIOD",
        "LOG.WANDB",
        "LOG.PICTURES",
        "PROBE.EVERY",
        "CHECKPOINT.MINUTES",
        "CHECKPOINT.STEPS",
    ),
    *("SOLVER.CHECKPOINT_PERIOD", "SOLVER.KEEP_CHECKPOINTS", "TEST.EVAL_PERIOD"),
    "DATASETS.CLASSES",  # follows from the training set; not every run has noted it
}


@dataclass(frozen=True)
class Statistic:
    """A number measured once or several times."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The sample standard deviation; None of a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """Of two means.

    Attributes:
        spread: the standard deviation of a difference of single runs; None if it is not known.
    """

    value: float
    spread: float | None


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only. `label` is unique among the groups that it is compared with."""

    label: str
    runs: tuple[Run, ...]

    def statistic(self, metric: Metric) -> Statistic | None:
        """Of the runs that measured it; None if none did."""
        values = [run.measured(*metric.path) for run in self.runs]
        there = tuple(value for value in values if value is not None)
        return Statistic(there) if there else None

    @property
    def seeds(self) -> str:
        """The seeds, in order; where one occurs twice, each with that of its encoder's pretraining."""
        known = [run for run in self.runs if run.seed is not None]
        if len({run.seed for run in known}) == len(known):
            return ", ".join(str(run.seed) for run in known)
        return ", ".join(f"{run.seed} (pretraining {run.pretrained.get('SEED', '?')})" for run in known)


@dataclass(frozen=True)
class Setting:
    """Groups that are compared, the baseline first.

    Attributes:
        conditions: the values that all runs have in common, in the order of `kind.conditions`.
        shortened: the same as texts, without the folders of paths; empty where a value is not known.
    """

    kind: RunKind
    conditions: tuple[object, ...]
    groups: tuple[Group, ...]
    shortened: tuple[str, ...]

    @property
    def name(self) -> str:
        """The conditions in words."""
        return self._describe(len(self.shortened))

    @property
    def trained(self) -> str:
        """Of detectors: the conditions of their training in words."""
        return self._describe(3)

    @property
    def runs(self) -> list[Run]:
        """Of all groups."""
        return [run for group in self.groups for run in group.runs]

    @property
    def tasks(self) -> list[tuple[Task, tuple[Metric, ...]]]:
        """Of detectors, what they were evaluated on, with the metrics of each; else none."""
        return measured_tasks(self.runs) if self.kind.name == DETECTION else []

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What a run measured or, of a detector, names as not measured."""
        of_detectors = tuple(metric for _, metrics in self.tasks for metric in metrics)
        return of_detectors or tuple(metric for metric in self.kind.metrics if self._is_measured(metric))

    @property
    def headline(self) -> tuple[Metric, ...]:
        """The metrics that sentences and curves are about: the first of each task."""
        return self.kind.headline or tuple(metrics[0] for _, metrics in self.tasks)

    @property
    def baseline(self) -> Group:
        """The group that others are compared with: random initialisation, or else the first that was named."""
        return self.groups[0]

    def difference(self, group: Group, metric: Metric) -> Difference | None:
        """By how much a group is above the baseline; None where one of them was not measured."""
        base, other = self.baseline.statistic(metric), group.statistic(metric)
        return difference(base, other) if base and other else None

    def _describe(self, count: int) -> str:
        """The first conditions in words; those that are not known are left out, except the first."""
        pairs = list(zip(self.kind.wording, self.shortened, strict=True))[:count]
        first, rest = pairs[0], [(wording, value) for wording, value in pairs[1:] if value]
        return "".join(wording.format(value or "?") for wording, value in (first, *rest))

    def _is_measured(self, metric: Metric) -> bool:
        return any(run.measured(*metric.path) is not None for run in self.runs)


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
    def name(self) -> str:
        """The recipe and evaluation set in words."""
        return f"{self.recipe}, evaluated on {short_dataset(self.dataset)}"

    @property
    def labels(self) -> list[str]:
        """The initialisations, in the order of their first appearance."""
        return list(dict.fromkeys(group.label for setting in self.settings.values() for group in setting.groups))

    @property
    def headline(self) -> list[Metric]:
        """The metrics that any of the settings is about."""
        return list(dict.fromkeys(metric for setting in self.settings.values() for metric in setting.headline))

    @property
    def is_line(self) -> bool:
        """Whether an initialisation was measured with more than one number of images."""
        return any(len(self.statistics(label, metric)) > 1 for label in self.labels for metric in self.headline)

    def statistics(self, label: str, metric: Metric) -> dict[int, Statistic]:
        """What an initialisation reached, by the number of images, where it was measured."""
        found = {}
        for images, setting in self.settings.items():
            for group in setting.groups:
                statistic = group.statistic(metric) if group.label == label else None
                if statistic:
                    found[images] = statistic
        return found


def difference(base: Statistic, other: Statistic) -> Difference:
    """`other` minus `base`. The runs are independent, so their variances add up."""
    known = base.spread is not None and other.spread is not None
    spread = math.hypot(base.spread or 0.0, other.spread or 0.0) if known else None
    return Difference(other.mean - base.mean, spread)


def settings(runs: Sequence[Run]) -> list[Setting]:
    """The runs by kind, conditions and initialisation; kinds in the order of their table."""
    found = []
    for kind in KINDS.values():
        by_conditions: dict[tuple[object, ...], list[Run]] = {}
        for run in runs:
            if run.kind.name == kind.name:
                by_conditions.setdefault(_conditions(run, kind), []).append(run)
        short = _short_values(by_conditions)
        of_kind = [
            Setting(kind, conditions, tuple(_groups(members)), _shorten(kind, conditions, short))
            for conditions, members in by_conditions.items()
        ]
        found += _in_order(of_kind)
    return found


def label_curves(settings: Sequence[Setting]) -> list[LabelCurve]:
    """The recipes that were trained on several numbers of images; of several schedules on one, the longest."""
    by_recipe: dict[tuple[str, str], dict[int, Setting]] = {}
    for setting in settings:
        if setting.kind.name != DETECTION:
            continue
        recipe, images, iterations, dataset = setting.conditions
        if not isinstance(images, int) or not isinstance(iterations, int) or images < 1:
            continue
        found = by_recipe.setdefault((str(recipe), str(dataset)), {})
        before = found.get(images)
        if before is None or before.conditions[2] < iterations:  # type: ignore[operator]
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
        if each in last
        or each.kind.name != DETECTION
        or (str(each.conditions[0]), str(each.conditions[3])) not in summed
    ]


def differing_keys(runs: Iterable[Run]) -> list[str]:
    """The config keys in which runs differ, except for those that only say where files are."""
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if key not in WHERE_KEYS and len({repr(config.get(key)) for config in configs}) > 1]


def shared_keys(runs: Iterable[Run]) -> set[str]:
    """The config keys that all runs with a config have: runs of an earlier version lack the later ones."""
    return _common_keys(run.config for run in runs)


def _common_keys(configs: Iterable[Mapping[str, Any]]) -> set[str]:
    known = [set(config) for config in configs if config]
    return set.intersection(*known) if known else set()


def short_dataset(name: str) -> str:
    """A dataset's name without the folders of a path, and without the folder of images behind an `@`."""
    annotations = name.partition("@")[0] if "/" in name else name
    return Path(annotations).name or name


def _conditions(run: Run, kind: RunKind) -> tuple[object, ...]:
    values = []
    for path in kind.conditions:
        value: object = run.config.get(".".join(path)) if kind.name == PRETRAIN else run.results
        for key in path if kind.name != PRETRAIN else ():
            value = value.get(key) if isinstance(value, dict) else None
        if path in DATASET_KEYS and value in NAMED_BY_ROOT:
            value = run.config.get("DATA.ROOT") or value
        if isinstance(value, dict | list):
            warn_once(f"{run.path / 'results.json'}: {'.'.join(path)} is not one value and counts as not given")
            value = None
        values.append(legible(value) if isinstance(value, str) else value)
    return tuple(values)


def _short_values(conditions: Iterable[tuple[object, ...]]) -> dict[str, str]:
    """For each text among the conditions that is a path, a short name; unlike paths get unlike names."""
    paths = list(
        dict.fromkeys(value for each in conditions for value in each if isinstance(value, str) and "/" in value)
    )
    names = [short_dataset(path) for path in paths]
    if len(set(names)) < len(names):
        names = short_names([Path(path.partition("@")[0]) for path in paths])
    return dict(zip(paths, names, strict=True)) if len(set(names)) == len(names) else {}


def _shorten(kind: RunKind, conditions: Sequence[object], short: Mapping[str, str]) -> tuple[str, ...]:
    """The conditions as texts."""
    words = []
    for path, value in zip(kind.conditions, conditions, strict=True):
        if path == ("fraction",) and isinstance(value, int | float):
            words.append(f"{100 * value:g} %")
        else:
            words.append("" if value is None else short.get(str(value), str(value)))
    return tuple(words)


def _in_order(settings: Sequence[Setting]) -> list[Setting]:
    """As first named, but those that differ in numbers only (labels, images, iterations) by these, ascending."""
    words = [tuple(value for value in setting.conditions if isinstance(value, str)) for setting in settings]

    def key(place: int) -> tuple[object, ...]:
        numbers = [value if isinstance(value, int | float) else 0 for value in settings[place].conditions]
        return (words.index(words[place]), *numbers)

    return [settings[place] for place in sorted(range(len(settings)), key=key)]


def _groups(runs: Sequence[Run]) -> Iterator[Group]:
    """The baseline first. Of an initialisation with several variants, each is named after its first run."""
    configs, pretrainings = [run.config for run in runs], [run.pretrained for run in runs]
    shared, pretrained = _common_keys(configs), _common_keys(pretrainings)  # the others do not tell runs apart
    by_init: dict[str, dict[object, list[Run]]] = {}
    for run in sorted(runs, key=lambda run: run.init != BASELINE):
        variant = _variant(run.config, shared), _variant(run.pretrained, pretrained)
        by_init.setdefault(run.init, {}).setdefault(variant, []).append(run)
    for init, variants in by_init.items():
        parts = [part for members in variants.values() for part in _split_repeats(members)]
        ordered = [tuple(sorted(part, key=lambda run: str(run.seed).zfill(9))) for part in parts]
        names = short_names([part[0].path for part in ordered])
        for name, part in zip(names, ordered, strict=True):
            yield Group(init if len(parts) == 1 else f"{init} ({name})", part)


def _variant(config: Mapping[str, Any], keys: Collection[str]) -> object:
    """What repetitions of one experiment have in common of a config."""
    fixed = {key: value for key, value in config.items() if key in keys and key not in WHERE_KEYS | REPEAT_KEYS}
    return bool(config), repr(sorted(fixed.items()))


def _split_repeats(runs: list[Run]) -> list[list[Run]]:
    """Runs whose seeds all differ repeat one another; the seed of an evaluated encoder's pretraining counts too.

    If a pair of seeds occurs twice, the weights tell the groups apart.
    """
    if len({(run.seed, str(run.pretrained.get("SEED"))) for run in runs}) == len(runs):
        return [runs]
    by_weights: dict[str, list[Run]] = {}
    for run in runs:
        by_weights.setdefault(str(run.results.get("weights", run.path)), []).append(run)
    return list(by_weights.values())
