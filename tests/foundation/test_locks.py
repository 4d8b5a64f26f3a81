"""The lock of a run folder, and file systems that have none."""

import contextlib
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foundation import locks
from foundation.errors import UserError


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_as_that(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", lockf)
    with pytest.raises(UserError, match=rf"^{tmp_path}: this file system has no locks \({os.strerror(number)}\)"):
        locks.hold(tmp_path)
    assert not locks.is_held(tmp_path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_lock_that_is_taken(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / ".lock").touch()
    monkeypatch.setattr("fcntl.lockf", lockf)
    with pytest.raises(UserError, match=f"another process is running in {tmp_path}"):
        locks.hold(tmp_path)
    assert locks.is_held(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write the folder .*/run: .*/file is a file; choose another folder"):
        locks.hold(tmp_path / "file" / "run")


def test_workers_end_when_their_parent_is_killed() -> None:
    """A process of its own starts a worker, says its number, and is killed."""
    program = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from foundation import locks
with ProcessPoolExecutor(1, initializer=locks.end_with_parent, initargs=(os.getpid(),)) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = Path(f"/proc/{int(parent.stdout.readline())}/stat")
        assert worker.exists()
        parent.kill()
        until = time.monotonic() + 20
        with contextlib.suppress(OSError):  # it is gone
            while worker.read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.monotonic() < until, "the worker goes on"
                time.sleep(0.05)
