"""Names of runs in tables and legends, and counts of things in messages."""

import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path


def counted(count: float, noun: str) -> str:
    """A number with its noun: `1 image`, `2,500 images`, `1.5 hours`, `3 processes`."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    ending = "" if count == 1 else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{number} {noun}{ending}"


def legible(name: str) -> str:
    """A file's name as text that every file takes: bytes that are not UTF-8 are escaped, as on standard error."""
    return name.encode("utf-8", "backslashreplace").decode()


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path or, if that is not unique, the parts in which the paths differ.

    A symbolic link keeps its own name instead of the name of what it points to.
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    names = [each[-1] for each in parts]
    if len(set(names)) == len(names):
        return names
    start = _common_prefix(parts)
    end = _common_prefix([each[:start:-1] for each in parts])  # at least one part of each is kept
    return ["/".join(each[start : len(each) - end]) for each in parts]


def _common_prefix(sequences: Sequence[Sequence[str]]) -> int:
    """The length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*sequences, strict=False)))
