"""The processes of a run, one for each GPU. An error in any of them is reported as one line."""

import argparse
import re
import socket
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine.launch import _distributed_worker
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from foundation.errors import UserError

# Another process sends its traceback as text; this finds the message of a UserError in it.
USER_ERROR = re.compile(rf"^{UserError.__module__}\.{UserError.__qualname__}: (.*)", re.MULTILINE | re.DOTALL)


def run(arguments: argparse.Namespace, work: Callable[..., None], *values: Any) -> None:
    """Call `work(*values)` in each process that the command's arguments ask for: in this one if that is all.

    Raises:
        UserError: `work` raised it, in any of the processes, or one of them was killed.
    """
    gpus, machines, url = arguments.num_gpus, arguments.num_machines, arguments.dist_url
    if gpus * machines <= 1:
        work(*values)
        return
    if url == "auto":
        url = f"tcp://127.0.0.1:{_free_port()}"
    try:
        torch.multiprocessing.spawn(_enter, (work, gpus * machines, gpus, arguments.machine_rank, url, values), gpus)
    except ProcessRaisedException as error:
        found = USER_ERROR.search(str(error))
        if not found:
            raise
        raise UserError(found[1]) from error
    except ProcessExitedException as error:
        raise UserError(f"{error}; what is saved is intact, --resume continues from there") from error


def _enter(*arguments: Any) -> None:
    """Runs in a new process, which has imported this package first. Detectron2's own `launch` would start with
    Detectron2, which does not import on today's libraries without `foundation.detectron2_compat`.
    """
    _distributed_worker(*arguments)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
