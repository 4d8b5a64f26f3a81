"""`--list-runs`: the run directories below a folder, and which of them an interruption has left to go on with."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from foundation import locks
from foundation.errors import UserError
from pretrain.runs.metrics import read_metrics

# What a config.yaml of each command has, and no other's; the file that a complete run ends with.
KINDS = {"OBJECTIVE": ("pretrain", "encoder.safetensors"), "LINEAR": ("linear", "results.json")}
KINDS["FINETUNE"] = ("finetune", "results.json")
CHECKPOINT = re.compile(r"step_(\d+)\.pt")


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        kind: the command: pretrain, linear or finetune.
        step: that the last checkpoint holds; None before the first.
        epoch: of that step, by the record; None where it has none.
        epochs: of the whole run.
        saved: when.
        complete: whether nothing is left to do.
        running: whether a process is at it, on this machine.
    """

    folder: Path
    kind: str
    step: int | None
    epoch: float | None
    epochs: int
    saved: datetime | None
    complete: bool
    running: bool

    @property
    def outlook(self) -> str:
        """What the same command would do now."""
        if self.running:
            return "running"
        if self.complete:
            return "complete"
        return "nothing saved" if self.step is None else "goes on with --resume"


def find_runs(root: Path) -> list[RunState]:
    """The runs in a folder and below, in the order of their paths.

    Raises:
        UserError: there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root} to look for runs in")
    return list(_runs(root))


def table(runs: list[RunState]) -> str:
    """The runs as lines of text."""
    rows = [
        [
            str(run.folder),
            run.kind,
            f"{'-' if run.epoch is None else f'{round(run.epoch, 1):g}'} of {run.epochs}",
            "-" if run.step is None else f"{run.step:,}",
            run.saved.strftime("%Y-%m-%d %H:%M") if run.saved else "-",
            run.outlook,
        ]
        for run in runs
    ]
    return tabulate(rows, ["run", "command", "epochs", "step", "saved", ""], "simple", disable_numparse=True)


def _runs(root: Path) -> Iterator[RunState]:
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(name for name in inside if name != "checkpoints")
        if "config.yaml" in files:
            found = _read(Path(folder), set(files))
            if found:
                yield found


def _read(folder: Path, files: set[str]) -> RunState | None:
    try:
        config: Any = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # not written by a run
    kinds = [KINDS[key] for key in KINDS if isinstance(config, dict) and key in config]
    if not kinds:
        return None
    (kind, last), *_ = kinds
    saved = {int(found[1]): path for path in folder.glob("checkpoints/*") if (found := CHECKPOINT.fullmatch(path.name))}
    step = max(saved, default=None)
    return RunState(
        folder,
        kind,
        step,
        None if step is None else _epoch(folder / "metrics.json", step),
        int(config["TRAIN"]["EPOCHS"]),
        None if step is None else datetime.fromtimestamp(saved[step].stat().st_mtime),
        complete=last in files,
        running=locks.is_held(folder),
    )


def _epoch(metrics: Path, step: int) -> float | None:
    """The epoch in the last line of the record that a checkpoint of this step covers."""
    lines = read_metrics(metrics) if metrics.is_file() else []
    epochs = [line["epoch"] for line in lines if line.get("iteration", step) < step and "epoch" in line]
    return float(epochs[-1]) if epochs else None
