"""`--keys`: the keys of a configuration with default and meaning. The meanings are the comments beside the defaults.

One source for the command and the documents: the line `c.TRAIN.LR = 0.2  # learning rate after the warm-up` in a
module's source is the key's default and its explanation.
"""

import ast
import fnmatch
import io
import tokenize
from collections.abc import Iterator

from fvcore.common.config import CfgNode

from foundation.config import keys
from foundation.errors import UserError


def key_meanings(source: str) -> dict[str, str]:
    """Dotted key -> comment, for each assignment `name.KEY.KEY = value  # comment` of a module's source.

    An assignment without a comment on its line has the comment lines above it, or above the assignments before it that
    follow these lines directly. Groups of keys (`c.TRAIN = CfgNode()  # ...`) are included.
    """
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    lines = source.splitlines()
    assigned = {
        node.end_lineno or 0: node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and any(_dotted(target) for target in node.targets)
    }
    found = {}
    for last, node in assigned.items():
        meaning = comments.get(last) or _above(node.lineno, lines, comments, assigned)
        found.update({name: meaning for target in node.targets if meaning and (name := _dotted(target))})
    return found


def describe_keys(defaults: CfgNode, source: str, pattern: str = "*") -> Iterator[str]:
    """A line for each key that matches `pattern` (`*` and `?`, capitals or not): key, default, meaning.

    Raises:
        UserError: no key matches.
    """
    meanings = key_meanings(source)
    chosen = [key for key in keys(defaults) if fnmatch.fnmatchcase(key.upper(), pattern.upper())]
    if not chosen:
        raise UserError(f"no config key matches {pattern!r}; try '*{pattern.strip('*')}*', or --keys for all of them")
    for key in chosen:
        value = defaults
        for part in key.split("."):
            value = value[part]
        default = repr(value) if isinstance(value, str) else str(value)
        yield f"{key:<28} {default:<24} {meaning_of(key, meanings)}".rstrip()


def meaning_of(key: str, meanings: dict[str, str]) -> str:
    """The meaning of a key, or of the group that it is in; empty where neither has one."""
    return meanings.get(key) or meanings.get(key.rpartition(".")[0], "")


def _above(line: int, lines: list[str], comments: dict[int, str], assigned: dict[int, ast.Assign]) -> str:
    """The block of comment lines that an assignment at `line` belongs to; empty where there is none."""
    above = line - 1
    while above in assigned and above not in comments:
        above = assigned[above].lineno - 1
    block: list[str] = []
    while above in comments and lines[above - 1].lstrip().startswith("#"):
        block.insert(0, comments[above])
        above -= 1
    return " ".join(block)


def _dotted(target: ast.expr) -> str:
    """`c.A.B` -> `A.B`; empty for anything that is not a chain of attributes of a name."""
    parts: list[str] = []
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    return ".".join(reversed(parts)) if isinstance(target, ast.Name) else ""
