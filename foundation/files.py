"""Files that are complete or absent: written under a temporary name, synced, then renamed; and files with a digest."""

import contextlib
import errno
import hashlib
import math
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from foundation.errors import UserError

# A disk that takes no more: full or out of inodes, over quota, read-only, or the largest file size is reached.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file completely or not at all. Raises OSError where the disk is full or cannot be written."""
    draft = path.with_name(path.name + ".tmp")
    try:
        write_synced(draft, content)
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def write_shared(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, in a folder in which other machines may be writing the same one.

    A file with this content is left as it is: on a network file system, replacing it would end its being read elsewhere
    with an error. Raises OSError where the disk is full or cannot be written.
    """
    if _has_content(path, content):
        return
    draft = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        write_synced(draft, content)
        try:
            os.link(draft, path)  # unlike a rename, it fails where another machine was first
        except OSError:
            if not _has_content(path, content):  # an older file is there, or the file system has no hard links
                draft.replace(path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the same suffix, for a library to write to, and rename it to `path` at the end.

    An error leaves `path` as it was, and removes the temporary file.
    """
    draft = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def write_synced(path: Path, content: bytes | memoryview) -> None:
    """Write a file, and return when it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def check_writable(folder: Path, what: str = "--output") -> None:
    """Check, and leave no trace, that a folder can be made or written to.

    Args:
        folder: to be made, or there.
        what: the user is to choose another one of.

    Raises:
        UserError: it is a file, or below one, or may not be written to.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    name = "it" if nearest == folder else str(nearest)
    if not nearest.is_dir():
        raise UserError(f"cannot write the folder {folder}: {name} is a file; choose another {what}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write the folder {folder}: {name} may not be written to; choose another {what}")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they exist. Raises UserError where that is not possible."""
    check_writable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error


def check_size(path: Path, max_bytes: int) -> None:
    """Check a file before it is read.

    Raises:
        UserError: it is not a regular file, or it is larger than `max_bytes`. The message begins with the path.
        OSError: there is no such file, or its folder cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block
        raise UserError(f"{path} is not a file")
    if status.st_size > max_bytes:
        raise UserError(f"{path} is too large: {status.st_size:,} bytes, where {max_bytes:,} are allowed")


def check_utf8(folder: Path) -> None:
    """Check that the path of a run folder is UTF-8, as TensorBoard needs it. Raises UserError."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{folder}: TensorBoard needs a path that is UTF-8; choose another --output") from error


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk: until then, a rename may be lost when the machine fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_with_digest(path: Path, save: Callable[[IO[bytes]], None]) -> str:
    """Write a large file as a stream, with its SHA-256 in `digest_file(path)`; returns the digest.

    The file is written as `NAME.tmp`, synced, read back and renamed. Whenever the process is killed, `path` holds its
    old or its new content. A new file never appears without its digest; while an existing file is replaced, it has no
    digest for a moment, instead of the digest of other content.

    Args:
        path: of the file.
        save: writes the content to the stream it is given, which has `write` and `flush`. `torch.save` does.

    Raises:
        OSError: the disk is full or cannot be written, or the file read back is not what was written. `path` is
            unchanged, and the temporary file is removed.
    """
    draft = path.with_name(f"{path.name}.tmp")
    try:
        with draft.open("wb") as file:
            stream = _DigestingStream(file)
            try:
                save(stream)  # type: ignore[arg-type]
            except RuntimeError as error:  # what torch.save makes of a full disk
                if stream.error is None:
                    raise
                raise stream.error from error
            file.flush()
            os.fsync(file.fileno())
        digest = stream.digest()
        if sha256_of(draft) != digest:
            raise OSError("the file read back is not what was written")
        replacing = path.exists()
        if replacing:
            digest_file(path).unlink(missing_ok=True)
        else:
            write_atomic(digest_file(path), f"{digest}\n".encode())
        draft.replace(path)
        if replacing:
            write_atomic(digest_file(path), f"{digest}\n".encode())
        sync_folder(path.parent)
    except Exception:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    return digest


def digest_file(path: Path) -> Path:
    """Where the SHA-256 of a file is kept: `NAME.sha256` beside `NAME.pth`."""
    return path.with_suffix(".sha256")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def matches_digest(path: Path) -> bool:
    """Whether a file has the content that its digest says; False where it has no digest.

    Raises:
        OSError: the file or its digest cannot be read.
    """
    try:
        recorded = digest_file(path).read_bytes().split()  # sha256sum writes the name after the digest
    except FileNotFoundError:
        return False
    return recorded[:1] == [sha256_of(path).encode()]


def free_space(path: Path) -> str:
    """The space left on the disk of an existing path, in words, for an error message."""
    try:
        return f"{shutil.disk_usage(path).free / 1e6:.0f} MB free"
    except OSError:
        return "the disk does not answer"


def describe_unsaved(error: OSError, folder: Path, save: Callable[[IO[bytes]], None], earlier: bool) -> str:
    """The end of a message about a checkpoint that cannot be written: why, the room, and what is left.

    Args:
        error: what writing it has raised.
        folder: that exists, on the same disk.
        save: as for `write_with_digest`; on a full disk it is called again, to measure.
        earlier: whether there is a checkpoint before it.
    """
    room = free_space(folder)
    if error.errno in FULL_DISK:
        with contextlib.suppress(OSError, RuntimeError):
            room += f", {math.ceil(_size_of(save) / 1e6)} MB needed"
    left = "earlier checkpoints are untouched, --resume continues from them"
    none = "there is no checkpoint before it: make room, and begin again"
    return f"{error.strerror or error} ({room}); {left if earlier else none}"


def _size_of(save: Callable[[IO[bytes]], None]) -> int:
    """The bytes that `save` writes."""
    stream = _CountingStream()
    save(stream)  # type: ignore[arg-type]
    return stream.size


@contextlib.contextmanager
def report_disk_errors(folder: Path) -> Iterator[None]:
    """Report a run folder that cannot be written as one line.

    Raises:
        UserError: in place of an OSError that is about a file in the folder, or that says that a disk is full.
    """
    try:
        yield
    except OSError as error:
        inside = isinstance(error.filename, (str, os.PathLike)) and Path(error.filename).is_relative_to(folder)
        if not inside and error.errno not in FULL_DISK:
            raise
        raise UserError(
            f"cannot write {error.filename or folder}: {error.strerror} ({free_space(folder)}); make room, or choose "
            "another folder. What was saved before is intact"
        ) from error


def _has_content(path: Path, content: bytes) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


class _CountingStream:
    """Counts what is written to it, and keeps nothing."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        pass


class _DigestingStream:
    """Computes the SHA-256 of what is written through it, and keeps the error that torch.save would hide."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()
