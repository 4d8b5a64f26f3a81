"""YAML files of any origin, read with bounds on size and depth: a damaged file is an error that names it."""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from foundation.errors import UserError

MAX_BYTES = 256 * 1024  # the configuration of a run has some 10 KB
MAX_VALUES = 100_000  # with every alias written out: anchors within anchors grow exponentially
MAX_DEPTH = 50
# libyaml's is seven times faster; both build plain containers, strings, numbers and dates only.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file: plain containers, strings, numbers and dates. No tag of a file is executed.

    Raises:
        UserError: the file is missing, unreadable, not a regular file, larger than `MAX_BYTES`, not YAML, or holds more
            than `MAX_VALUES` values or more than `MAX_DEPTH` levels. The message begins with the path.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block
            raise UserError(f"{path} is not a file")
        if status.st_size > MAX_BYTES:
            raise UserError(f"{path} is too large: {status.st_size:,} bytes, where {MAX_BYTES:,} are allowed")
        text = path.read_text(encoding="utf-8-sig")
        _check_depth(path, text)
        content = yaml.load(text, LOADER)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path} is not valid YAML{f' at line {mark.line + 1}' if mark else ''}") from error
    except ValueError as error:  # a wrong encoding, the 99th of a month, an integer of 6,000 digits
        raise UserError(f"{path} is not valid YAML: {error}") from error
    _check_bounds(path, content)
    return content


def _check_depth(path: Path, text: str) -> None:
    """Before containers are built: building deep ones takes seconds, or crashes libyaml."""
    depth = 0
    for event in yaml.parse(text, LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UserError(f"{path} is not usable YAML: it is nested more than {MAX_DEPTH} deep")


def _check_bounds(path: Path, content: Any) -> None:
    """Count values and levels, where an alias counts as often as it is used."""
    count, level = 0, [content]
    for _ in range(MAX_DEPTH):
        following: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                following += value.values()
            elif isinstance(value, list | tuple | set):
                following += value
            if count + len(following) > MAX_VALUES:
                raise UserError(f"{path} is not usable YAML: it holds more than {MAX_VALUES:,} values")
        count += len(following)
        if not following:
            return
        level = following
    raise UserError(f"{path} is not usable YAML: it is nested more than {MAX_DEPTH} deep")
