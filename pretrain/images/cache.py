"""A folder of fetched tars with bounded size, shared by all processes of a machine.

For each tar there are KEY.tar; its index KEY.json, which stays when the tar is removed; KEY.part while it is fetched;
and KEY.lock, which the process that fetches it holds. A tar under its final name is complete: it was written as
KEY.part, synced, indexed and renamed. The kernel releases the locks of a process that is killed (flock). What such a
process leaves is not a tar yet, and is removed by the next process that needs room.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from foundation.errors import UserError
from foundation.files import sync_folder, write_atomic
from foundation.json_files import read_json
from foundation.names import counted
from pretrain.images.fetch import CHUNK, Interrupted, disk_error, fetch, stall_of
from pretrain.images.shards import MAX_INDEX, Shard
from pretrain.images.tars import TarIndex, index_tar

POLL = 0.1  # seconds between two attempts to find room


class Known(NamedTuple):
    """What the index of a tar says."""

    size: int  # bytes
    images: TarIndex


class ShardCache:
    """A folder of fetched tars, which several processes may share.

    Args:
        folder: created if needed.
        limit: most bytes of all tars in it together, including those being fetched.
        patience: seconds without data after which a fetch fails.

    Raises:
        UserError: the folder cannot be created.
    """

    def __init__(self, folder: Path, limit: int, patience: float) -> None:
        self.folder, self.limit, self.patience = folder, limit, patience
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(folder, error) from error

    def path(self, shard: Shard) -> Path:
        """The path of a tar, fetched or not."""
        return self.folder / f"{key_of(shard)}.tar"

    def has(self, shard: Shard) -> bool:
        """Whether a tar is in the folder and complete."""
        stem = f"{self.folder}/{key_of(shard)}"
        try:
            return shard.size in (None, os.stat(f"{stem}.tar").st_size) and os.path.exists(f"{stem}.json")
        except FileNotFoundError:
            return False

    def known(self, shard: Shard) -> Known | None:
        """The index of a tar that is or was in the folder. None: there is none, or it is of a tar of another size.

        Raises:
            UserError: the index cannot be read, or has another number of images than expected.
        """
        path = self.path(shard).with_suffix(".json")
        if not path.exists():
            return None
        try:
            record = read_json(path, MAX_INDEX)
            known = Known(int(record["size"]), TarIndex.of(**record["images"]))
        except (UserError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{path} is not a usable index of a tar ({error}); remove this file") from error
        if shard.size not in (None, known.size):
            return None
        _check_count(shard, known.images)
        return known

    def ensure(self, shard: Shard, keep: Collection[str] = (), wait: bool = True) -> Path:
        """Fetch a tar unless it is in the folder, or wait for the process that fetches it. Returns its path.

        Args:
            shard: the tar.
            keep: keys of tars that are removed only if removing others does not make enough room.
            wait: False: return at once if another process fetches it.

        Raises:
            UserError: it cannot be fetched, is damaged or not what was expected, or the disk is full.
        """
        if not self.has(shard):
            with self._lock(key_of(shard), wait) as held:
                if held and not self.has(shard):
                    self._fetch(shard, keep)
        return self.path(shard)

    def ensure_known(self, shard: Shard) -> None:
        """Fetch a tar unless its index is known, or wait for the process that fetches it. Raises as `ensure`."""
        with self._lock(key_of(shard), wait=True):
            if self.known(shard) is None:
                self._fetch(shard, keep=())

    def touch(self, shard: Shard) -> None:
        """Mark a tar as used, so that others are removed before it."""
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
            with self._lock(".cache", wait=True):  # a process that adds up the sizes must not miss it
                part.replace(self.path(shard))
            sync_folder(self.folder)
        except OSError as error:
            raise disk_error(self.folder, error) from error
        finally:
            part.unlink(missing_ok=True)

    def _record(self, part: Path, shard: Shard) -> None:
        """Write the index of a tar that was just fetched."""
        index = index_tar(part, shard.url)
        _check_count(shard, index)
        record = {"url": shard.url, "size": part.stat().st_size, "images": index.lists()}
        write_atomic(self.path(shard).with_suffix(".json"), json.dumps(record).encode())

    def _reserve(self, part: Path, keep: Collection[str], size: int) -> None:
        """Let a file that is being fetched grow to `size` bytes, and remove others if the limit requires it.

        Raises:
            UserError: it is larger than the limit, or than the disk allows.
            Interrupted: only files that are being fetched are left, and they leave no room.
        """
        if size > self.limit:
            raise UserError(
                f"{part.stem}.tar has {size:,} bytes or more, but DATA.CACHE_GB allows {self.limit:,}; raise it"
            )
        end = time.monotonic() + stall_of(self.patience)
        while True:
            with self._lock(".cache", wait=True):
                if self._make_room(size, part, keep):
                    try:
                        os.truncate(part, size)  # it counts from now on, written or not
                    except OSError as error:
                        raise disk_error(part, error) from error
                    return
            if time.monotonic() > end:
                raise Interrupted(
                    f"there is no room in {self.folder} for {size:,} bytes beside other tars being fetched"
                )
            time.sleep(POLL)

    def _make_room(self, size: int, part: Path, keep: Collection[str]) -> bool:
        """Remove tars until there is room for `size` bytes: first those not in `keep`, of these the longest unused."""
        files = {}
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a fetch that failed has removed its file
                if path.suffix in (".tar", ".part"):
                    files[path] = path.stat()
        excess = sum(found.st_size for path, found in files.items() if path != part) + size - self.limit
        # The file of a fetch that was killed is useless, and its lock is free.
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
        """Hold a lock. Yields whether it is held, which without `wait` it may not be."""
        lock = FileLock(self.folder / f"{name}.lock", poll_interval=POLL)
        try:
            lock.acquire(blocking=wait)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise disk_error(self.folder, error) from error
        try:
            yield True
        finally:
            lock.release()


@cache  # needed in each step
def key_of(shard: Shard) -> str:
    """The stem of a tar's files: readable, and unique to its URL."""
    name = shard.url.partition("?")[0].rpartition("/")[2].removesuffix(".tar")
    readable = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[-40:]
    return f"{readable}-{hashlib.sha256(shard.url.encode()).hexdigest()[:16]}"


def _check_count(shard: Shard, index: TarIndex) -> None:
    """Raises UserError where the number of images is not the expected one."""
    if shard.samples not in (None, len(index)):
        raise UserError(
            f"{shard.url} has {counted(len(index), 'image')}, but its index says {shard.samples} samples; correct the "
            "index, or leave nsamples out"
        )


def _check_content(path: Path, shard: Shard) -> None:
    """Raises UserError where the MD5 digest is not the expected one."""
    if not shard.md5:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != shard.md5:
        raise UserError(f"{shard.url} is damaged or has changed: its MD5 is not {shard.md5}, which its index says")
