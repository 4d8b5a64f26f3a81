"""Errors as part of the interface: one line that begins with `error:`, and exit status 2."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class UserError(Exception):
    """Something that the user can mend. The message names the file or key, and says what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are `UserError`s, and where options may stand before, between or after the rest."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse; `KEY VALUE --option KEY VALUE` is as good as `--option KEY VALUE KEY VALUE`."""
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Called by argparse for a command line that it cannot take."""
        raise UserError(f"{message}; `{self.prog} --help` shows the usage")


def run(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Call `main` with the command line's arguments and leave the process with its exit status.

    0: done. 2: a `UserError`, printed as one line. 130: interrupted from the keyboard. Anything else is a
    defect of this project, and keeps its traceback.
    """
    try:
        main(None)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `... | head`: the reader has gone, and that is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
