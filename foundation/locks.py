"""One process for each run's folder."""

import fcntl
from pathlib import Path
from typing import IO

from foundation.errors import UserError

# Open for as long as the process lives. Record locks, since they die with this very process: others are inherited by
# the loader's workers, which outlive a killed run for some seconds and would keep the next one out.
_held: list[IO[str]] = []


def hold(folder: Path) -> None:
    """Keep a folder, which is made if need be, to this process until it ends.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"the run cannot be kept in {folder}: {error.strerror or error}") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(f"another process is running in {folder}; wait for it, or choose another --output") from error
    _held.append(file)


def is_held(folder: Path) -> bool:
    """Whether another process holds a folder."""
    try:
        with (folder / ".lock").open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the file is closed
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
