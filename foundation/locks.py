"""One process for each run folder, and no workers left in it when that process is killed."""

import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import IO

from foundation.errors import UserError
from foundation.files import check_writable

# Kept open for as long as the process lives. These are record locks, which end with this very process. Other locks are
# inherited by the loader's workers, which outlive a killed run for some seconds and would refuse the next one.
_held: list[IO[str]] = []
TAKEN = (errno.EACCES, errno.EAGAIN)  # POSIX allows both


def hold(folder: Path) -> None:
    """Reserve a folder, which is created if needed, for this process until it ends.

    Raises:
        UserError: another process holds it, its file system has no locks, or it cannot be written.
    """
    check_writable(folder, "folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write the folder {folder}: {error.strerror or error}") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in TAKEN:
            raise UserError(f"another process is running in {folder}; wait for it, or choose another folder") from error
        raise UserError(
            f"{folder}: this file system has no locks ({error.strerror}), which keep two processes out of one folder; "
            "mount it with locks, or choose a folder on another file system"
        ) from error
    _held.append(file)


def is_held(folder: Path) -> bool:
    """Whether another process holds a folder. False where that cannot be known."""
    try:
        with (folder / ".lock").open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the file is closed
    except OSError as error:
        return error.errno in TAKEN and error.filename is None  # else the file could not be opened
    return False


def end_with_parent(parent: int) -> None:
    """Have a worker exit when its parent is killed; called in the worker, as the initializer of its pool.

    An executor's workers would wait for work forever, and go on writing while the same command runs again.

    Args:
        parent: number of the process that starts the worker.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
