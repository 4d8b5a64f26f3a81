"""Checks on configuration values. Each raises UserError that names the key and the allowed values."""

from fvcore.common.config import CfgNode

from foundation.config import value_of
from foundation.errors import UserError


def one_of(config: CfgNode, key: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among `allowed`."""
    if value_of(config, key) not in allowed:
        raise UserError(f"{key} is {value_of(config, key)!r}, which is not one of {', '.join(allowed)}")


def in_range(config: CfgNode, key: str, low: float, high: float = float("inf")) -> None:
    """Refuse a number outside [low, high], infinity and NaN."""
    _check_bounds(key, value_of(config, key), low, high)


def each_in_range(config: CfgNode, key: str, length: int, low: float, high: float = float("inf")) -> None:
    """Refuse anything but a list of `length` numbers in [low, high]."""
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
