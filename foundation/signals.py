"""Requests to stop: after SIGTERM, SIGUSR1 or Ctrl-C (SIGINT) a run saves a checkpoint and ends.

Schedulers send SIGTERM and SIGUSR1 before the end of a job. Before the first step there is nothing to save, and the
process exits at once. During training it finishes the step, saves a checkpoint and exits. Its exit status is `STOPPED`,
so that a script can distinguish a run that can be resumed from one that failed or is complete. When the work is over,
signals are ignored.
"""

import contextlib
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import NoReturn

STOPPED = 75  # sysexits.h: EX_TEMPFAIL, "the user is invited to retry"
INTERRUPTED = 130  # Ctrl-C before the first step
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEAT_AFTER = 2.0  # seconds; torchrun passes on a Ctrl-C that its processes already have from the terminal
STUCK_AFTER = 5.0  # seconds; a start-up that waits for other processes in C++ runs no Python handler
END_WORKER = signal.SIGUSR2  # from its parent
GRACE = 60  # seconds, for a step and a save
LEFT = b"\0"  # no signal has this number


class StopRequest:
    """Handles the signals of `SIGNALS` while entered. To be used in the main thread.

    A thread acknowledges the first signal on standard error at once, even while the main thread computes outside of
    Python, where Python's own handlers have to wait. Within `deferred()` a signal sets `requested`, and the training
    loop acts on it. Outside of it, the process leaves: SystemExit with `STOPPED`, or KeyboardInterrupt after Ctrl-C.

    A second Ctrl-C, `REPEAT_AFTER` seconds or more after the first signal, raises KeyboardInterrupt in any case. Within
    `evaluating()` the other signals leave too when they come again after that time.

    Within `until_exit()` the signals are ignored when it is left. Otherwise they do what they did before.

    Args:
        leaving: the answer where the process leaves, before the first `deferred()`.

    Attributes:
        requested: the first signal, or None.
        leaving: as given.
    """

    def __init__(self, leaving: str = "stopping before the first step, nothing is lost") -> None:
        self.leaving = leaving
        self.requested: signal.Signals | None = None
        self._requested_at = 0.0
        self._deferred = self._importing = False
        self._evaluating = False
        self._finished = self._silent = False
        self._left = threading.Event()
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._acknowledge, args=(reading,), daemon=True, name="signals")
        self._thread.start()
        self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        _entered.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()
        self._left.set()
        _entered.remove(self)
        if _exits:
            _ignore()
        else:
            self._restore_handlers()
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._writing, LEFT)  # loader workers have the pipe too: closing it would not end the thread
        self._thread.join()
        os.close(self._writing)

    @contextlib.contextmanager
    def importing(self) -> Iterator[None]:
        """While entered, the process leaves at the end: PyTorch's C++ code swallows errors of imports that it makes.

        Raises:
            SystemExit, KeyboardInterrupt: as for a signal at the end.
        """
        self._importing = True
        try:
            yield
        finally:
            self._importing = False
        if self.requested is not None:
            self._leave(self.requested)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While entered, a signal only sets `requested`: there is something to save first."""
        self._deferred, self.leaving = True, "stopping now; --resume goes on after the last checkpoint"
        try:
            yield
        finally:
            self._deferred = False

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """While entered, within `deferred()`, the next step is far away, and a second signal of any kind leaves."""
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False

    def leave_slowly(self) -> None:
        """The process leaves as soon as another one has saved. It is not stuck, however long that takes."""
        self._left.set()

    def finish(self) -> None:
        """The work is complete, or stopped and saved. From here on a signal only sets `requested`, with no answer."""
        if not self._finished:
            self._finished, self._silent = True, self.requested is None  # else the thread may still have to answer

    def begin(self) -> None:
        """Begin the next of several runs, after a `finish`.

        Raises:
            SystemExit: with `STOPPED`: there has been a signal since the last step of the run before.
        """
        silent, self._finished, self._silent = self._silent, False, False
        if self.requested is None:
            return
        if silent:
            _say(f"{self.requested.name} received: stopping before the next run")
        raise SystemExit(STOPPED)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._requested_at = signal.Signals(number), time.monotonic()
            if not (self._deferred or self._finished or self._importing):
                self._leave(self.requested)
            return
        if self._finished or time.monotonic() - self._requested_at < REPEAT_AFTER:
            return
        if number == signal.SIGINT or self._evaluating:
            self._leave(signal.Signals(number))

    def _leave(self, number: signal.Signals) -> NoReturn:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(STOPPED)

    def _acknowledge(self, reading: int) -> None:
        """Read the numbers of signals, which the interpreter writes to a pipe, and answer the first of `SIGNALS`."""
        answered = False
        with open(reading, "rb", buffering=0) as numbers:
            while (number := ord(numbers.read(1) or LEFT)) != ord(LEFT):
                if number in SIGNALS and not answered and not self._silent:
                    answered = True
                    self._answer(signal.Signals(number))

    def _answer(self, number: signal.Signals) -> None:
        pause = f"{REPEAT_AFTER:g} s"
        if self._evaluating:
            _say(f"{number.name} received: stopping after this evaluation; a second signal after {pause} stops at once")
            return
        if self._deferred:
            again = f"; Ctrl-C again after {pause} stops without saving" if number == signal.SIGINT else ""
            _say(f"{number.name} received: stopping after this step and a checkpoint{again}")
            return
        _say(f"{number.name} received: {self.leaving}")
        if not self._left.wait(STUCK_AFTER) and not self._deferred:
            os._exit(INTERRUPTED if number == signal.SIGINT else STOPPED)


_entered: list[StopRequest] = []
_exits = False  # this process has no other work than that within `until_exit()`


@contextlib.contextmanager
def until_exit() -> Iterator[None]:
    """The work of a process that exits after it. The signals of `SIGNALS` are ignored from its end until the exit,
    which takes up to seconds, and already from the end of a `StopRequest` within it.
    """
    global _exits
    _exits = True
    try:
        yield
    finally:
        _ignore()


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _block_before_fork() -> None:
    """A signal to a new process waits until it has its own handlers."""
    if _entered:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock_after_fork() -> None:
    if _entered:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _leave_in_child() -> None:
    """In a forked process the signals do what they did before: a multiprocessing pool ends its processes by SIGTERM."""
    for request in reversed(_entered):
        request._restore_handlers()
        signal.set_wakeup_fd(-1)  # the parent's pipe
    _unblock_after_fork()


os.register_at_fork(before=_block_before_fork, after_in_parent=_unblock_after_fork, after_in_child=_leave_in_child)


def leave_to_parent(*_: object) -> None:
    """Set the signal handlers of a loader worker, which its parent ends. SIGTERM ends it after `GRACE` seconds, because
    schedulers send it to all processes of a job; `END_WORKER` ends it at once.
    """
    signal.set_wakeup_fd(-1)  # the parent's pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
    signal.signal(END_WORKER, lambda *_: os._exit(0))


def end_workers_at_exit() -> None:
    """Have the loader workers of this process, and its other daemons, ended at its exit, before Python sends them
    SIGTERM and waits for them: after an error, references to a loader may keep its workers.
    """
    multiprocessing.util.Finalize(None, _end_workers, exitpriority=1)


def _end_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon and child.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, END_WORKER)


def _say(text: str) -> None:
    """Write a line past the buffers of `sys.stderr`, which the main thread may hold."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), f"{text}\n".encode())
