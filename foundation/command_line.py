"""Command-line options that several commands have. Imports no large library, so that `--help` answers at once."""

import argparse
import importlib
import inspect
import os
import re
from collections.abc import Sequence
from typing import Any

CONFIG_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Za-z0-9_]+)*(=.*)?", re.DOTALL)


def add_run_options(parser: argparse.ArgumentParser, default: str, paths: bool = False) -> None:
    """The options of every command that works in a run directory.

    Args:
        parser: to which they are added; the positional arguments are its `overrides`.
        default: where the run directory is.
        paths: whether positional arguments may also be paths, for `split_paths`.
    """
    usual = f"{default} by default, or that of the run whose config.yaml is given"
    parser.add_argument("--output", default="", help=f"the run directory; {usual}")
    parser.add_argument("--resume", action="store_true", help="continue from the run directory's last checkpoint")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="PATH | KEY VALUE" if paths else "KEY VALUE",
        help=("folders of images or tars, and " if paths else "") + "config keys to change; KEY=VALUE works too",
    )


def add_keys_option(parser: argparse.ArgumentParser, defaults: str) -> None:
    """Add `--keys [GLOB]`, which prints the config keys with default and meaning, and ends as `--help` does.

    Args:
        parser: to which it is added.
        defaults: `module:function` that gives the defaults; the module's comments are the meanings.
    """
    text = "print the config keys (that match GLOB) with default and meaning, and stop"
    parser.add_argument("--keys", action=_PrintKeys, nargs="?", const="*", metavar="GLOB", help=text, defaults=defaults)


class _PrintKeys(argparse.Action):
    """See `add_keys_option`."""

    def __init__(self, *args: Any, defaults: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.defaults = defaults

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        """Called by argparse."""
        from foundation.config import describe_keys

        name, function = self.defaults.split(":")
        module = importlib.import_module(name)
        print("\n".join(describe_keys(getattr(module, function)(), inspect.getsource(module), values)))
        parser.exit()


def split_paths(tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """Positional arguments that may be paths and config overrides in any order, as (paths, overrides).

    A token in capitals (`TRAIN.LR`, `SEED`) is a config key, and the token after it is its value unless the first has
    the form `KEY=VALUE`; everything else is a path, and so is a folder `PHOTOS` or a file `PHOTOS.tar` that exists.
    """
    paths: list[str] = []
    overrides: list[str] = []
    rest = iter(tokens)
    for token in rest:
        if not CONFIG_KEY.fullmatch(token) or os.path.exists(token):
            paths.append(token)
            continue
        overrides.append(token)
        if "=" not in token:
            overrides.extend(value for value in [next(rest, None)] if value is not None)
    return paths, overrides
