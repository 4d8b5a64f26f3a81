"""The lock of a run folder, and file systems that have none."""

import errno
import os
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
    with pytest.raises(UserError, match=r"cannot write the folder .*: Not a directory"):
        locks.hold(tmp_path / "file" / "run")
