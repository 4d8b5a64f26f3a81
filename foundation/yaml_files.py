"""YAML files of any origin, read with bounds on size and depth: a damaged file is an error that names it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from foundation.errors import UserError
from foundation.files import check_size

MAX_BYTES = 256 * 1024  # the configuration of a run has some 10 KB
MAX_VALUES = 100_000  # with every alias written out: anchors within anchors grow exponentially
MAX_DEPTH = 50
# libyaml's is seven times faster; both build plain containers, strings, numbers and dates only.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Python has these for bytes of a file's name that are not UTF-8. PyYAML writes them escaped, which libyaml refuses.
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file: plain containers, strings, numbers and dates. No tag of a file is executed.

    Raises:
        UserError: the file is missing, unreadable, not a regular file, larger than `MAX_BYTES`, not YAML, or holds more
            than `MAX_VALUES` values or more than `MAX_DEPTH` levels. The message begins with the path.
    """
    try:
        check_size(path, MAX_BYTES)
        text = path.read_text(encoding="utf-8-sig")
        loader = yaml.SafeLoader if SURROGATE.search(text) else LOADER
        _check_events(path, text, loader)
        content = yaml.load(text, loader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path} is not valid YAML{f' at line {mark.line + 1}' if mark else ''}") from error
    except ValueError as error:  # a wrong encoding, the 99th of a month, an integer of 6,000 digits
        raise UserError(f"{path} is not valid YAML: {error}") from error
    _check_bounds(path, content)
    return content


def _check_events(path: Path, text: str, loader: Any) -> None:
    """Before containers are built: building deep ones takes seconds, or crashes libyaml, and merge keys (`<<`) copy
    what their aliases name. Nodes are counted as if every alias was written out.
    """
    counts: dict[str | None, int] = {}  # nodes below an anchor
    opened: list[tuple[str | None, int]] = []  # anchors of the collections around, and the count where they begin
    count = 0
    for event in yaml.parse(text, loader):
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, count))
        if isinstance(event, yaml.AliasEvent):
            count += counts.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, begin = opened.pop()
            if anchor:
                counts[anchor] = count - begin
        if len(opened) > MAX_DEPTH:
            raise UserError(f"{path} is not usable YAML: it is nested more than {MAX_DEPTH} deep")
        if count > 2 * MAX_VALUES:  # a key and its value are two
            raise UserError(f"{path} is not usable YAML: it holds more than {MAX_VALUES:,} values")


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
