"""Pretrain and judge again and again, with other values of any config keys, and put the results in a table.

    python pretrain/sweep.py --config shapes_objectives                   CorInfoMax beside other objectives
    python pretrain/sweep.py --config cifar100_attraction ROOT /data      thesis Table 5.4
    python pretrain/sweep.py --config my.yaml SEEDS '[0, 1, 2]'

Each run has a folder of its own below --output, `<values>/seed<n>/`, with `pretrain` and `linear` in it. The same
command again goes on where it was: complete runs are kept, an interrupted one is resumed. The table is in table.md and,
with every run's figures, in results.json.
"""

import json
import logging
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fvcore.common.config import CfgNode

from foundation.config import load_config
from foundation.errors import ArgumentParser, UserError, run
from foundation.files import write_atomic
from pretrain.config import get_defaults as get_pretrain_defaults
from pretrain.config import validate as validate_pretrain
from pretrain.evaluation.config import get_linear_defaults, validate_linear
from pretrain.runs.folder import read_results, write_results
from pretrain.runs.metrics import start_logging

FIGURES = {"linear_top1": "linear top-1", "linear_top5": "linear top-5", "knn_top1": "kNN top-1"}
UNTRAINED = "untrained"
logger = logging.getLogger("pretrain")


def get_defaults() -> CfgNode:
    """Every key of a sweep, with its default."""
    c = CfgNode()
    c.PRETRAIN = "shapes_R18"  # recipe of all runs
    c.LINEAR = "shapes_R18"  # recipe of their evaluation
    c.ROOT = ""  # DATA.ROOT of both
    c.RUNS = []  # for each run, KEY, VALUE, KEY, VALUE, ... of the pretraining recipe
    c.COMMON = []  # KEY, VALUE, ... for all runs
    c.LINEAR_COMMON = []  # KEY, VALUE, ... for all evaluations
    c.SEEDS = [0]
    c.UNTRAINED = False  # a row for the encoder as it is initialised
    return c


@dataclass(frozen=True)
class Run:
    """One pretraining with its evaluation. Empty `pretrain`: the untrained encoder."""

    label: str
    seed: int
    pretrain: list[str]  # arguments of pretrain/train.py, but for --output
    linear: list[str]  # of pretrain/linear.py, but for --output and --weights

    @property
    def folder(self) -> Path:
        """Where it is, below the sweep's folder."""
        return Path(re.sub(r"[^\w.=+-]+", "_", self.label)) / f"seed{self.seed}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = build_parser().parse_args(argv)
    config = load_config(get_defaults(), args.config, "sweep", args.overrides)
    runs = plan(config)
    output = Path(args.output or f"output/sweep_{Path(args.config).stem}")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from error
    start_logging(output)
    found = []
    for number, one in enumerate(runs, 1):
        logger.info("run %d of %d: %s, seed %d", number, len(runs), one.label, one.seed)
        found.append({"label": one.label, "seed": one.seed, **execute(one, output / one.folder)})
        write_results(output, {"kind": "sweep", "config": Path(args.config).stem, "runs": found})
        write_atomic(output / "table.md", table(found).encode())
    logger.info("%s\n\n%s", output / "table.md", table(found))
    failed = [f"{row['label']} (seed {row['seed']})" for row in found if "error" in row]
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; see {output / 'results.json'}")


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="pretrain/sweep.py", description="Pretrain and judge with several values of any keys.")
    parser.add_argument("--config", required=True, help="a sweep in configs/sweep, or a yaml file")
    parser.add_argument("--output", default="", help="folder for all runs; output/sweep_<config> by default")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="keys of the sweep to change")
    return parser


def plan(config: CfgNode) -> list[Run]:
    """The runs of a sweep, all of them checked before the first begins.

    Raises:
        UserError: a key or value that its recipe does not take, or nothing to do.
    """
    if not config.RUNS and not config.UNTRAINED:
        raise UserError(
            "RUNS is empty: name the KEY, VALUE pairs of each run, such as [[TRAIN.LR, 0.1], [TRAIN.LR, 0.2]]"
        )
    root = ["DATA.ROOT", config.ROOT] if config.ROOT else []
    rows: list[tuple[str, list[str] | None]] = [(UNTRAINED, None)] if config.UNTRAINED else []
    for pairs in config.RUNS:
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
        raise UserError(f"RUNS or SEEDS name the same run twice: {', '.join(sorted(twice))}")
    return runs


def _texts(pairs: Sequence[Any]) -> list[str]:
    return [str(value) for value in pairs]


def execute(one: Run, folder: Path) -> dict[str, Any]:
    """Pretrain and judge, or take what an earlier process found. Returns the figures, or the error.

    Raises:
        UserError: the folder holds a run with other arguments.
    """
    record = {"pretrain": one.pretrain, "linear": one.linear}
    note = folder / "arguments.json"
    if note.is_file() and json.loads(note.read_text()) != record:
        raise UserError(f"{folder} holds a run with other arguments; choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(note, json.dumps(record, indent=2).encode())
    results = read_results(folder / "linear")
    if results is None:
        commands = [
            ("pretrain.linear", [*one.linear, "--weights", str(folder / "pretrain") if one.pretrain else "random"])
        ]
        if one.pretrain:
            commands.insert(0, ("pretrain.train", one.pretrain))
        for module, arguments in commands:
            output = folder / module.removeprefix("pretrain.").replace("train", "pretrain")
            error = call(module, [*arguments, "--output", str(output), "--resume"])
            if error:
                logger.warning("%s failed: %s", folder, error)
                return {"error": error}
        results = read_results(folder / "linear")
        assert results is not None
    return {key: results[key] for key in (*FIGURES, "k") if key in results}


def call(module: str, arguments: Sequence[str]) -> str:
    """Run a command in a process of its own, so that none inherits the state of the one before. Returns its error."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode in (130, -2):
        raise KeyboardInterrupt
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"exit status {done.returncode}")


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: for each label the mean over the seeds that did not fail and, of several, the sample standard
    deviation.
    """
    keys = [key for key in FIGURES if any(key in row for row in found)]
    lines = ["| run | seeds | " + " | ".join(f"{FIGURES[key]} (%)" for key in keys) + " |"]
    lines.append("|---|---|" + "---|" * len(keys))
    for label in dict.fromkeys(row["label"] for row in found):
        rows = [row for row in found if row["label"] == label]
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


def cli() -> NoReturn:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
