"""A folder of fetched tars that never outgrows its bound, shared by all processes of a machine.

For each tar KEY.tar, its index KEY.json, which stays when the tar goes, KEY.part while it is fetched, and KEY.lock,
which whoever fetches it holds. A tar under its final name is complete: it was written aside, synced, indexed and
renamed. The locks are the kernel's (flock), so they go with a process that is killed; what that has left is no tar yet,
and is removed by whoever needs room next.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator
from functools import cache, partial
from pathlib import Path
from typing import IO, NamedTuple

from foundation.errors import UserError
from foundation.files import sync_folder, write_atomic
from pretrain.images.fetch import CHUNK, Interrupted, disk_error, fetch, stall_of
from pretrain.images.shards import Shard
from pretrain.images.tars import TarIndex, index_tar

POLL = 0.1  # seconds between two looks for room


class Known(NamedTuple):
    """What is on record of a tar."""

    size: int  # bytes
    images: TarIndex


class ShardCache:
    """The folder.

    Args:
        folder: made where it is not there.
        limit: bytes that all tars in it may have together, those that are being fetched included.
        patience: seconds in which a fetch that gets nothing is given up.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int, patience: float) -> None:
        self.folder, self.limit, self.patience = folder, limit, patience
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(folder, error) from error

    def path(self, shard: Shard) -> Path:
        """Where a tar is, or will be."""
        return self.folder / f"{key_of(shard)}.tar"

    def has(self, shard: Shard) -> bool:
        """Whether it is there, complete."""
        stem = f"{self.folder}/{key_of(shard)}"
        try:
            return shard.size in (None, os.stat(f"{stem}.tar").st_size) and os.path.exists(f"{stem}.json")
        except FileNotFoundError:
            return False

    def known(self, shard: Shard) -> Known | None:
        """What is on record of a tar that is here or has been; None where it is no more of the size expected.

        Raises:
            UserError: the record cannot be read, or is of another number of images than expected.
        """
        path = self.path(shard).with_suffix(".json")
        try:
            record = json.loads(path.read_text())
            known = Known(record["size"], TarIndex.of(**record["images"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}); remove it") from error
        if shard.size not in (None, known.size):
            return None
        _check_count(shard, known.images)
        return known

    def ensure(self, shard: Shard, keep: Collection[str] = (), wait: bool = True) -> Path:
        """Have a tar in the folder: at once, when another process is through with it, or by fetching it.

        Args:
            shard: the tar.
            keep: keys of tars to leave alone while others can make room.
            wait: False: return at once where another process is at it.

        Raises:
            UserError: it cannot be fetched, is damaged or not what was expected, or the disk is full.
        """
        if not self.has(shard):
            with self._lock(key_of(shard), wait) as held:
                if held and not self.has(shard):
                    self._fetch(shard, keep)
        return self.path(shard)

    def touch(self, shard: Shard) -> None:
        """Make it the last to go."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path(shard))

    def _fetch(self, shard: Shard, keep: Collection[str]) -> None:
        """Fetch a tar whose lock is held."""
        part = self.path(shard).with_suffix(".part")
        try:
            with part.open("wb") as file:
                reserve = partial(self._reserve, part, keep)
                fetch(shard.url, file, size=shard.size, stall=stall_of(self.patience), reserve=reserve)
                file.truncate()
                os.fsync(file.fileno())
            _check_content(part, shard)
            if not self.known(shard):
                self._record(part, shard)
            with self._lock(".cache", wait=True):  # so that whoever counts the files does not miss it
                part.replace(self.path(shard))
            sync_folder(self.folder)
        except OSError as error:
            raise disk_error(self.folder, error) from error
        finally:
            part.unlink(missing_ok=True)

    def _record(self, part: Path, shard: Shard) -> None:
        """Index a tar that has just come."""
        index = index_tar(part, shard.url)
        _check_count(shard, index)
        record = {"url": shard.url, "size": part.stat().st_size, "images": index.lists()}
        write_atomic(self.path(shard).with_suffix(".json"), json.dumps(record).encode())

    def _reserve(self, part: Path, keep: Collection[str], size: int) -> None:
        """Let a file that is being fetched grow to `size` bytes, and remove others where that is too much for all.

        Raises:
            UserError: it is too much for the folder alone, or for the disk.
            Interrupted: only files that are being fetched are left.
        """
        if size > self.limit:
            raise UserError(
                f"{part.stem}.tar has {size:,} bytes or more, DATA.CACHE_GB allows {self.limit:,}; raise it"
            )
        end = time.monotonic() + stall_of(self.patience)
        while True:
            with self._lock(".cache", wait=True):
                if self._make_room(size, part, keep):
                    try:
                        os.truncate(part, size)  # counts from now on, written or not
                    except OSError as error:
                        raise disk_error(part, error) from error
                    return
            if time.monotonic() > end:
                raise Interrupted(f"there is no room in {self.folder} for {size:,} bytes beside others that come")
            time.sleep(POLL)

    def _make_room(self, size: int, part: Path, keep: Collection[str]) -> bool:
        """Remove tars until there is room for `size` bytes: those not in `keep` first, the longest unused first."""
        files = {}
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a fetch that has failed removes its own
                if path.suffix in (".tar", ".part"):
                    files[path] = path.stat()
        excess = sum(found.st_size for path, found in files.items() if path != part) + size - self.limit
        # A file of a fetch that was killed is worth nothing, and its lock is free.
        order = sorted(files, key=lambda path: (path.suffix == ".tar", path.stem in keep, files[path].st_mtime_ns))
        for path in order:
            if excess <= 0:
                break
            if path.stem == part.stem:
                continue
            with self._lock(path.stem, wait=False) as free:
                if free:
                    path.unlink(missing_ok=True)
                    excess -= files[path].st_size
        return excess <= 0

    @contextlib.contextmanager
    def _lock(self, name: str, wait: bool) -> Iterator[bool]:
        """Hold a lock; gives whether it is held, which without `wait` it may not be."""
        with self._open_lock(name) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True  # released when the file is closed

    def _open_lock(self, name: str) -> IO[str]:
        try:
            return (self.folder / f"{name}.lock").open("a")
        except OSError as error:
            raise disk_error(self.folder, error) from error


@cache  # asked for in each step
def key_of(shard: Shard) -> str:
    """The name of its files: readable, and of one URL only."""
    name = shard.url.partition("?")[0].rpartition("/")[2].removesuffix(".tar")
    readable = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[-40:]
    return f"{readable}-{hashlib.sha256(shard.url.encode()).hexdigest()[:16]}"


def _check_count(shard: Shard, index: TarIndex) -> None:
    """Compare the number of images, where it is known. Raises UserError where it is another."""
    if shard.samples not in (None, len(index)):
        raise UserError(
            f"{shard.url} has {len(index)} images, and its index says {shard.samples} samples; correct the index, or "
            "leave nsamples out of it"
        )


def _check_content(path: Path, shard: Shard) -> None:
    """Compare the digest, where it is known. Raises UserError where it is another."""
    if not shard.md5:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != shard.md5:
        raise UserError(f"{shard.url} is damaged or has changed: its MD5 is not {shard.md5}, as its index says")
