"""Configuration files: fvcore's CfgNode with `_BASE_` chains, where a wrong key or type is an error.

A value is taken only if the key exists in the defaults and the type fits. Two conveniences over yacs, both
common traps: an integer is accepted for a float, and so is `1e-3`, which YAML 1.1 reads as a string.
"""

import ast
import difflib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from foundation.errors import UserError


def config_folder(command: str) -> Path:
    """The folder with the recipes of a command: `pretrain`, `linear`, `finetune` or `detection`."""
    return Path(str(resources.files("configs"))) / command


def find_config(name: str, command: str) -> Path:
    """The file of a recipe, by path or by bare name, with or without `.yaml`.

    Raises:
        UserError: there is no such file; the nearest names are given.
    """
    folder = config_folder(command)
    candidates = [Path(name), folder / name, folder / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    near = difflib.get_close_matches(Path(name).stem, known, n=3) or known
    raise UserError(f"there is no config {name!r}, neither as a file nor in {folder}; nearest: {', '.join(near)}")


def load_config(defaults: CfgNode, name: str, command: str, overrides: Sequence[str] = ()) -> CfgNode:
    """The defaults, changed by a recipe's file (and its `_BASE_` chain), then by `KEY VALUE` or `KEY=VALUE`.

    Raises:
        UserError: file not found or not YAML, unknown key, wrong type, or a KEY without VALUE.
    """
    config = defaults.clone()
    path = find_config(name, command)
    merge(config, _read(path), source=str(path))
    for key, text in override_pairs(overrides):
        nested: Any = _literal(text)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merge(config, nested, source="the command line")
    return config


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
    """Put `values` into `config`, in place, checking each key and type. `source` is named in errors."""
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


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = CfgNode.load_yaml_with_base(str(path))
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        raise UserError(f"{path}: not valid YAML{f' at line {where.line + 1}' if where else ''}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: its _BASE_ {error.filename} does not exist") from error
    except (OSError, UnicodeDecodeError, AttributeError, TypeError, AssertionError) as error:
        raise UserError(f"{path}: cannot be read as a config (a mapping of keys to values): {error}") from error
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: cannot be read as a config: it is no mapping of keys to values")
    return values


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
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
