"""Bytes from elsewhere: over http(s) or from a command, tried again where that may help, for a bounded time."""

import http.client
import logging
import os
import random
import select
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from foundation.errors import UserError

ATTEMPTS = 8  # without a byte more than the one before
FEW = 3  # of what is asked before the first step: whoever started the run still looks
CHUNK = 1 << 20  # bytes
TRANSIENT_STATUSES = (408, 425, 429)  # answers of a server that may be others later, as those from 500 on
T = TypeVar("T")
logger = logging.getLogger("pretrain")
_jitter = random.Random()  # not the global one, which belongs to whoever has seeded it


class Interrupted(Exception):
    """Something that may go better when it is tried again."""


def stall_of(patience: float) -> float:
    """Seconds without a byte after which a connection is given up, so that all attempts end within `patience`.

    `ATTEMPTS` stalls and the pauses between them, a sixteenth of one doubled each time, are 16 stalls.
    """
    return patience / 20


def fetch(url: str, file: IO[bytes], *, size: int | None, stall: float, reserve: Callable[[int], None]) -> None:
    """Write what a URL holds, or what the command behind `pipe:` writes, to a file.

    A broken connection goes on where it ended, where the server can do that.

    Args:
        url: http, https, or pipe.
        file: empty, open for writing.
        size: bytes to expect; None: unknown.
        stall: seconds without a byte after which a connection is given up.
        reserve: called with the number of bytes that the file is going to have, before they are written.

    Raises:
        UserError: not there, not allowed, not of that size, the disk is full, or `ATTEMPTS` have failed.
    """
    if url.startswith("pipe:"):
        retry(url, lambda: _run(url.removeprefix("pipe:"), file, stall, reserve), stall, lambda: 0)
    else:
        download = _Download(url, file, size, stall, reserve)
        retry(url, download.attempt, stall, file.tell)
    if size is not None and file.tell() != size:
        raise UserError(_other_size(url, file.tell(), size))


def measure(url: str, stall: float) -> int | None:
    """Bytes behind an http(s) URL; None where the server does not say. Raises UserError where there is nothing."""

    def attempt() -> int | None:
        with _open(url, stall, {"Range": "bytes=0-0"}) as answer:
            length = answer.headers.get("Content-Length")
            if answer.status == 206:
                length = answer.headers.get("Content-Range", "").rpartition("/")[2]
            return int(length) if length and length.isdigit() else None

    return retry(url, attempt, stall, lambda: 0, FEW)


def read_text(url: str, stall: float) -> str:
    """A text file behind an http(s) URL. Raises UserError where it cannot be had."""

    def attempt() -> str:
        with _open(url, stall, {}) as answer:
            return answer.read().decode()

    return retry(url, attempt, stall, lambda: 0, FEW)


def retry(url: str, attempt: Callable[[], T], stall: float, position: Callable[[], int], attempts: int = ATTEMPTS) -> T:
    """The result of `attempt`, which is called again, after a pause, where it fails for what may pass.

    Raises:
        UserError: it failed for good, or `attempts` times without coming further than before (`position`).
    """
    furthest, failures = 0, 0
    while True:
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code < 500 and error.code not in TRANSIENT_STATUSES:
                raise UserError(f"{url} cannot be fetched: {reason}; check DATA.ROOT") from error
        except TimeoutError:
            reason = f"nothing came for {stall:g} s"
        except urllib.error.URLError as error:
            late = isinstance(error.reason, TimeoutError)
            reason = f"no connection in {stall:g} s" if late else str(error.reason)
        except (OSError, http.client.HTTPException, Interrupted) as error:
            reason = str(error) or type(error).__name__
        failures = 1 if position() > furthest else failures + 1
        furthest = max(furthest, position())
        if failures == attempts:
            raise UserError(f"{url} cannot be fetched: {reason}, after {attempts} attempts")
        logger.warning("%s: %s; trying again", url, reason)
        time.sleep(stall / 16 * 2 ** (failures - 1) * _jitter.uniform(0.5, 1))


def _open(url: str, stall: float, headers: dict[str, str]) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "corinfomax", **headers})
    return urllib.request.urlopen(request, timeout=stall)


class _Download:
    """A file over http(s). An attempt goes on where the one before ended."""

    def __init__(
        self, url: str, file: IO[bytes], size: int | None, stall: float, reserve: Callable[[int], None]
    ) -> None:
        self._url, self._file, self._size, self._stall, self._reserve = url, file, size, stall, reserve
        self._state = ""  # of the content, as the server names it: a part of another must not be appended

    def attempt(self) -> None:
        """Fetch what is missing. Raises UserError for a size that is not the one expected."""
        there = self._file.tell() if self._state else 0
        headers = {"Range": f"bytes={there}-", "If-Range": self._state} if there else {}
        with _open(self._url, self._stall, headers) as answer:
            there = there if answer.status == 206 else 0
            self._file.seek(there)
            self._file.truncate()
            self._state = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            length = answer.headers.get("Content-Length")
            total = there + int(length) if length else None
            if total is not None:
                if self._size not in (None, total):
                    raise UserError(_other_size(self._url, total, self._size))
                self._reserve(total)
            while chunk := answer.read1(CHUNK):  # what has come, as a broken read() would lose it
                _write(self._file, chunk, self._reserve if total is None else None)
        if total is not None and self._file.tell() != total:
            raise Interrupted(f"the connection ended after {self._file.tell()} of {total} bytes")


def _other_size(url: str, size: int, expected: int | None) -> str:
    return (
        f"{url} has {size} bytes, and {expected} were expected, by its index or when it was here before; if it has "
        "changed, correct the index, or remove the tar's .json from DATA.CACHE"
    )


def _run(command: str, file: IO[bytes], stall: float, reserve: Callable[[int], None]) -> None:
    """Write the output of a shell command to a file. One that fails or is silent for too long is ended."""
    file.seek(0)
    file.truncate()
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, process_group=0
        )
        assert process.stdout is not None
        try:
            while True:
                if not select.select([process.stdout], [], [], stall)[0]:
                    raise TimeoutError
                chunk = os.read(process.stdout.fileno(), CHUNK)
                if not chunk:
                    break
                _write(file, chunk, reserve)
            status = process.wait(stall)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
        complaints.seek(0)
        said = complaints.read().decode("utf-8", "replace").strip().splitlines()
    if status:
        raise Interrupted(f"the command ends with status {status}" + (f" ({said[-1]})" if said else ""))


def _write(file: IO[bytes], chunk: bytes, reserve: Callable[[int], None] | None) -> None:
    """Append to a file. Its own errors are the disk's, not the connection's."""
    if reserve:
        reserve(file.tell() + len(chunk))
    try:
        file.write(chunk)
        file.flush()
    except OSError as error:
        raise disk_error(file.name, error) from error


def disk_error(place: str | Path, error: OSError) -> UserError:
    """What to say of a folder for tars, or a file in it, that cannot be written."""
    return UserError(f"cannot write {place}: {error.strerror}; make room, lower DATA.CACHE_GB, or set DATA.CACHE")
