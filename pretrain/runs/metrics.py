"""The output of a run during training: log.txt, metrics.json, TensorBoard events, and the progress on a terminal."""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from foundation.errors import UserError
from foundation.files import write_atomic
from foundation.json_files import read_json_lines
from foundation.names import counted
from pretrain.distributed import group

PROGRESS = "progress"  # attribute of log records that a progress bar on the terminal replaces
BAR = "{percentage:3.0f}% {n_fmt}/{total_fmt} eta {remaining} {desc} {bar}"  # cut on the right: essentials come first
logger = logging.getLogger("pretrain")


def start_logging(run: Path | None) -> None:
    """Log to standard output and to `run/log.txt`. None: a process that reports only warnings."""
    tqdm.get_lock()  # a signal that stops the process while tqdm makes it would end in an error of tqdm's
    handlers: list[logging.Handler] = [_Console(sys.stdout)]
    if run:
        handlers.append(_LogFile(run / "log.txt"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for source in (logger, logging.getLogger("foundation")):
        source.handlers[:] = handlers
        source.setLevel(logging.INFO if run else logging.WARNING)
    logger.propagate = False


class _Console(logging.StreamHandler):
    """Standard output, without breaking a progress bar on the same terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, PROGRESS) and sys.stderr.isatty():
            return
        with tqdm.external_write_mode():
            super().emit(record)


class _LogFile(logging.FileHandler):
    """log.txt. A line that cannot be written is reported once; the run continues.

    Names of files that are not UTF-8 are escaped, as on standard error.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if self.level <= logging.CRITICAL:
            self.setLevel(logging.CRITICAL + 1)
            print(f"warning: cannot write {self.baseFilename}: {error}; the log ends there", file=sys.stderr)


class JsonLines:
    """A file with one JSON object a line, to which a run and its resumptions append.

    Args:
        path: the file.
        first_step: where training begins. Lines from this step on, written before an interruption, are dropped.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["iteration"] < first_step] if path.exists() else []
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
        """Sync the lines to the disk, before a checkpoint says that their steps are complete."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Metrics:
    """Appends to `metrics.json`, one JSON object a line as Detectron2 writes it, and to TensorBoard.

    Args:
        run: the run folder.
        first_step: where training begins. Lines from this step on, written before an interruption, are dropped.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        self._lines = JsonLines(run / "metrics.json", first_step)
        threading.excepthook = _report_thread
        self._board = SummaryWriter(run, purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step, counted from 0. Raises UserError or OSError where they cannot be written."""
        self._lines.write(step, values)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Sync the lines of metrics.json to the disk."""
        self._lines.sync()

    def close(self) -> None:
        """Flush and close the files."""
        self._lines.close()
        self._board.close()


def _report_thread(failure: threading.ExceptHookArgs) -> None:
    """Report the exception of a thread, unless it is a full disk: TensorBoard's writer raises that again in `write`."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.json or spectrum.json, each an object with the integer `iteration`.

    Other lines are skipped with a warning. A last line that a killed process left half-written is skipped silently.

    Raises:
        UserError: the file cannot be read.
    """
    lines = read_json_lines(path)
    complete = [line for line in lines if type(line.get("iteration")) is int]
    if len(complete) < len(lines):
        logger.warning("%s: skipped %s without an iteration", path, counted(len(lines) - len(complete), "line"))
    return complete


@dataclass
class Meter:
    """Counts the images, and the time spent waiting for them, between two log lines."""

    images: int = 0
    waiting: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def wait_for(self, batches: Iterator[Any]) -> Any:
        """The next batch. Its images, and the time until it came, are counted."""
        before = time.monotonic()
        batch = next(batches)
        self.waiting += time.monotonic() - before
        self.images += len(batch.indices)
        return batch

    def read(self) -> dict[str, float]:
        """Images a second over all processes, and the fraction of the time spent waiting for data."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        return {
            "images_per_second": self.images * group.world_size() / elapsed,
            "data_share": self.waiting / elapsed,
        }


class Progress:
    """A bar on a terminal, and lines in the log with the time left.

    Args:
        total: steps in all.
        done: steps that an earlier process has taken.
        unit: what a step is.
        interval: seconds between log lines.
        shown: False on processes that do not report.
    """

    def __init__(
        self, total: int, done: int = 0, unit: str = "step", interval: float = 10.0, shown: bool = True
    ) -> None:
        self._total, self._done, self._first = total, done, done
        self._unit, self._interval, self._shown = unit, interval, shown
        self._start = self._last = time.monotonic()
        hidden = not (shown and sys.stderr.isatty())
        self._bar = tqdm(total=total, initial=done, bar_format=BAR, dynamic_ncols=True, disable=hidden)

    def advance(self, text: str) -> None:
        """One step is done; `text` describes the state, the most important first."""
        self._done += 1
        self._bar.set_description_str(text, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._shown and (now - self._last >= self._interval or self._done == self._total):
            self._last = now
            left = (now - self._start) / (self._done - self._first) * (self._total - self._done)
            eta = timedelta(seconds=round(left))
            line = "%s %d/%d  eta %s  %s"
            logger.info(line, self._unit, self._done, self._total, eta, text, extra={PROGRESS: True})

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.close()
