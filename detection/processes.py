"""The processes of a run, one for each GPU, as Detectron2 launches them; what ends one of them ends as one line."""

import argparse
import re
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import detection.compat  # noqa: F401
from cli.errors import UserError

# isort: split
from detectron2.engine import launch

# How a traceback, which is all that comes from another process, ends when it is of a UserError.
USER_ERROR = re.compile(rf"^{UserError.__module__}\.{UserError.__qualname__}: (.*)", re.MULTILINE | re.DOTALL)


def run(arguments: argparse.Namespace, work: Callable[..., None], *values: Any) -> None:
    """Call `work(*values)` in each process that the command's arguments ask for: in this one if that is all.

    Raises:
        UserError: `work` raised it, in any of the processes, or one of them was killed.
    """
    where = (arguments.num_gpus, arguments.num_machines, arguments.machine_rank, arguments.dist_url)
    try:
        launch(work, *where, args=values)
    except ProcessRaisedException as error:
        found = USER_ERROR.search(str(error))
        if not found:
            raise
        raise UserError(found[1]) from error
    except ProcessExitedException as error:
        raise UserError(f"{error}; what is saved is intact, --resume goes on from there") from error
