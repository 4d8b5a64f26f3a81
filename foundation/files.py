"""Files that are whole or not there: written aside, synced, renamed."""

import os
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Write a whole file or nothing. Raises OSError where the disk is full or cannot be written."""
    aside = path.with_name(path.name + ".tmp")
    try:
        write_synced(aside, content)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def write_synced(path: Path, content: bytes | memoryview) -> None:
    """Write a file, and return when it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk: a rename is not, before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
