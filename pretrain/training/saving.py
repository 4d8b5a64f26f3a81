"""When to save: after each epoch, and in between every so many steps or minutes."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain.runs import checkpoint
from pretrain.training.recorder import Recorder


class Saver:
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
