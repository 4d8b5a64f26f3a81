"""Requests to stop: a signal sets a flag, and the training loop saves and leaves when all processes have seen it.

SIGTERM and SIGUSR1 are what schedulers send before the end of a job, SIGINT is Ctrl-C. The process then leaves with
`STOPPED`, so that a script can tell a run that wants to go on from one that failed or is complete.
"""

import signal
import time
from types import FrameType, TracebackType

STOPPED = 75  # sysexits.h: EX_TEMPFAIL, "the user is invited to retry"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
IMPATIENCE = 2.0  # seconds; torchrun passes Ctrl-C on to processes that have it from the terminal already
GRACE = 60  # seconds, for a step and a save


class StopRequest:
    """While entered, the signals of `SIGNALS` set `requested`, and nothing else happens.

    A second Ctrl-C, `IMPATIENCE` or more after the first, ends the process at once, as it would without us.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._since = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since >= IMPATIENCE:
            raise KeyboardInterrupt


def leave_to_parent(*_: object) -> None:
    """For a loader's worker: its parent decides. SIGTERM, perhaps from the parent, ends it after `GRACE` seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
