"""What a run writes while it goes: log.txt, metrics.json, TensorBoard events, and a progress bar on a terminal."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from foundation.errors import UserError
from foundation.files import write_atomic
from pretrain.distributed import group

logger = logging.getLogger("pretrain")


def start_logging(run: Path | None) -> None:
    """Log lines go to standard output, and to `run/log.txt`. None: a process that only reports warnings."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if run else logging.WARNING)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if run:
        handlers.append(logging.FileHandler(run / "log.txt"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)


class JsonLines:
    """A file of JSON objects, one a line, to which a run and its resumptions append.

    Args:
        path: the file.
        first_step: where training begins. Lines from this step on, of an interrupted run, are dropped.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["iteration"] < first_step] if path.is_file() else []
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._path = path
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line for a step, counted from 0. Raises UserError where it cannot be written."""
        try:
            self._file.write(json.dumps({"iteration": step, **values}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error}; the last checkpoint is intact") from error

    def sync(self) -> None:
        """Have the lines on the disk, as they must be before a checkpoint says that their steps are done."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Metrics:
    """Appends to `metrics.json`, one JSON object a line as Detectron2 writes it, and to TensorBoard.

    Args:
        run: the run's directory.
        first_step: where training begins. Lines from this step on, of an interrupted run, are dropped.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        self._lines = JsonLines(run / "metrics.json", first_step)
        self._board = SummaryWriter(run, purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step, counted from 0."""
        self._lines.write(step, values)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Have the lines of metrics.json on the disk."""
        self._lines.sync()

    def close(self) -> None:
        """Flush and close the files."""
        self._lines.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.json; a last line that a killed process left half-written is passed over."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


@dataclass
class Meter:
    """Sums between two log lines."""

    images: int = 0
    waiting: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def wait_for(self, batches: Iterator[Any]) -> Any:
        """The next of the batches, with its images and the wait for it counted."""
        before = time.monotonic()
        batch = next(batches)
        self.waiting += time.monotonic() - before
        self.images += len(batch.indices)
        return batch

    def read(self) -> dict[str, float]:
        """Images a second over all processes, and the share of the time spent waiting for data."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        return {
            "images_per_second": self.images * group.world_size() / elapsed,
            "data_share": self.waiting / elapsed,
        }


class Progress:
    """A bar with the time left on a terminal; elsewhere a log line now and then.

    Args:
        total: steps in all.
        done: steps that an earlier process has taken.
        unit: what a step is, for the bar.
        interval: seconds between log lines where there is no terminal.
    """

    def __init__(
        self, total: int, done: int = 0, unit: str = "step", interval: float = 10.0, shown: bool = True
    ) -> None:
        self._total, self._done, self._first = total, done, done
        self._interval = interval
        self._start = self._last = time.monotonic()
        self._shown = shown
        self._bar = tqdm(total=total, initial=done, unit=unit) if shown and sys.stderr.isatty() else None

    def advance(self, text: str) -> None:
        """One step is done; `text` says how it stands."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif self._shown:
            now = time.monotonic()
            if now - self._last >= self._interval or self._done == self._total:
                self._last = now
                left = (now - self._start) / (self._done - self._first) * (self._total - self._done)
                logger.info("%d/%d  %s  eta %s", self._done, self._total, text, timedelta(seconds=round(left)))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()


def open_wandb(project: str, run: Path, config: Mapping[str, Any]) -> Callable[[int, Mapping[str, float]], None]:
    """A mirror of the record, called with (step, values). A resumed run goes on in the same place.

    Args:
        project: of Weights & Biases.
        run: the run's directory; its path tells this run from others.
        config: shown with the run.

    Raises:
        UserError: the library is not installed, or refuses.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("LOG.WANDB needs the library wandb: pip install wandb, or leave LOG.WANDB empty") from error
    try:
        session = wandb.init(
            project=project,
            id=sha256(str(run.resolve()).encode()).hexdigest()[:16],
            name=run.name,
            dir=str(run),
            config=dict(config),
            resume="allow",
        )
    except Exception as error:  # not logged in, no network: the library has a class for each
        raise UserError(f"LOG.WANDB: Weights & Biases refuses ({error}); leave LOG.WANDB empty to go on") from error
    return lambda step, values: session.log(dict(values), step=step)
