"""Names of runs in tables and legends."""

import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or if that does not tell them apart, the parts in which they differ.

    A link keeps its own name: whoever made it chose it.
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    names = [each[-1] for each in parts]
    if len(set(names)) == len(names):
        return names
    start = _shared(parts)
    end = _shared([each[:start:-1] for each in parts])  # at least one part of each stays
    return ["/".join(each[start : len(each) - end]) for each in parts]


def _shared(sequences: Sequence[Sequence[str]]) -> int:
    """In how many parts, from the first, all agree."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*sequences, strict=False)))
