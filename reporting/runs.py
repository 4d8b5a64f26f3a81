"""Run folders as a report reads them: which kind of run each one is, and what it measured."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from foundation.errors import UserError
from foundation.files import sha256_of
from foundation.json_files import as_integer, as_number, read_json, read_json_lines
from foundation.run_kinds import DETECTION, EVALUATED_WITH, KINDS, PRETRAIN, RunKind, flatten, read_config
from foundation.run_states import RUN_FILES, RunState, find_runs, read_state

PREDICTIONS = "predictions"
CHECKPOINTS = "checkpoints"  # folder, in a run's, of some of its weights
ANALYSIS = "analysis.json"
CLASS_AP = "AP-"  # before the name of a class, in results.json
DATASET_LISTS = ("DATASETS.TRAIN", "DATASETS.TEST")  # config keys
CUSTOM = ".json@"  # between the paths of annotations and of images in the name of a dataset of one's own
PARTS = "data"  # folder, in a run's or a series', of the two parts of a dataset that a command has divided
MAX_ITERATION = 2**53  # larger integers are not exact as floats, and no run is as long
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run folder; of a detector that was evaluated on several sets, one of the evaluations.

    Attributes:
        init: the origin of the run's initial weights: `random`, or a name such as `corinfomax`. For a pretraining run
            the name of its objective, because later runs name their weights so.
        state: how far it is, in words: `complete`, or what is left to do.
        results: results.json; empty for pretraining.
        config: dotted keys to values.
        lines: metrics.json, from the first line to the last.
        detector: of an evaluation, the folder of the run that trained the detector: this one, or another.
        analysis: analysis.json of the predictions, which `detection/evaluation/analysis.py` describes; empty if there
            is none.
        predictions: the folder in the run's that holds them.
        pretrained: of an evaluation of an encoder, the config of the run that trained it, dotted keys to values; empty
            where that run is not on this machine.
    """

    path: Path
    kind: RunKind
    init: str
    seed: int | None
    state: str = field(repr=False, default="complete")
    results: Mapping[str, Any] = field(repr=False, default_factory=dict)
    config: Mapping[str, Any] = field(repr=False, default_factory=dict)
    lines: tuple[Mapping[str, Any], ...] = field(repr=False, default=())
    detector: Path | None = field(repr=False, default=None)
    analysis: Mapping[str, Any] = field(repr=False, default_factory=dict)
    predictions: str = field(repr=False, default=PREDICTIONS)
    pretrained: Mapping[str, Any] = field(repr=False, default_factory=dict)

    def measured(self, *keys: str) -> float | None:
        """A number of results.json, by the keys that lead to it; None where it was not measured.

        A value that is not a number counts as not measured, with one warning.
        """
        value: Any = self.results
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        number = as_number(value)
        if number is None and value is not None and not isinstance(value, float):
            warn_once(f"{self.path / 'results.json'}: {'.'.join(keys)} is not a number and counts as not measured")
        return number

    def series(self, key: str) -> dict[int, float]:
        """The values of a metric by iteration.

        A resumed run writes some iterations a second time. Then the values that the interrupted process wrote for them
        and for later iterations do not count.
        """
        values: dict[int, float] = {}
        for line in self.lines:
            value, iteration = as_number(line.get(key)), line["iteration"]
            if value is None:
                continue
            if values and iteration <= next(reversed(values)):
                values = {before: kept for before, kept in values.items() if before < iteration}
            values[iteration] = value
        return values


@dataclass(frozen=True)
class Skipped:
    """A run that is not reported, with the reason."""

    path: Path
    kind: str
    reason: str


class Found(NamedTuple):
    """What there is in the folders that a report is made of."""

    runs: list[Run]
    skipped: list[Skipped]


def read_runs(paths: Iterable[Path]) -> Found:
    """The runs in these folders, each once. A folder that is not a run itself stands for all runs below it.

    Unfinished pretraining is reported, because its curves are of interest; other unfinished runs and damaged ones are
    skipped.

    Raises:
        UserError: a folder is missing or holds no run, or none of the runs can be reported.
    """
    states = {state.folder.resolve(): state for path in paths for state in _states(path)}
    found = Found([], [])
    shared = _SharedNames()
    for state in states.values():
        try:
            run = _read_run(state)
            found.runs.extend(shared.of(each) for each in [run, *_further_evaluations(run)])
        except UserError as error:
            found.skipped.append(Skipped(state.folder, state.kind.name, str(error)))
    if not found.runs:
        raise UserError(
            f"there is nothing to report: {'; '.join(f'{run.path}: {run.reason}' for run in found.skipped)}"
        )
    return found


@cache
def warn_once(text: str) -> None:
    """Log a warning, unless this process has logged the same one before."""
    logger.warning("%s", text)


def _states(path: Path) -> list[RunState]:
    """The run in a folder, or the runs below it. Collections, such as a sweep, are left out: their runs count."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; name the folders of runs")
    own = read_state(path)
    if own is not None and not own.kind.is_collection:
        return [own]
    below = [state for state in find_runs(path) if not state.kind.is_collection]
    if not below:
        raise UserError(f"there is no run in {path}: {_explain(path)}")
    return below


def _explain(path: Path) -> str:
    """Why a folder is no run."""
    if (path / "results.json").exists():
        kind = _read_object(path / "results.json").get("kind")
        return f"results.json names the kind {kind!r}, which is not one of {', '.join(KINDS)}"
    there = [name for name in sorted(RUN_FILES) if (path / name).exists()]
    return f"its {there[0]} is not that of a run" if there else f"expected one of {', '.join(sorted(RUN_FILES))}"


def _read_run(state: RunState) -> Run:
    """Raises UserError where a run is unfinished or its results are damaged."""
    folder, kind = state.folder, state.kind
    config = flatten(read_config(folder))
    if kind.name == PRETRAIN:
        objective, seed = str(config.get("OBJECTIVE.NAME", "pretrained")), config.get("SEED")
        text = "complete" if state.complete else f"{state.outlook} ({state.progress})"
        return Run(folder, kind, objective, as_integer(seed), text, config=config, lines=_read_metrics(folder))
    if not (folder / kind.last_file).is_file():
        raise UserError(f"{state.outlook} ({state.progress})")
    results = _read_object(folder / "results.json")
    if results.get("kind") != kind.name:
        raise UserError(f"{folder / 'results.json'} names another kind than {kind.name}: {results.get('kind')!r}")
    trained = _trained_as(results) if kind.name == DETECTION else {}
    evaluated_with = results.get(EVALUATED_WITH)
    config |= evaluated_with if isinstance(evaluated_with, dict) else {}
    detector = Path(results["weights"]).parent if trained else folder
    analysis = _read_analysis(folder) if kind.name == DETECTION else {}
    results = _with_classes(results | trained, analysis)
    if not isinstance(results.get("init"), str):
        raise UserError(f"{folder / 'results.json'}: init must name the initialisation, not {results.get('init')!r}")
    return Run(
        folder,
        kind,
        results["init"],
        as_integer(results.get("seed")),
        "complete" if state.complete else f"{state.outlook} ({state.progress})",
        results,
        config,
        _read_metrics(folder),
        detector.resolve(),
        analysis,
        pretrained={} if kind.name == DETECTION else _read_pretraining(folder, results),
    )


def _read_pretraining(folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the run that an evaluated encoder is of; empty where there is none."""
    weights = results.get("weights")
    if not isinstance(weights, str) or not weights:
        return {}
    trained = Path(weights).parent
    trained = trained.parent if trained.name == CHECKPOINTS else trained
    # In a sweep that was moved, or is read from another working directory, the runs still lie side by side.
    found = (flatten(read_config(place)) for place in (trained, folder.resolve().parent / trained.name))
    return next((config for config in found if config), {})


def _further_evaluations(run: Run) -> list[Run]:
    """A detector's evaluations on further sets in the same run. Curves belong to the first."""
    entries = run.results.get("evaluations")
    further = []
    for entry in entries if isinstance(entries, list) and run.kind.name == DETECTION else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("dataset"), dict):
            warn_once(f"{run.path / 'results.json'}: evaluations must be objects with a dataset; one is left out")
            continue
        results = {key: value for key, value in run.results.items() if key not in ("evaluations", "best")}
        results |= {key: entry.get(key) for key in ("dataset", "results")}
        folder = Path(str(entry.get("predictions"))).name
        analysis = _read_analysis(run.path, folder)
        results = _with_classes(results, analysis)
        further.append(replace(run, results=results, lines=(), analysis=analysis, predictions=folder))
    return further


class _SharedNames:
    """Gives datasets of one's own with one content the name that the first run has for them.

    Runs that divide the same data have the parts in their own folders, under names of their own.
    """

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}
        self._digest = cache(sha256_of)  # the runs of a report share most of their files

    def of(self, run: Run) -> Run:
        """The run, with such names in its config and results."""
        dataset, config = run.results.get("dataset"), dict(run.config)
        for key in DATASET_LISTS:
            if isinstance(config.get(key), list):
                config[key] = [self._name(each, run.path) for each in config[key]]
        results = dict(run.results)
        if isinstance(dataset, dict) and "name" in dataset:
            results["dataset"] = {**dataset, "name": self._name(dataset["name"], run.path)}
        return replace(run, config=config, results=results)

    def _name(self, name: object, folder: Path) -> object:
        if not isinstance(name, str) or CUSTOM not in name:
            return name
        start, _, images = name.partition(CUSTOM)
        file = Path(f"{start}.json")
        # Of a run that was moved or copied, the parts are still in its folder, or in that of its series.
        moved = [each / PARTS / file.name for each in (folder, *folder.resolve().parents[:2])]
        for path in [file, *(moved if file.parent.name == PARTS else [])]:
            if path.is_file():
                try:
                    return self._names.setdefault((self._digest(path), images), name)
                except OSError:
                    break
        return name


def _trained_as(results: Mapping[str, Any]) -> dict[str, Any]:
    """Of an evaluation without training, such as that of a detector on another set: what the detector's run says of
    its training, if it is on this machine.
    """
    weights = results.get("weights")
    if results.get("iterations") != 0 or not isinstance(weights, str) or not weights:
        return {}
    try:
        trained = _read_object(Path(weights).parent / "results.json")
    except UserError:
        return {}
    if trained.get("kind") != DETECTION or trained.get("iterations") == 0:
        return {}
    return {key: trained[key] for key in ("config", "init", "seed", "iterations", "train_images") if key in trained}


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _read_analysis(folder: Path, predictions: str = PREDICTIONS) -> dict[str, Any]:
    """The analysis of a detector's evaluation; a damaged one counts as missing, with a warning."""
    path = folder / predictions / ANALYSIS
    if not path.is_file():
        return {}
    try:
        analysis = _read_object(path)
    except UserError as error:
        warn_once(f"{error}; the report does without it: run the evaluation again with --eval-only")
        return {}
    return {task: entry for task, entry in analysis.items() if isinstance(entry, dict)}


def _with_classes(results: dict[str, Any], analysis: Mapping[str, Any]) -> dict[str, Any]:
    """The results with AP of each class from the analysis where they lack it, as those on LVIS and VOC do.

    Classes that were not evaluated are left out.
    """
    tasks = results.get("results")
    if not isinstance(tasks, dict):
        return results
    filled = dict(tasks)
    for task, entry in analysis.items():
        metrics, classes = tasks.get(task), entry.get("classes")
        if not isinstance(metrics, dict) or not isinstance(classes, list) or len(classes) < 2:
            continue
        if not any(key.startswith(CLASS_AP) for key in metrics):
            found = [each for each in classes if isinstance(each, dict) and as_number(each.get("AP")) is not None]
            filled[task] = metrics | {f"{CLASS_AP}{each.get('name')}": each["AP"] for each in found}
    return {**results, "results": filled}


def _read_metrics(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The lines of metrics.json that belong to an iteration."""
    path = folder / "metrics.json"
    lines = read_json_lines(path) if path.is_file() else []
    return tuple(line for line in lines if _is_iteration(line.get("iteration")))


def _is_iteration(value: object) -> bool:
    number = as_integer(value)
    return number is not None and 0 <= number < MAX_ITERATION
