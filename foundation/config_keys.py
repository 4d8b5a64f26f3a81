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

    Groups of keys (`c.TRAIN = CfgNode()  # ...`) are included.
    """
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and node.end_lineno in comments:
            for target in node.targets:
                name = _dotted(target)
                if name:
                    found[name] = comments[node.end_lineno]
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
        yield f"{key:<28} {default:<24} {meanings.get(key, '')}".rstrip()


def _dotted(target: ast.expr) -> str:
    """`c.A.B` -> `A.B`; empty for anything that is not a chain of attributes of a name."""
    parts: list[str] = []
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    return ".".join(reversed(parts)) if isinstance(target, ast.Name) else ""
