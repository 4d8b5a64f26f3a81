"""Object stores (s3, gs), read with fsspec by a process of their own.

fsspec's file systems run a thread, which must not live in a process that loader workers are forked from. So this module
is also a program, whose output is what was asked for:

    python -P -m pretrain.images.remote sizes             of the URLs on standard input, in bytes, one a line
    python -P -m pretrain.images.remote read URL OFFSET   the content from a byte on
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from foundation.errors import UserError

LIBRARIES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
PERMANENT = 3  # exit status: another attempt would not help
CHUNK = 1 << 20  # bytes


def check_installed(url: str) -> None:
    """Raises UserError where the library for a URL's scheme is not installed."""
    scheme = url.partition("://")[0]
    library = LIBRARIES.get(scheme)
    if library and not (importlib.util.find_spec("fsspec") and importlib.util.find_spec(library)):
        raise UserError(f"{url} needs {library}: pip install 'corinfomax[remote]', or fetch it with a command (pipe:)")


def sizes_command() -> Sequence[str]:
    """The command that prints the sizes of the objects whose URLs it reads."""
    return [sys.executable, "-P", "-m", "pretrain.images.remote", "sizes"]


def read_command(url: str, offset: int) -> Sequence[str]:
    """The command that writes the content of an object, from a byte on."""
    return [sys.executable, "-P", "-m", "pretrain.images.remote", "read", url, str(offset)]


def environment() -> dict[str, str]:
    """Environment variables for a child process of this project, which finds the package from any working directory."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def main(argv: Sequence[str]) -> None:
    """Print sizes, or write a content."""
    try:
        if argv[0] == "sizes":
            _print_sizes(sys.stdin.read().split())
        else:
            _write_content(argv[1], int(argv[2]))
    except (FileNotFoundError, PermissionError) as error:
        print(f"{' '.join(argv[1:2])} cannot be fetched: {error or type(error).__name__}".strip(), file=sys.stderr)
        sys.exit(PERMANENT)
    except Exception as error:  # each library has its own
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def _print_sizes(urls: Sequence[str]) -> None:
    """One scheme after the other; the requests of a scheme run concurrently."""
    import fsspec

    found: dict[str, int | None] = {}
    for scheme in {url.partition("://")[0] for url in urls}:
        own = [url for url in urls if url.partition("://")[0] == scheme]
        files, _ = fsspec.core.url_to_fs(own[0])
        paths = [files._strip_protocol(url) for url in own]
        try:
            found |= zip(own, files.sizes(paths), strict=True)
        except FileNotFoundError as error:
            absent = next((url for url, path in zip(own, paths, strict=True) if not files.exists(path)), own[0])
            raise FileNotFoundError(f"{absent} does not exist") from error
    for url in urls:
        print("" if found[url] is None else found[url])


def _write_content(url: str, offset: int) -> None:
    import fsspec

    files, path = fsspec.core.url_to_fs(url)
    with files.open(path, "rb", cache_type="readahead", block_size=8 * CHUNK) as file:
        file.seek(offset)
        while chunk := file.read(CHUNK):
            sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
