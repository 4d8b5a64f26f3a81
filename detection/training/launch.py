"""The processes of a run, one for each GPU. An error in any of them is reported as one line."""

import argparse
import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine.launch import _distributed_worker
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from foundation.errors import UserError
from foundation.signals import STOPPED, StopRequest, until_exit

# Another process sends its traceback as text, with those of the errors that led to the last one. This finds the message
# of a UserError that is the last.
USER_ERROR = re.compile(
    rf".*^{UserError.__module__}\.{UserError.__qualname__}: (?!.*^Traceback \(most recent call last\):)(.*)",
    re.MULTILINE | re.DOTALL,
)


PATIENCE = 1.0  # seconds between two looks at whether a signal has to be passed on


def run(
    arguments: argparse.Namespace, work: Callable[..., None], *values: Any, request: StopRequest | None = None
) -> None:
    """Call `work(*values)` in each process that the command's arguments ask for: in this one if that is all.

    Args:
        arguments: of the command.
        work: what each process does.
        values: its arguments.
        request: of the signals that stop the command. `work` gets one as its last argument: this one, or in another
            process that process's own, to which signals to this process are passed on.

    Raises:
        UserError: `work` raised it, in any of the processes, or one of them was killed.
        SystemExit: with `STOPPED`, where `work` has ended with that in any of the processes.
    """
    gpus, machines, url = arguments.num_gpus, arguments.num_machines, arguments.dist_url
    if gpus * machines <= 1:
        work(*values, *([request] if request else []))
        return
    if url == "auto":
        url = f"tcp://127.0.0.1:{_free_port()}"
    try:
        given = (work, *values) if request else values
        meeting = (gpus * machines, gpus, arguments.machine_rank, url)
        _join((_call_stoppable if request else work, *meeting, given), gpus, request)
    except ProcessRaisedException as error:
        found = USER_ERROR.search(str(error))
        if not found:
            raise
        raise UserError(found[1]) from error
    except ProcessExitedException as error:
        if request and error.exit_code in (STOPPED, -signal.SIGUSR1):  # the second: before it handles signals
            raise SystemExit(STOPPED) from error
        raise UserError(f"{error}; what is saved is intact, --resume continues from there") from error


def _join(arguments: tuple[Any, ...], count: int, request: StopRequest | None) -> None:
    """Start the processes and wait for their end. A signal to this process is passed on to them, as SIGUSR1."""
    processes = torch.multiprocessing.spawn(_enter, arguments, count, join=False)
    passed_on = False
    with request.deferred() if request else contextlib.nullcontext():
        while not processes.join(PATIENCE):
            if request and request.requested and not passed_on:
                passed_on = True
                for each in processes.pids():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(each, signal.SIGUSR1)
        if request:
            request.finish()


def _call_stoppable(work: Callable[..., None], *values: Any) -> None:
    """Call `work` with this process's own request to stop."""
    with until_exit(), StopRequest() as request:
        work(*values, request)


def _enter(*arguments: Any) -> None:
    """Runs in a new process, which has imported this package first. Detectron2's own `launch` would start with
    Detectron2, which does not import on today's libraries without `foundation.detectron2_compat`.
    """
    _distributed_worker(*arguments)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
