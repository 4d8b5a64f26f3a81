"""The state of the runs below a folder: complete, running, or interrupted.

Checkpoints are not read completely, which would take a second for each gigabyte. It is checked that the end of the file
is there, which a truncated file lacks, and for pretraining and evaluations that there is a digest. A flipped bit is
found by the command that resumes the run.
"""

import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from foundation import locks
from foundation.errors import UserError
from foundation.files import digest_file
from foundation.json_files import as_integer, read_json_lines
from foundation.names import counted
from foundation.run_kinds import DETECTION, SERIES_FILES, RunKind, flatten, identify, read_config, read_results

CHECKPOINT = re.compile(r"checkpoints/step_(\d+)\.pt|model_(\d+)\.pth")  # after n steps; of iteration n, counted from 0
RUN_FILES = {"config.yaml", "results.json", *SERIES_FILES}  # a run has at least one of them
NO_RUNS_BELOW = ("checkpoints", "predictions")


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        step: of the last whole checkpoint, in training steps; None before the first, and of runs that keep none.
        done: of `total`, in `unit`s; None if that is not known.
        total: of the whole run.
        unit: `epochs`, `iterations` or `runs`; empty if nothing is counted.
        saved: the time of the last checkpoint or, of a run that keeps none, of its results.
        complete: whether nothing is left to do.
        running: whether a process on this machine is working on it.
        damaged: number of newer checkpoints than the one of `step` that are not whole.
    """

    folder: Path
    kind: RunKind
    step: int | None
    done: float | None
    total: int | None
    unit: str
    saved: datetime | None
    complete: bool
    running: bool
    damaged: int = 0

    @property
    def progress(self) -> str:
        """How much is done, in words; `-` if that is not known."""
        if self.done is None and self.total is None:
            return "-"
        noun = self.unit.removesuffix("s")
        if self.total is None:
            return counted(round(self.done or 0, 1), noun)
        if self.done is None:
            return f"{counted(self.total, noun)} planned"
        return f"{round(self.done, 1):,g} of {counted(self.total, noun)}"

    @property
    def outlook(self) -> str:
        """What running the same command again would do."""
        if self.running:
            return "running"
        if self.complete:
            return "complete"
        if self.kind.is_collection:
            return "unfinished: the same command continues"
        if self.step is None:
            return f"unfinished: {'every checkpoint is damaged' if self.damaged else 'nothing saved'}"
        lost = f" from an earlier checkpoint: {self.damaged} newer damaged" if self.damaged else ""
        return f"unfinished: continues with --resume{lost}"


def find_runs(root: Path) -> list[RunState]:
    """The runs in a folder and below it, sorted by path.

    Raises:
        UserError: there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root} to look for runs in")
    return [state for folder in _candidates(root) if (state := read_state(folder)) is not None]


def read_state(folder: Path) -> RunState | None:
    """How far the run in a folder is; None if there is no run in it."""
    kind = identify(folder)
    if kind is None:
        return None
    if kind.is_collection:
        return _state_of_collection(folder, kind)
    config = flatten(read_config(folder))
    step, saved, damaged = _last_checkpoint(folder)
    finished = folder / kind.last_file
    complete = finished.is_file()
    done: float | None
    if kind.name == DETECTION:
        total, unit, done = as_integer(config.get("SOLVER.MAX_ITER")), "iterations", step
        results = read_results(folder)
        trained = results.get("iterations")
        if complete and isinstance(trained, int):  # 0: evaluated without training
            complete = trained == 0 or total is None or trained >= total or results.get("stopped_early") is True
            done = max(trained, step or 0)
    else:
        total, unit = as_integer(config.get("TRAIN.EPOCHS")), "epochs"
        done = None if step is None else _epoch(folder / "metrics.json", step)
    if saved is None and finished.is_file():
        saved = datetime.fromtimestamp(finished.stat().st_mtime)
    return RunState(folder, kind, step, done, total, unit, saved, complete, locks.is_held(folder), damaged)


def _candidates(root: Path) -> list[Path]:
    """The folders with a file of a run, sorted.

    Links to folders are followed, but not to one that holds the root. Where several paths lead to a folder, it counts
    once, if possible by a path without links.
    """
    found: list[Path] = []
    seen = {_identity(folder) for folder in root.resolve().parents}
    waiting = [root]
    while waiting:
        links: list[Path] = []
        for start in waiting:
            for place, inside, files in os.walk(start):
                folder = Path(place)
                if _identity(folder) in seen:
                    inside.clear()
                    continue
                seen.add(_identity(folder))
                inside[:] = sorted(name for name in inside if name not in NO_RUNS_BELOW)
                links += [folder / name for name in inside if (folder / name).is_symlink()]
                if RUN_FILES.intersection(files):
                    found.append(folder)
        waiting = links
    return sorted(found)


def _identity(folder: Path) -> tuple[int, int]:
    """Equal for all paths to a folder; (0, 0) for one that is gone."""
    try:
        status = folder.stat()
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def _state_of_collection(folder: Path, kind: RunKind) -> RunState:
    """A sweep or series: complete if all its runs succeeded and all runs below it are complete.

    Files of earlier versions do not say how many runs are planned: there those that have ended count.
    """
    path = next(path for name in ("results.json", *SERIES_FILES) if (path := folder / name).is_file())
    content = read_results(folder, path.name)
    rows, planned = content.get("runs"), as_integer(content.get("planned"))
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    succeeded = sum("error" not in row for row in rows)
    below = [state for each in _candidates(folder) if each != folder and (state := read_state(each)) is not None]
    complete = succeeded == len(rows) >= (planned or 0) and all(state.complete for state in below)
    running = locks.is_held(folder) or any(state.running for state in below)
    saved = datetime.fromtimestamp(path.stat().st_mtime)
    return RunState(folder, kind, None, succeeded, planned, "runs", saved, complete, running)


def _last_checkpoint(folder: Path) -> tuple[int | None, datetime | None, int]:
    """The steps that the last whole checkpoint holds, when it was saved, and how many newer ones are damaged."""
    found = []
    for path in (*folder.glob("checkpoints/step_*.pt"), *folder.glob("model_*.pth")):
        name = CHECKPOINT.fullmatch(path.relative_to(folder).as_posix())
        if name:
            found.append((int(name[1]) if name[1] else int(name[2]) + 1, path))
    for damaged, (step, path) in enumerate(sorted(found, reverse=True)):
        if _is_whole(path):
            return step, datetime.fromtimestamp(path.stat().st_mtime), damaged
    return None, None, len(found)


def _is_whole(checkpoint: Path) -> bool:
    """Whether the end of a checkpoint is there and, where a run is not resumed without it, its digest."""
    try:
        has_digest = checkpoint.suffix == ".pth" or digest_file(checkpoint).is_file()
        return has_digest and zipfile.is_zipfile(checkpoint)
    except OSError:
        return False


def _epoch(metrics: Path, step: int) -> float | None:
    """The epoch of the last line of metrics.json that a checkpoint of this step covers."""
    lines: Iterable[Mapping[str, Any]] = read_json_lines(metrics) if metrics.is_file() else ()
    epochs = [
        line["epoch"]
        for line in lines
        if isinstance(line.get("epoch"), int | float)
        and isinstance(line.get("iteration", 0), int)
        and line.get("iteration", 0) < step
    ]
    return float(epochs[-1]) if epochs else None
