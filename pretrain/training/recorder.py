"""The record of a pretraining run, and when its checkpoints are saved.

    metrics.json    a line at each log point: the loss and its terms, learning rate, speed, and from the covariance
                    `ldmi`, `effective_rank` and `min_eigenvalue` (`spectrum.py`)
    spectrum.json   a line at the end of each epoch: {"iteration", "epoch", "eigenvalues": [[view 1], [view 2]]},
                    P of each view, descending

The eigenvalues of a (2P, 2P) matrix take longer than a step may wait, so a thread computes them from a copy while
training continues. The line of a log point is written with the next one or before a checkpoint, whichever comes first:
lines are complete and in order, and those of the steps that a checkpoint covers are on the disk before it.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.corinfomax import CorInfoMaxLoss, RunningEstimates
from pretrain.runs import checkpoint
from pretrain.runs.metrics import JsonLines, Metrics
from pretrain.spectrum import COLLAPSE_SHARE, Spectrum, is_collapsed, measure

logger = logging.getLogger("pretrain")


class _Pending(NamedTuple):
    step: int
    values: Mapping[str, float]
    spectrum: Future[Spectrum]
    ends_epoch: bool


class Recorder:
    """Writes the record, and warns of a collapsed embedding.

    Args:
        run: the run folder.
        first_step: where training begins. Lines from this step on, written before an interruption, are dropped.
        criterion: holds the estimates that are measured.
        watch_from: step from which to warn. The embedding of an untrained network is always collapsed.
        mirrors: further receivers of the lines of metrics.json, each called with (step, values).
    """

    def __init__(
        self,
        run: Path,
        first_step: int,
        criterion: RunningEstimates,
        watch_from: int,
        mirrors: Sequence[Callable[[int, Mapping[str, float]], None]] = (),
    ) -> None:
        self._metrics = Metrics(run, first_step)
        self._mirrors = mirrors
        self._spectra = JsonLines(run / "spectrum.json", first_step)
        self._criterion = criterion
        self._watch_from = watch_from
        self._collapsed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spectrum")
        self._pending: _Pending | None = None

    def record(self, step: int, values: Mapping[str, float], ends_epoch: bool) -> None:
        """Record values at a step, counted from 0, with the present spectrum."""
        self.flush()
        copies = (
            self._criterion.covariance.detach().to("cpu", copy=True),
            self._criterion.cross_covariance.detach().to("cpu", copy=True),
        )
        future = self._thread.submit(measure, *copies, self._criterion.eps)
        self._pending = _Pending(step, values, future, ends_epoch)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record values without a spectrum, such as those of a probe."""
        self.flush()
        self._write(step, values)

    def flush(self) -> None:
        """Write the line whose spectrum is being computed."""
        if self._pending is None:
            return
        step, values, future, ends_epoch = self._pending
        self._pending = None
        spectrum = future.result()
        figures = {name: getattr(spectrum, name) for name in ("ldmi", "effective_rank", "min_eigenvalue")}
        # With OBJECTIVE.EPS 0 LDMI may be infinite, for which JSON has no number.
        self._write(step, {**values, **{name: value for name, value in figures.items() if math.isfinite(value)}})
        if ends_epoch:
            rows = [[float(f"{value:.7g}") for value in row] for row in spectrum.eigenvalues.tolist()]
            self._spectra.write(step, {"epoch": values["epoch"], "eigenvalues": rows})
        self._watch(step, spectrum)

    def sync(self) -> None:
        """Sync every line to the disk."""
        self.flush()
        self._metrics.sync()
        self._spectra.sync()

    def close(self) -> None:
        """Write the last line and close the files."""
        self.flush()
        self._thread.shutdown()
        self._metrics.close()
        self._spectra.close()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self._metrics.write(step, values)
        for mirror in self._mirrors:
            mirror(step, values)

    def _watch(self, step: int, spectrum: Spectrum) -> None:
        collapsed = step >= self._watch_from and is_collapsed(spectrum)
        if collapsed and not self._collapsed:
            logger.warning(
                "the embedding has collapsed: at step %d its effective rank is %.1f of %d dimensions (below %.0f %%); "
                "lower %s",
                step,
                spectrum.effective_rank,
                spectrum.eigenvalues.shape[-1],
                100 * COLLAPSE_SHARE,
                "OBJECTIVE.ATTRACTION or TRAIN.LR" if isinstance(self._criterion, CorInfoMaxLoss) else "TRAIN.LR",
            )
        self._collapsed = collapsed


class CheckpointPolicy:
    """Saves checkpoints after each epoch, and in between after a number of steps or minutes.

    Only the main process saves; on the others it does nothing.

    Args:
        run: the run folder.
        state: the content of a checkpoint besides the position.
        recorder: its lines are synced to the disk first; None on all processes but the main one.
        every_steps: save each time that so many steps are complete; 0: never for this reason.
        every_minutes: save when so many minutes have passed since the last save; 0: never for this reason.
        first_step: where training begins.
    """

    def __init__(
        self,
        run: Path,
        state: Callable[[], Mapping[str, Any]],
        recorder: Recorder | None,
        *,
        every_steps: int,
        every_minutes: float,
        first_step: int,
    ) -> None:
        self._run, self._state, self._recorder = run, state, recorder
        self._every_steps, self._every_seconds = every_steps, 60 * every_minutes
        self._saved_step, self._saved_at = first_step, time.monotonic()

    def due_by_steps(self, step: int) -> bool:
        """Whether to save when `step` steps are complete. The same on every process."""
        return self._every_steps > 0 and step % self._every_steps == 0

    def due_by_time(self) -> bool:
        """Whether enough time has passed. Each process has its own clock; only the main process's counts."""
        return self._every_seconds > 0 and time.monotonic() - self._saved_at >= self._every_seconds

    def save(self, epoch: int, step: int, skipped: int) -> None:
        """Save, unless this step is saved already: (complete epochs, complete steps, skipped batches).

        Raises:
            UserError: the disk is full or cannot be written; earlier checkpoints are untouched.
        """
        if self._recorder is None or (step == self._saved_step and checkpoint.exists(self._run)):
            return
        self._recorder.sync()
        position = {"epoch": epoch, "step": step, "skipped": skipped}
        checkpoint.save(self._run, {**self._state(), "position": position})
        self._saved_step, self._saved_at = step, time.monotonic()
