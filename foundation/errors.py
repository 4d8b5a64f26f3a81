"""Errors as part of the interface: one line that begins with `error:`, and exit status 2."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from foundation.signals import until_exit

SCRIPT_PREFIX = "corinfomax-"  # of the console scripts in setup.py


class UserError(Exception):
    """An error that the user can correct. The message names the file or key and says what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` and accepts options before, between and after positional arguments.

    The help of an installed console script shows the name that it was called by.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        called = Path(sys.argv[0]).name
        if called.startswith(SCRIPT_PREFIX):
            kwargs["prog"] = called
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse; `KEY VALUE --option KEY VALUE` is the same as `--option KEY VALUE KEY VALUE`."""
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Called by argparse for an invalid command line. Raises UserError."""
        raise UserError(f"{message}; `{self.prog} --help` shows the usage")


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """A part of a command that --resume continues. What `run` prints after Ctrl-C says so.

    Raises:
        KeyboardInterrupt: with that message.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("the same command with --resume continues from what is saved") from error


def run(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Call `main` with the arguments of the command line and exit the process with its status.

    0: success. 2: a `UserError`, printed as one line. 130: interrupted from the keyboard. Any other exception is a
    defect of this project and keeps its traceback. When `main` has ended, signals that ask to stop are ignored.
    Characters that standard output cannot show, such as those of file names that are not UTF-8, are escaped there, as
    Python does on standard error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a caller may have put another one in its place
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with until_exit():
            main(None)
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print("; ".join(["interrupted", *map(str, error.args)]), file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `... | head`: the reader has exited, which is not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
