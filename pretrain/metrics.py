"""What a run writes while it goes: log.txt, metrics.json, TensorBoard events, and a progress bar on a terminal."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

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


class Metrics:
    """Appends to `metrics.json`, one JSON object a line as Detectron2 writes it, and to TensorBoard.

    Args:
        run: the run's directory.
        first_step: where training begins. Lines from this step on, of an interrupted run, are dropped.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        path = run / "metrics.json"
        kept = [line for line in read_metrics(path) if line["iteration"] < first_step] if path.is_file() else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(run, purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step, counted from 0."""
        self._file.write(json.dumps({"iteration": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.json; a last line that a killed process left half-written is passed over."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


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
