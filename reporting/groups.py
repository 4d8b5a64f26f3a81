"""Runs that are compared, runs that repeat one another, and the few numbers that sum them up.

A setting is one experiment: the same recipe, schedule and data. In it, a group is one initialisation, with a
run for each seed.
"""

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from foundation.errors import UserError
from foundation.names import short_names
from reporting.columns import Column, Task, measured_tasks
from reporting.runs import PRETRAIN, Run

BASELINE = "random"
WHERE_KEYS = {"OUTPUT_DIR"}  # config keys that only say where a run's files are
REPEAT_KEYS = {  # may differ between repetitions of one thing: chance, origin of the weights, machine, bookkeeping
    *("SEED", "DATASETS.FRACTION_SEED", "MODEL.WEIGHTS", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS"),
    *("DATA.ROOT", "DATA.WORKERS", "LOG.PERIOD", "LOG.WANDB", "PROBE.EVERY", "CHECKPOINT.MINUTES", "CHECKPOINT.STEPS"),
    *("SOLVER.CHECKPOINT_PERIOD", "SOLVER.KEEP_CHECKPOINTS", "TEST.EVAL_PERIOD"),
}


@dataclass(frozen=True)
class Kind:
    """What the runs of a kind have in common.

    Attributes:
        conditions: the keys of results.json that must agree for two runs to be compared.
        columns: what is measured; of detection it depends on the model and the dataset.
        headline: the columns that sentences are about.
    """

    name: str
    title: str
    conditions: tuple[tuple[str, ...], ...]
    columns: tuple[Column, ...]
    headline: tuple[Column, ...]


_LINEAR, _KNN, _TOP1 = (
    Column("linear top-1", ("linear_top1",)),
    Column("kNN top-1", ("knn_top1",)),
    Column("top-1", ("top1",)),
)
KINDS = {
    kind.name: kind
    for kind in (
        Kind(PRETRAIN, "Pretraining", (), (), ()),
        Kind(
            "linear",
            "Frozen encoder",
            (("config",), ("dataset",), ("k",)),
            (_LINEAR, Column("linear top-5", ("linear_top5",)), _KNN, Column("kNN top-5", ("knn_top5",))),
            (_LINEAR, _KNN),
        ),
        Kind(
            "finetune",
            "Fine-tuning on few labels",
            (("config",), ("fraction",), ("images",)),
            (_TOP1, Column("top-5", ("top5",))),
            (_TOP1,),
        ),
        Kind(
            "detection",
            "Detection and segmentation",
            (("config",), ("dataset", "name"), ("train_images",), ("iterations",)),
            (),
            (),
        ),
    )
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
    """Of two means; `spread` is what it would vary by if single runs were compared, None if not known."""

    value: float
    spread: float | None


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only. `label` is unique among what it is compared with."""

    label: str
    runs: tuple[Run, ...]

    def statistic(self, column: Column) -> Statistic | None:
        """Of the runs that measured it; None if none did."""
        values = [run.measured(*column.path) for run in self.runs]
        there = tuple(value for value in values if value is not None)
        return Statistic(there) if there else None

    @property
    def seeds(self) -> str:
        """The seeds, in order."""
        return ", ".join(str(run.seed) for run in self.runs if run.seed is not None)


@dataclass(frozen=True)
class Setting:
    """Groups that are compared, the baseline first; `conditions` is what they have in common."""

    kind: Kind
    conditions: tuple[object, ...]
    groups: tuple[Group, ...]

    @property
    def name(self) -> str:
        """The conditions in words."""
        first, *rest = ("?" if value is None else value for value in self.conditions)
        if self.kind.name == "finetune":
            fraction, images = rest
            share = f"{100 * fraction:g} %" if isinstance(fraction, int | float) else fraction
            return f"{first}, {share} of the labels ({images} images)"
        if self.kind.name == "detection":
            dataset, images, iterations = rest
            return f"{first}, {iterations} iterations on {images} images, evaluated on {dataset}"
        return f"{first} on {rest[0]}"

    @property
    def runs(self) -> list[Run]:
        """Of all groups."""
        return [run for group in self.groups for run in group.runs]

    @property
    def tasks(self) -> list[tuple[Task, tuple[Column, ...]]]:
        """Of a detector, what it was evaluated on, with the columns of each; else none."""
        return measured_tasks(self.runs) if self.kind.name == "detection" else []

    @property
    def columns(self) -> tuple[Column, ...]:
        """What was measured."""
        return self.kind.columns or tuple(column for _, columns in self.tasks for column in columns)

    @property
    def headline(self) -> tuple[Column, ...]:
        """The columns that sentences and curves are about: the first of each task."""
        return self.kind.headline or tuple(columns[0] for _, columns in self.tasks)

    @property
    def baseline(self) -> Group:
        """What the others are compared with: random initialisation, or else the first that was named."""
        return self.groups[0]


def difference(base: Statistic, other: Statistic) -> Difference:
    """`other` minus `base`. The spreads are of independent runs, so their squares add up."""
    known = base.spread is not None and other.spread is not None
    spread = math.hypot(base.spread or 0.0, other.spread or 0.0) if known else None
    return Difference(other.mean - base.mean, spread)


def settings(runs: Sequence[Run]) -> list[Setting]:
    """The runs by kind, conditions and initialisation; kinds in the order of the protocol."""
    found = []
    for kind in KINDS.values():
        by_conditions: dict[tuple[object, ...], list[Run]] = {}
        for run in runs:
            if run.kind == kind.name:
                by_conditions.setdefault(_conditions(run, kind), []).append(run)
        kinds = [Setting(kind, conditions, tuple(_groups(members))) for conditions, members in by_conditions.items()]
        found += _in_order(kinds)
    return found


def _in_order(kinds: Sequence[Setting]) -> list[Setting]:
    """As first named, but those that differ in numbers only (labels, images, iterations) by these, ascending."""
    words = [tuple(value for value in setting.conditions if isinstance(value, str)) for setting in kinds]

    def key(place: int) -> tuple[object, ...]:
        numbers = [value if isinstance(value, int | float) else 0 for value in kinds[place].conditions]
        return (words.index(words[place]), *numbers)

    return [kinds[place] for place in sorted(range(len(kinds)), key=key)]


def differing_keys(runs: Iterable[Run]) -> list[str]:
    """The config keys in which runs differ, but for where their files are."""
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if key not in WHERE_KEYS and len({repr(config.get(key)) for config in configs}) > 1]


def _conditions(run: Run, kind: Kind) -> tuple[object, ...]:
    if kind.name == PRETRAIN:
        return (run.config.get("ENCODER.NAME"), run.config.get("DATA.NAME"))
    values = []
    for path in kind.conditions:
        value: object = run.results
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, dict | list):
            raise UserError(f"{run.path / 'results.json'}: {'.'.join(path)} must be one value, not {value!r}")
        values.append(value)
    return tuple(values)


def _groups(runs: Sequence[Run]) -> Iterator[Group]:
    """The baseline first. Of an initialisation with several variants, each is named after its first run."""
    # A key that some of the runs do not have, being of another version, does not tell them apart.
    configs = [set(run.config) for run in runs if run.config]
    shared = set.intersection(*configs) if configs else set()
    by_init: dict[str, dict[object, list[Run]]] = {}
    for run in sorted(runs, key=lambda run: run.init != BASELINE):
        by_init.setdefault(run.init, {}).setdefault(_variant(run, shared), []).append(run)
    for init, variants in by_init.items():
        parts = [part for members in variants.values() for part in _split_repeats(members)]
        ordered = [tuple(sorted(part, key=lambda run: str(run.seed).zfill(9))) for part in parts]
        names = short_names([part[0].path for part in ordered])
        for name, part in zip(names, ordered, strict=True):
            yield Group(init if len(parts) == 1 else f"{init} ({name})", part)


def _variant(run: Run, keys: Collection[str]) -> object:
    fixed = {key: value for key, value in run.config.items() if key in keys and key not in WHERE_KEYS | REPEAT_KEYS}
    return bool(run.config), repr(sorted(fixed.items()))


def _split_repeats(runs: list[Run]) -> list[list[Run]]:
    """Runs whose seeds all differ repeat one another. Where a seed comes twice, it is the weights that are
    compared, so those tell the groups apart.
    """
    if len({run.seed for run in runs}) == len(runs):
        return [runs]
    by_weights: dict[str, list[Run]] = {}
    for run in runs:
        by_weights.setdefault(str(run.results.get("weights", run.path)), []).append(run)
    return list(by_weights.values())
