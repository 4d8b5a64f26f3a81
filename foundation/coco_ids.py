"""Ids of images and categories in COCO's format, which tools also write as text or with a decimal point."""

import re
from typing import Any

INTEGER = re.compile(r"-?[1-9]\d{0,30}|0")


def read_id(value: Any) -> int | str:
    """An id in the form in which ids are compared: 7, 7.0 and "7" are the same, "07" is another.

    Raises:
        ValueError: it is neither a whole number nor text.
    """
    if type(value) is int:
        return value
    if isinstance(value, str) and value.strip():
        return int(value) if INTEGER.fullmatch(value) else value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise ValueError("must be a whole number or text")


def id_order(identity: int | str) -> tuple[bool, int | str]:
    """The key that sorts ids: numbers, also those given as text, before other text."""
    canonical = read_id(identity)
    return isinstance(canonical, str), canonical
