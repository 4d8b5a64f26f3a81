"""Remote bytes: over http(s), from an object store or from a command, with repeated attempts for a bounded time.

Everything here runs in the calling process without threads, because loader workers may be forked from it. Object stores
are read by a process of their own (`remote.py`).
"""

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from foundation.errors import UserError
from pretrain.images import remote

ATTEMPTS = 8  # without progress
FEW = 3  # before the first step, while whoever started the run is waiting
CHUNK = 1 << 20  # bytes
TRANSIENT_STATUSES = (408, 425, 429)  # of HTTP: worth another attempt, as those from 500 on
T = TypeVar("T")
logger = logging.getLogger("pretrain")
_jitter = random.Random()  # not the global generator, which a caller may have seeded


class Interrupted(Exception):
    """A failure that may be transient."""


def stall_of(patience: float) -> float:
    """Seconds without a byte after which a connection is closed, so that all attempts end within `patience`.

    `ATTEMPTS` stalls and the pauses between them (a sixteenth of a stall, doubled each time) take 16 stalls.
    """
    return patience / 20


def fetch(url: str, file: IO[bytes], *, size: int | None, stall: float, reserve: Callable[[int], None]) -> None:
    """Write the content of a URL, or the output of the command after `pipe:`, to a file.

    A broken connection is continued at the byte where it ended, if the server supports that.

    Args:
        url: http, https, an object store's, or pipe.
        file: empty, open for writing.
        size: bytes to expect; None: unknown.
        stall: seconds without a byte after which a connection is closed.
        reserve: called with the number of bytes that the file is going to have, before they are written.

    Raises:
        UserError: the URL does not exist, is not allowed or has another size; the disk is full; or `ATTEMPTS` failed.
    """
    if url.startswith("pipe:"):
        command = url.removeprefix("pipe:")
        retry(url, lambda: _run(command, file, 0, stall, reserve), stall, lambda: 0)
    elif url.startswith(("http://", "https://")):
        download = _Download(url, file, size, stall, reserve)
        retry(url, download.attempt, stall, file.tell)
    else:
        remote.check_installed(url)
        retry(
            url,
            lambda: _run(remote.read_command(url, file.tell()), file, file.tell(), stall, reserve),
            stall,
            file.tell,
        )
    if size is not None and file.tell() != size:
        raise UserError(_other_size(url, file.tell(), size))


def measure(url: str, stall: float) -> int | None:
    """The size in bytes of what an http(s) URL holds; None where the server does not say. Raises UserError."""

    def attempt() -> int | None:
        with _open(url, stall, {"Range": "bytes=0-0"}) as answer:
            length = answer.headers.get("Content-Length")
            if answer.status == 206:
                length = answer.headers.get("Content-Range", "").rpartition("/")[2]
            return int(length) if length and length.isdigit() else None

    return retry(url, attempt, stall, lambda: 0, FEW)


def measure_objects(urls: Sequence[str], stall: float) -> Sequence[int | None]:
    """The sizes in bytes of objects in object stores. Raises UserError as `retry`."""
    remote.check_installed(urls[0])

    def attempt() -> Sequence[int | None]:
        done = subprocess.run(
            remote.sizes_command(),
            input="\n".join(urls),
            capture_output=True,
            text=True,
            timeout=20 * stall,
            env=remote.environment(),
        )
        if done.returncode:
            raise _failure(done.returncode, done.stderr, by_shell=False)
        return [int(line) if line else None for line in done.stdout.split("\n")[: len(urls)]]

    return retry(urls[0], attempt, stall, lambda: 0, FEW)


def read_url(url: str, stall: float, limit: int) -> bytes:
    """The content of an http(s) URL. Raises UserError where it cannot be read, or has more than `limit` bytes."""

    def attempt() -> bytes:
        with _open(url, stall, {}) as answer:
            return answer.read(limit + 1)

    content = retry(url, attempt, stall, lambda: 0, FEW)
    if len(content) > limit:
        raise UserError(f"{url} is too large: it has more than {limit:,} bytes")
    return content


def retry(url: str, attempt: Callable[[], T], stall: float, position: Callable[[], int], attempts: int = ATTEMPTS) -> T:
    """The result of `attempt`, which is called again, after a pause, if it fails in a way that may be transient.

    Raises:
        UserError: the failure is permanent, or `attempts` failures came without progress (`position`).
    """
    furthest, failures = 0, 0
    while True:
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code < 500 and error.code not in TRANSIENT_STATUSES:
                raise UserError(f"{url} cannot be fetched: {reason}; check DATA.ROOT") from error
        except subprocess.TimeoutExpired as error:
            reason = f"nothing came for {error.timeout:g} s"
        except TimeoutError:
            reason = f"nothing came for {stall:g} s"
        except urllib.error.URLError as error:
            late = isinstance(error.reason, TimeoutError)
            reason = f"no connection in {stall:g} s" if late else str(error.reason)
        except (http.client.InvalidURL, ValueError) as error:
            raise UserError(f"{url} is not a URL that can be fetched: {error}; check DATA.ROOT") from error
        except (OSError, http.client.HTTPException, Interrupted) as error:
            reason = str(error) or type(error).__name__
        failures = 1 if position() > furthest else failures + 1
        furthest = max(furthest, position())
        if failures == attempts:
            raise UserError(
                f"{url} cannot be fetched: {reason}, after {attempts} attempts; check the network and the server"
            )
        logger.warning("%s: %s; trying again", url, reason)
        time.sleep(stall / 16 * 2 ** (failures - 1) * _jitter.uniform(0.5, 1))


def _open(url: str, stall: float, headers: dict[str, str]) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "corinfomax", **headers})
    return urllib.request.urlopen(request, timeout=stall)


class _Download:
    """A file over http(s). An attempt continues where the previous one ended."""

    def __init__(
        self, url: str, file: IO[bytes], size: int | None, stall: float, reserve: Callable[[int], None]
    ) -> None:
        self._url, self._file, self._size, self._stall, self._reserve = url, file, size, stall, reserve
        self._version = ""  # of the content, as the server names it: parts of two versions must not be mixed

    def attempt(self) -> None:
        """Fetch what is missing. Raises UserError for a size other than the expected one."""
        there = self._file.tell() if self._version else 0
        headers = {"Range": f"bytes={there}-", "If-Range": self._version} if there else {}
        with _open(self._url, self._stall, headers) as answer:
            there = there if answer.status == 206 else 0
            self._file.seek(there)
            self._file.truncate()
            self._version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            length = answer.headers.get("Content-Length")
            total = there + int(length) if length else None
            if total is not None:
                if self._size not in (None, total):
                    raise UserError(_other_size(self._url, total, self._size))
                self._reserve(total)
            while chunk := answer.read1(CHUNK):  # a read() that breaks off would lose what has come
                _write(self._file, chunk, self._reserve if total is None else None)
        if total is not None and self._file.tell() != total:
            raise Interrupted(f"the connection ended after {self._file.tell()} of {total} bytes")


def _other_size(url: str, size: int, expected: int | None) -> str:
    return (
        f"{url} has {size} bytes, but {expected} were expected, by its index or from an earlier run; if it has "
        "changed, correct the index, or remove the tar's .json from DATA.CACHE"
    )


def _run(
    command: str | Sequence[str], file: IO[bytes], start: int, stall: float, reserve: Callable[[int], None]
) -> None:
    """Write the output of a command to a file, from byte `start` on. A command that fails or stalls is killed.

    Args:
        command: text is run by the shell.
    """
    file.seek(start)
    file.truncate()
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command,
            shell=isinstance(command, str),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            process_group=0,
            env=None if isinstance(command, str) else remote.environment(),
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
        said = complaints.read().decode("utf-8", "replace")
    if status:
        raise _failure(status, said, by_shell=isinstance(command, str))


def _failure(status: int, said: str, by_shell: bool) -> Exception:
    """What to raise for a command that failed: the last line that it printed, and whether another attempt may help."""
    last = said.strip().splitlines()[-1] if said.strip() else ""
    if status == remote.PERMANENT and not by_shell:
        return UserError(f"{last}; check DATA.ROOT")
    return Interrupted(f"the command ends with status {status}" + (f" ({last})" if last else ""))


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
    """The message for a folder for tars, or a file in it, that cannot be written."""
    return UserError(f"cannot write {place}: {error.strerror}; make room, lower DATA.CACHE_GB, or set DATA.CACHE")
