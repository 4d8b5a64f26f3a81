"""Files with a digest: complete or absent, whatever happens to the process and the disk."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch

from foundation import files
from foundation.errors import UserError


class Killed(BaseException):
    """Ends a process at that very line: nothing is cleaned up."""


def test_a_file_is_written_with_its_digest(tmp_path):
    path = tmp_path / "a.bin"
    digest = files.write_with_digest(path, lambda file: [file.write(b"ab"), file.write(b"c")])
    assert path.read_bytes() == b"abc"
    assert digest == hashlib.sha256(b"abc").hexdigest()
    assert files.digest_file(path).read_text() == f"{digest}\n"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.bin", "a.sha256"]


@pytest.mark.parametrize("replacing", [False, True])
def test_a_process_is_killed_at_any_moment_of_writing(replacing, tmp_path, monkeypatch):
    """A process is killed at its first, second, ... call to the system."""
    path = tmp_path / "a.bin"
    if replacing:
        files.write_with_digest(path, lambda file: file.write(b"old"))
    left = {"calls": -1}

    def counted(call):
        def wrapped(*arguments, **options):
            if left["calls"] == 0:
                raise Killed
            left["calls"] -= 1
            return call(*arguments, **options)

        return wrapped

    kind = type(tmp_path)
    for owner, name in ((os, "fsync"), (kind, "open"), (kind, "unlink"), (kind, "replace")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    kills = 0
    while True:
        left["calls"] = kills
        try:
            files.write_with_digest(path, lambda file: file.write(b"new"))
            break
        except Killed:
            kills += 1
            left["calls"] = -1
        digest = files.digest_file(path)
        assert path.exists() or not replacing
        if path.exists():
            assert path.read_bytes() in (b"old", b"new")
            assert digest.exists() or replacing
        if path.exists() and digest.exists():
            assert digest.read_text().strip() == files.sha256_of(path)
    assert kills > 5


def test_a_folder_that_tensorboard_cannot_write_to(tmp_path):
    files.check_utf8(tmp_path / "übung")
    with pytest.raises(UserError, match="needs a path that is UTF-8; choose another --output"):
        files.check_utf8(tmp_path / os.fsdecode(b"a\xff"))


def test_a_folder_that_cannot_be_written_is_found_without_a_trace(tmp_path, monkeypatch):
    files.check_writable(tmp_path / "new" / "run")
    monkeypatch.chdir(tmp_path)
    files.check_writable(Path("run"))
    assert not list(tmp_path.iterdir())
    file = tmp_path / "file"
    file.touch()
    for check in (files.check_writable, files.make_folder):
        with pytest.raises(UserError, match=rf"cannot write the folder {file}: it is a file; choose another --output$"):
            check(file)
    with pytest.raises(UserError, match=rf"run: {file} is a file; choose another --output"):
        files.check_writable(file / "a" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # the superuser may write everywhere
    with pytest.raises(UserError, match=rf"run: {tmp_path} may not be written to; choose another --output"):
        files.check_writable(tmp_path / "run")


@pytest.mark.parametrize("size", [1, 100_000], ids=["found at the end", "found by torch.save"])
def test_a_full_disk_leaves_the_old_file(size, tmp_path):
    path = tmp_path / "a.bin"
    files.write_with_digest(path, lambda file: file.write(b"old"))
    path.with_name("a.bin.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        files.write_with_digest(path, lambda file: torch.save(torch.zeros(size), file))
    assert path.read_bytes() == b"old"
    assert files.digest_file(path).read_text().strip() == files.sha256_of(path)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_digest_tells_whether_the_content_is_as_it_was_written(tmp_path):
    path = tmp_path / "a.bin"
    files.write_with_digest(path, lambda file: file.write(b"old"))
    assert files.matches_digest(path)
    files.digest_file(path).write_text(f"{files.sha256_of(path)}  a.bin\n")  # as sha256sum writes it
    assert files.matches_digest(path)
    path.write_bytes(b"olp")
    assert not files.matches_digest(path)
    files.digest_file(path).unlink()
    assert not files.matches_digest(path)


def test_a_full_disk_is_one_line(tmp_path, files_up_to):
    message = rf"cannot write {tmp_path}.*: File too large \(\d+ MB free\)"
    with files_up_to(10), pytest.raises(UserError, match=message), files.report_disk_errors(tmp_path):
        files.write_atomic(tmp_path / "a", bytes(100))
    assert list(tmp_path.iterdir()) == []


def test_a_signal_leaves_no_draft(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "a", b"content")
    assert list(tmp_path.iterdir()) == []


def test_what_a_library_writes_is_complete_or_as_it_was(tmp_path, files_up_to):
    path = tmp_path / "a.png"
    for content in (b"old", b"new"):
        with files.complete_file(path) as draft:
            draft.write_bytes(content)
            assert draft.suffix == ".png"  # by which libraries choose the format
        assert path.read_bytes() == content
    with files_up_to(10), pytest.raises(OSError, match="File too large"), files.complete_file(path) as draft:
        draft.write_bytes(bytes(100))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_about_other_files_keep_their_kind(tmp_path):
    with pytest.raises(FileNotFoundError), files.report_disk_errors(tmp_path / "run"):
        (tmp_path / "other").read_bytes()
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(UserError, match="Not a directory"), files.report_disk_errors(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").write_text("x")


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_machines_share_is_replaced_where_it_is_another(links, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "no hard links")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "a.json"
    for content in (b"one", b"two"):
        files.write_shared(path, content)
        assert path.read_bytes() == content
    before = path.stat()
    files.write_shared(path, b"two")
    assert path.stat() == before
    assert [*tmp_path.iterdir()] == [path]
