"""Run directories as a report reads them: which kind of run each one is, and what it measured."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from foundation.errors import UserError

PRETRAIN = "pretrain"
EVALUATIONS = ("linear", "finetune", "detection")  # the kinds that results.json tells apart


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        init: what the run started from: `random`, or a name such as `corinfomax`. For a pretraining run, the
            name of its objective, which is the name that later runs give to what it made.
        config: dotted keys to values.
        lines: metrics.json, from the first line to the last.
        analysis: predictions/analysis.json, which `detection/evaluation/coco.py` describes; empty of runs
            without it.
    """

    path: Path
    kind: str
    init: str
    seed: int | None
    results: Mapping[str, Any] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    lines: tuple[Mapping[str, Any], ...] = field(repr=False)
    analysis: Mapping[str, Any] = field(repr=False, default_factory=dict)

    def measured(self, *keys: str) -> float | None:
        """A number of results.json, by the keys that lead to it; None where it was not measured.

        Raises:
            UserError: there is something else than a number.
        """
        value: Any = self.results
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.path / 'results.json'}: {'.'.join(keys)} must be a number, not {value!r}")
        return float(value) if math.isfinite(value) else None

    def series(self, key: str) -> dict[int, float]:
        """The values of a metric by iteration.

        A resumed run writes some iterations a second time; what the interrupted process had written of them
        does not count.
        """
        values: dict[int, float] = {}
        for line in self.lines:
            value = line.get(key)
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            iteration = int(line["iteration"])
            if values and iteration <= next(reversed(values)):
                values = {before: kept for before, kept in values.items() if before < iteration}
            values[iteration] = float(value)
        return values


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs in these directories, each directory once; of a folder of runs, all that are finished.

    Raises:
        UserError: a directory is missing, holds no finished run, or a file in it is damaged.
    """
    found = [run for path in paths for run in _runs_below(path)]
    return [_read_run(path) for path in {path.resolve(): path for path in found}.values()]


def _runs_below(path: Path) -> list[Path]:
    """The directory itself, or the runs in it if it has neither results nor metrics of its own."""
    if (path / "results.json").exists() or (path / "metrics.json").exists():
        return [path]
    below = {file.parent for name in ("results.json", "encoder.safetensors") for file in path.rglob(name)}
    return sorted(below) or [path]


def _read_run(path: Path) -> Run:
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; name the directories of finished runs")
    config, lines = _read_config(path / "config.yaml"), _read_metrics(path / "metrics.json")
    if (path / "results.json").is_file():
        results = _read_results(path / "results.json")
        analysis = _read_analysis(path / "predictions" / "analysis.json")
        return Run(path, results["kind"], results["init"], results.get("seed"), results, config, lines, analysis)
    if any("total_loss" in line for line in lines):
        raise UserError(f"{path} holds a detection run without results.json: finish it with --resume")
    if lines and config and (any("total" in line for line in lines) or _is_pretrained(path)):
        objective = str(config.get("OBJECTIVE.NAME", "pretrained"))
        return Run(path, PRETRAIN, objective, config.get("SEED"), {}, config, lines)
    raise UserError(f"there is no run in {path}: expected results.json, or config.yaml and metrics.json of pretraining")


def _is_pretrained(path: Path) -> bool:
    return (path / "encoder.safetensors").is_file()


def _read_results(path: Path) -> dict[str, Any]:
    results = _read_object(path, "make it anew: the run's command with --resume")
    if results.get("kind") not in EVALUATIONS:
        known = ", ".join(EVALUATIONS)
        raise UserError(f"{path}: kind must be one of {known}, not {results.get('kind')!r}")
    if not isinstance(results.get("init"), str):
        raise UserError(f"{path}: init must name the initialisation, not {results.get('init')!r}")
    return results


def _read_analysis(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    analysis = _read_object(path, "run the evaluation again with --eval-only")
    if not all(isinstance(entry, dict) for entry in analysis.values()):
        raise UserError(f"{path} must hold a JSON object for each task")
    return analysis


def _read_object(path: Path, advice: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: not valid YAML") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it must hold a mapping of keys to values")
    return _flat(content, "")


def _flat(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_metrics(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The lines that are whole: of a killed process, the last one may not be."""
    if not path.is_file():
        return ()
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("iteration"), int):
            lines.append(line)
    return tuple(lines)
