"""The record of a pretraining run: each log point's line, with what the covariance tells (`spectrum.py`).

    metrics.json    a line at each log point: the loss and its terms, rates, `ldmi`, `effective_rank`, `min_eigenvalue`
    spectrum.json   a line at the end of each epoch: {"iteration", "epoch", "eigenvalues": [[view 1], [view 2]]},
                    P of each view, descending

Eigenvalues of a (2P, 2P) matrix take longer than a step may wait, so a thread works them out on a copy, while training
goes on. The line of a log point is written with the next one or before a checkpoint, whichever comes first: lines are
complete and in order, and those of the steps that a checkpoint covers are on the disk before it.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.corinfomax import RunningEstimates
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
    """Writes the record, and warns of a collapse.

    Args:
        run: the run's directory.
        first_step: where training begins. Lines from this step on, of an interrupted run, are dropped.
        criterion: whose estimates are measured.
        watch_from: step from which a collapsed embedding is warned of. An untrained network's always is.
        mirrors: other places for the lines of metrics.json, each called with (step, values).
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
        """Record values at a step, counted from 0, together with the spectrum as it is now."""
        self.flush()
        copies = (
            self._criterion.covariance.detach().to("cpu", copy=True),
            self._criterion.cross_covariance.detach().to("cpu", copy=True),
        )
        future = self._thread.submit(measure, *copies, self._criterion.eps)
        self._pending = _Pending(step, values, future, ends_epoch)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record values that have no spectrum, such as a probe's."""
        self.flush()
        self._write(step, values)

    def flush(self) -> None:
        """Finish the line that is being worked out."""
        if self._pending is None:
            return
        step, values, future, ends_epoch = self._pending
        self._pending = None
        spectrum = future.result()
        figures = {name: getattr(spectrum, name) for name in ("ldmi", "effective_rank", "min_eigenvalue")}
        self._write(step, {**values, **figures})
        if ends_epoch:
            rows = [[float(f"{value:.7g}") for value in row] for row in spectrum.eigenvalues.tolist()]
            self._spectra.write(step, {"epoch": values["epoch"], "eigenvalues": rows})
        self._watch(step, spectrum)

    def sync(self) -> None:
        """Have every line on the disk."""
        self.flush()
        self._metrics.sync()
        self._spectra.sync()

    def close(self) -> None:
        """Write what is left and close the files."""
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
                "lower OBJECTIVE.ATTRACTION or TRAIN.LR",
                step,
                spectrum.effective_rank,
                spectrum.eigenvalues.shape[-1],
                100 * COLLAPSE_SHARE,
            )
        self._collapsed = collapsed


class CheckpointPolicy:
    """Saves checkpoints, from the main process; on the others it does nothing.

    Args:
        run: the run's directory.
        state: what the checkpoint holds besides the position.
        recorder: whose lines must be on the disk first; None on all processes but the main one.
        every_steps: save after each so many steps; 0: never for that reason.
        every_minutes: save when so many minutes have passed since the last save; 0: never for that reason.
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
        """Whether to save with `step` steps complete. The same on every process."""
        return self._every_steps > 0 and step % self._every_steps == 0

    def due_by_time(self) -> bool:
        """Whether it is time to save. Each process has its own clock: only the main one's counts."""
        return self._every_seconds > 0 and time.monotonic() - self._saved_at >= self._every_seconds

    def save(self, epoch: int, step: int, skipped: int) -> None:
        """Save unless it has just been done: (epochs complete, steps complete, batches skipped).

        Raises:
            UserError: the disk is full or cannot be written; earlier checkpoints are untouched.
        """
        if self._recorder is None or (step == self._saved_step and checkpoint.exists(self._run)):
            return
        self._recorder.sync()
        position = {"epoch": epoch, "step": step, "skipped": skipped}
        checkpoint.save(self._run, {**self._state(), "position": position})
        self._saved_step, self._saved_at = step, time.monotonic()
