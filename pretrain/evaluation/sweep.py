"""A sweep: pretraining and evaluation, repeated with other values of any config keys, and a table of the results."""

import hashlib
import itertools
import json
import logging
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from foundation.config import load_config, one_of
from foundation.errors import UserError
from foundation.files import write_atomic
from foundation.json_files import read_json
from foundation.signals import INTERRUPTED, StopRequest
from pretrain.config import get_defaults as get_pretrain_defaults
from pretrain.config import validate as validate_pretrain
from pretrain.evaluation.config import get_linear_defaults, validate_linear
from pretrain.evaluation.figures import NAMES
from pretrain.images.remote import environment
from pretrain.runs.folder import read_results, write_results

METRICS = {"linear_top1": "linear top-1", "linear_top5": "linear top-5", "knn_top1": "kNN top-1"}
UNTRAINED = "untrained"
LONGEST_NAME = 255  # bytes: of a folder, on most file systems
logger = logging.getLogger("pretrain")


def get_defaults() -> CfgNode:
    """Every key of a sweep, with its default."""
    c = CfgNode()
    c.PRETRAIN = "shapes_R18"  # recipe of all runs
    c.LINEAR = "shapes_R18"  # recipe of their evaluation
    c.ROOT = ""  # DATA.ROOT of both
    c.RUNS = []  # for each run, KEY, VALUE, KEY, VALUE, ... of the pretraining recipe
    c.GRID = []  # [KEY, [VALUE, ...]], ...: runs with every combination of these values, after those of RUNS
    c.COMMON = []  # KEY, VALUE, ... for all runs
    c.LINEAR_COMMON = []  # KEY, VALUE, ... for all evaluations
    c.SEEDS = [0]  # one run of each setting for each seed
    c.UNTRAINED = False  # a row for the encoder as it is initialised
    c.FIGURES = []  # drawn of the runs of the first seed at the end, by their names in pretrain/figures.py
    return c


@dataclass(frozen=True)
class Run:
    """One pretraining with its evaluation. Empty `pretrain`: the untrained encoder."""

    label: str
    seed: int
    pretrain: list[str]  # arguments of pretrain/train.py, without --output
    linear: list[str]  # of pretrain/linear.py, without --output and --weights

    @property
    def folder(self) -> Path:
        """Where it is, below the sweep's folder."""
        name = re.sub(r"[^\w.=+-]+", "_", self.label)
        if len(name.encode()) > LONGEST_NAME:
            name = f"{name[:80]}_{hashlib.sha256(self.label.encode()).hexdigest()[:16]}"
        return Path(name) / f"seed{self.seed}"


def sweep(config: CfgNode, name: str, output: Path, request: StopRequest) -> None:
    """Execute all runs of a sweep, then write the table and draw the figures.

    Args:
        config: of the sweep.
        name: of the sweep, for results.json.
        output: an existing folder, for all runs.
        request: of a signal to stop.

    Raises:
        UserError: a key or value is wrong, or some of the runs failed; the others are complete.
    """
    runs = plan(config)
    results = []
    for number, one in enumerate(runs, 1):
        logger.info("run %d of %d: %s, seed %d", number, len(runs), one.label, one.seed)
        results.append({"label": one.label, "seed": one.seed, **execute(one, output / one.folder, request)})
        write_results(output, {"kind": "sweep", "config": name, "planned": len(runs), "runs": results})
        write_atomic(output / "table.md", table(results).encode())
    logger.info("%s\n\n%s", output / "table.md", table(results))
    failed = [f"{row['label']} (seed {row['seed']})" for row in results if "error" in row]
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; see {output / 'results.json'}")
    if config.FIGURES:
        drawn = [output / one.folder / "pretrain" for one in runs if one.pretrain and one.seed == config.SEEDS[0]]
        arguments = [*map(str, drawn), "--output", str(output / "figures"), "--only", ",".join(config.FIGURES)]
        error = call("pretrain.figures", arguments, request)
        if error:
            raise UserError(f"the runs are complete, but drawing their figures failed: {error}")


def plan(config: CfgNode) -> list[Run]:
    """The runs of a sweep, all of them checked before the first begins.

    Raises:
        UserError: a key or value that its recipe does not take, or nothing to do.
    """
    for figure in config.FIGURES:
        one_of(CfgNode({"FIGURES": figure}), "FIGURES", NAMES)
    changes = [*config.RUNS, *_grid(config.GRID)]
    if not changes and not config.UNTRAINED:
        raise UserError(
            "RUNS and GRID are empty: name the KEY, VALUE pairs of each run, such as RUNS: [[TRAIN.LR, 0.1], [SEED, 2]]"
        )
    if not config.SEEDS:
        raise UserError("SEEDS is empty: name one seed or more, such as SEEDS: [0, 1, 2]")
    root = ["DATA.ROOT", config.ROOT] if config.ROOT else []
    rows: list[tuple[str, list[str] | None]] = [(UNTRAINED, None)] if config.UNTRAINED else []
    for pairs in changes:
        if not isinstance(pairs, list) or len(pairs) % 2:
            raise UserError(f"RUNS: {pairs!r} is not a list KEY, VALUE, KEY, VALUE, ...")
        label = " ".join(f"{key}={value}" for key, value in zip(pairs[::2], pairs[1::2], strict=True)) or "as it is"
        rows.append((label, _texts(pairs)))
    runs = []
    for seed in config.SEEDS:
        linear = ["SEED", str(seed), *root, *_texts(config.LINEAR_COMMON)]
        validate_linear(load_config(get_linear_defaults(), config.LINEAR, "linear", linear))
        for label, pairs in rows:
            # The last of equal keys counts, so a run's own pairs come after the common ones.
            pretrain = [] if pairs is None else ["SEED", str(seed), *root, *_texts(config.COMMON), *pairs]
            validate_pretrain(load_config(get_pretrain_defaults(), config.PRETRAIN, "pretrain", pretrain))
            arguments = [] if pairs is None else ["--config", config.PRETRAIN, *pretrain]
            runs.append(Run(label, seed, arguments, ["--config", config.LINEAR, *linear]))
    folders = [one.folder for one in runs]
    twice = {str(folder) for folder in folders if folders.count(folder) > 1}
    if twice:
        raise UserError(f"RUNS, GRID or SEEDS name the same run twice: {', '.join(sorted(twice))}")
    return runs


def _grid(axes: Sequence[Any]) -> list[list[Any]]:
    """KEY, VALUE, ... of each combination of the values."""
    for axis in axes:
        if not isinstance(axis, list) or len(axis) != 2 or not isinstance(axis[1], list) or not axis[1]:
            raise UserError(f"GRID: {axis!r} is not of the form [KEY, [VALUE, VALUE, ...]]")
    keys = [key for key, _ in axes]
    combinations = itertools.product(*(values for _, values in axes)) if axes else ()
    return [[part for pair in zip(keys, values, strict=True) for part in pair] for values in combinations]


def _texts(pairs: Sequence[Any]) -> list[str]:
    return [str(value) for value in pairs]


def execute(one: Run, folder: Path, request: StopRequest) -> dict[str, Any]:
    """Pretrain and evaluate, or take the results of an earlier process. Returns the metrics, or the error.

    Raises:
        UserError: the folder holds a run with other arguments.
    """
    record = {"pretrain": one.pretrain, "linear": one.linear}
    sidecar = folder / "arguments.json"
    if sidecar.is_file() and read_json(sidecar) != record:
        raise UserError(f"{folder} holds a run with other arguments; choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(sidecar, json.dumps(record, indent=2).encode())
    results = read_results(folder / "linear")
    if results is None:
        commands = [
            ("pretrain.linear", [*one.linear, "--weights", str(folder / "pretrain") if one.pretrain else "random"])
        ]
        if one.pretrain:
            commands.insert(0, ("pretrain.train", one.pretrain))
        for module, arguments in commands:
            output = folder / module.removeprefix("pretrain.").replace("train", "pretrain")
            error = call(module, [*arguments, "--output", str(output), "--resume"], request)
            if error:
                logger.warning("%s failed: %s", folder, error)
                return {"error": error}
        results = read_results(folder / "linear")
        assert results is not None
    return {key: results[key] for key in (*METRICS, "k") if key in results}


def call(module: str, arguments: Sequence[str], request: StopRequest) -> str:
    """Run a command in a process of its own, so that none inherits the state of the one before. Returns its error."""
    # -P: a folder `pretrain` or `configs` in the working directory must not take the place of ours.
    command = [sys.executable, "-P", "-m", module, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            _, errors = process.communicate()
        except BaseException:  # a signal may have come to this process only; a run saves a checkpoint before it ends
            request.leave_slowly()
            process.terminate()
            process.wait()
            raise
    if process.returncode in (INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    lines = errors.strip().splitlines()
    return "" if process.returncode == 0 else (lines[-1] if lines else f"exit status {process.returncode}")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: for each label the mean over the seeds that did not fail and, of several, the sample standard
    deviation.
    """
    keys = [key for key in METRICS if any(key in row for row in results)]
    lines = ["| run | seeds | " + " | ".join(f"{METRICS[key]} (%)" for key in keys) + " |"]
    lines.append("|---|---|" + "---|" * len(keys))
    for label in dict.fromkeys(row["label"] for row in results):
        rows = [row for row in results if row["label"] == label]
        cells = [_cell([row[key] for row in rows if key in row]) for key in keys]
        done = sum("error" not in row for row in rows)
        count = f"{done}" if done == len(rows) else f"{done} of {len(rows)}"
        lines.append(f"| {label} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "failed"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"
