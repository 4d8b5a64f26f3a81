"""Configuration files: fvcore's CfgNode with `_BASE_` chains, where a wrong key or type is an error.

A value is accepted only if its key exists in the defaults and its type matches. Unlike yacs, an integer is accepted
for a float, and so is `1e-3`, which YAML 1.1 reads as a string. Checks of values name the key and what is allowed.

`--keys` prints the keys with default and meaning. The meanings are the comments beside the defaults: the line
`c.TRAIN.LR = 0.2  # learning rate after the warm-up` in a module's source is the key's default and its explanation.
"""

import ast
import difflib
import fnmatch
import io
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import BASE_KEY, CfgNode

from foundation.errors import UserError
from foundation.yaml_files import read_yaml

MAX_FILES = 20  # of a `_BASE_` chain
RUN_CONFIG = "config.yaml"  # of a run folder: every key
RECIPE = "# recipe: "  # its first line, before the name


def config_folder(command: str) -> Path:
    """The folder with the recipes of a command: `pretrain`, `linear`, `finetune`, `sweep` or `detection`."""
    # By this file's own path: an import would find a folder `configs` in the working directory.
    return Path(__file__).resolve().parents[1] / "configs" / command


def find_config(name: str, command: str) -> Path:
    """The file of a recipe, by path or by bare name, with or without `.yaml`.

    Raises:
        UserError: there is no such file; the nearest names are given, or all if none is near.
    """
    folder = config_folder(command)
    candidates = [Path(name), folder / name, folder / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    near = difflib.get_close_matches(Path(name).stem, known, n=3)
    choices = f"nearest: {', '.join(near)}" if near else f"the recipes there are {', '.join(known)}"
    raise UserError(f"there is no config {name!r}, neither as a file nor in {folder}; {choices}")


def recipe_name(config: str) -> str:
    """The name of a recipe, or of the recipe of the run whose `config.yaml` is given."""
    path = Path(config)
    if path.name == RUN_CONFIG and path.is_file():
        with path.open(errors="replace") as file:
            first = file.readline(200)
        if first.startswith(RECIPE):
            return first.removeprefix(RECIPE).strip()
    return path.stem


def load_config(defaults: CfgNode, name: str, command: str, overrides: Sequence[str] = ()) -> CfgNode:
    """The defaults, changed by a recipe's file (and its `_BASE_` chain), then by `KEY VALUE` or `KEY=VALUE`.

    Raises:
        UserError: file not found or not YAML, unknown key, wrong type, or a KEY without VALUE.
    """
    config = defaults.clone()
    for path, values in _read_chain(find_config(name, command)):
        merge(config, values, source=str(path))
    apply_overrides(config, overrides)
    return config


def apply_overrides(config: CfgNode, overrides: Sequence[str]) -> None:
    """Put `KEY VALUE` and `KEY=VALUE` tokens into `config`, in place. Raises UserError as `load_config`."""
    for key, text in override_pairs(overrides):
        nested: Any = _literal(text)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merge(config, nested, source="the command line")


def override_pairs(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Command-line tokens `KEY VALUE` and `KEY=VALUE`, in any mixture, as (key, value) pairs.

    Raises:
        UserError: the last KEY has no value.
    """
    pairs = []
    rest = iter(tokens)
    for token in rest:
        key, separator, value = token.partition("=")
        if not separator:
            following = next(rest, None)
            if following is None:
                raise UserError(f"overrides are KEY VALUE or KEY=VALUE, but {token!r} has no value")
            value = following
        pairs.append((key, value))
    return pairs


def merge(config: CfgNode, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
    """Put `values` into `config`, in place, checking each key and type. Raises UserError that names `source`."""
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in config:
            raise UserError(f"{source}: there is no config key {full!r}{_nearest(config, prefix, str(key))}")
        if isinstance(config[key], CfgNode):
            if not isinstance(value, Mapping):
                raise UserError(f"{source}: {full} is a group of keys, not a value; set {full}.<KEY> instead")
            merge(config[key], value, source, prefix=f"{full}.")
        else:
            config[key] = _fit(config[key], value, full, source)


def keys(config: CfgNode, prefix: str = "") -> Iterator[str]:
    """Every key that holds a value, dotted."""
    for key, value in config.items():
        if isinstance(value, CfgNode):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def value_of(config: CfgNode, key: str) -> Any:
    """The value of a dotted key, such as `TRAIN.LR`. Raises KeyError where there is none."""
    for part in key.split("."):
        config = config[part]
    return config


def _read_chain(path: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """The files of a `_BASE_` chain with their values, the outermost base first.

    fvcore's reader of the same chains has no bounds, and does not say which file holds a wrong key.
    """
    chain: list[tuple[Path, Mapping[str, Any]]] = []
    while True:
        values = read_yaml(path)
        if not isinstance(values, Mapping):
            raise UserError(f"{path} cannot be read as a config: it is not a mapping of keys to values")
        chain.insert(0, (path, {key: value for key, value in values.items() if key != BASE_KEY}))
        if BASE_KEY not in values:
            return chain
        if not isinstance(values[BASE_KEY], str):
            raise UserError(f"{path}: {BASE_KEY} must be the path of one file, not {values[BASE_KEY]!r}")
        base = path.parent / Path(values[BASE_KEY]).expanduser()
        if not base.is_file():
            raise UserError(f"{path}: its {BASE_KEY} {base} does not exist")
        if len(chain) == MAX_FILES or any(base.samefile(file) for file, _ in chain):
            raise UserError(f"{path}: its {BASE_KEY} {base} leads back to itself, or to more than {MAX_FILES} files")
        path = base


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # a plain word, or what is too deep for the parser
        return text


def _nearest(config: CfgNode, prefix: str, key: str) -> str:
    candidates = [f"{prefix}{found}" for found in keys(config)]
    match = difflib.get_close_matches(f"{prefix}{key}", candidates, n=1, cutoff=0.0)
    return f"; did you mean {match[0]!r}?" if match else ""


def _fit(default: Any, value: Any, key: str, source: str) -> Any:
    """`value`, as the type of `default`; lists are checked element by element."""
    if default is None or (type(value) is type(default) and not isinstance(default, (list, tuple))):
        return value
    if isinstance(default, float) and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        kinds = {type(element) for element in default}
        if len(kinds) == 1 and next(iter(kinds)) in (int, float, str):
            value = [_fit(default[0], element, f"{key}[{i}]", source) for i, element in enumerate(value)]
        return type(default)(value)
    raise UserError(
        f"{source}: {key} must be of type {type(default).__name__} like {default!r}, "
        f"not {type(value).__name__} {value!r}"
    )


def one_of(config: CfgNode, key: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError where the value of a key is not among `allowed`."""
    if value_of(config, key) not in allowed:
        raise UserError(f"{key} is {value_of(config, key)!r}, which is not one of {', '.join(allowed)}")


def in_range(config: CfgNode, key: str, low: float, high: float = float("inf")) -> None:
    """Raise UserError where the value of a key is outside [low, high], infinite or NaN."""
    _check_bounds(key, value_of(config, key), low, high)


def each_in_range(config: CfgNode, key: str, length: int, low: float, high: float = float("inf")) -> None:
    """Raise UserError where the value of a key is not a list of `length` numbers in [low, high]."""
    values = value_of(config, key)
    if not isinstance(values, (list, tuple)) or len(values) != length:
        raise UserError(f"{key} must be a list of {length} numbers, not {values!r}")
    for i, value in enumerate(values):
        _check_bounds(f"{key}[{i}]", value, low, high)


def _check_bounds(key: str, value: object, low: float, high: float) -> None:
    # The comparison is written so that NaN fails it.
    if not (isinstance(value, (int, float)) and low <= value <= high and value < float("inf")):
        bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise UserError(f"{key} must be {bounds}, not {value!r}")


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
        value = value_of(defaults, key)
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
