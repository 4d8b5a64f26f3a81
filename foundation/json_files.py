"""JSON files of any origin, read with bounds on size and depth: a damaged file is an error that names it."""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from foundation.errors import UserError
from foundation.files import check_size

MAX_BYTES = 64 * 1024**2  # of a file that is read at once, unless the caller allows more
MAX_LINES_BYTES = 1024**3  # of a file that is read line by line
MAX_LINE_BYTES = 1024**2
MAX_DEPTH = 100  # of arrays and objects within one another; readers may recurse over what they get

ObjectHook = Callable[[dict[str, Any]], Any]

logger = logging.getLogger(__name__)

# For `bytes.translate`: an opening bracket becomes +1, a closing bracket -1 (as signed bytes), the rest is deleted.
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z)', re.DOTALL)


def read_json(path: Path, max_bytes: int = MAX_BYTES, object_hook: ObjectHook | None = None) -> Any:
    """The content of a JSON file; a byte order mark is accepted.

    `object_hook` may replace each object as soon as it is parsed, which saves memory in files of gigabytes.

    Raises:
        UserError: the file is missing, unreadable, not a regular file, larger than `max_bytes`, not JSON, or nested
            more than `MAX_DEPTH` deep. The message begins with the path.
    """
    try:
        check_size(path, max_bytes)
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    _check_depth(data, str(path))
    try:
        text = data.decode(json.detect_encoding(data))
    except ValueError as error:
        raise UserError(f"{path} is damaged: not valid JSON ({error})") from error
    del data
    return _parse(text, str(path), object_hook)


def parse_json(data: bytes, name: str) -> Any:
    """The value that JSON text holds. `name` begins the message of an error.

    Raises:
        UserError: the text is not JSON, or nested more than `MAX_DEPTH` deep.
    """
    _check_depth(data, name)
    return _parse(data, name)


def _check_depth(data: bytes, name: str) -> None:
    # Brackets within strings count only if there are enough of them to matter, because removing strings takes longer.
    if _depth(data) > MAX_DEPTH and _depth(_STRING.sub(b"", data)) > MAX_DEPTH:
        raise UserError(f"{name} is not usable JSON: it is nested more than {MAX_DEPTH} deep")


def _parse(text: str | bytes, name: str, object_hook: ObjectHook | None = None) -> Any:
    try:
        return json.loads(text, object_hook=object_hook)
    except (ValueError, RecursionError) as error:  # a wrong encoding and integers of 5,000 digits are ValueErrors too
        raise UserError(f"{name} is damaged: not valid JSON ({error})") from error


def read_json_lines(path: Path, max_bytes: int = MAX_LINES_BYTES) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line, such as metrics.json.

    Lines that hold anything else are skipped, and one warning tells how many. A last line without its end, which a
    killed process leaves, is skipped silently unless it is complete.

    Raises:
        UserError: the file is missing, unreadable, not a regular file, or larger than `max_bytes`.
    """
    records, skipped = [], []
    for number, line in enumerate(_lines(path, max_bytes), start=1):
        try:
            value = parse_json(line, str(path)) if len(line) <= MAX_LINE_BYTES else None
        except UserError:
            value = None
        if isinstance(value, dict):
            records.append(value)
        elif line.strip() and line.endswith(b"\n"):
            skipped.append(number)
    if skipped:
        count = f"line {skipped[0]}" if len(skipped) == 1 else f"{len(skipped)} lines, the first of them {skipped[0]}"
        logger.warning("%s: skipped %s, because a line must be one JSON object", path, count)
    return records


def as_number(value: object) -> float | None:
    """A finite number as float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer that no float can hold
        return None


def as_integer(value: object) -> int | None:
    """A whole number; None for anything else, also for true and false."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _lines(path: Path, max_bytes: int) -> Iterator[bytes]:
    """The lines of a file, without a byte order mark. A line longer than `MAX_LINE_BYTES` is cut behind its bound."""
    try:
        check_size(path, max_bytes)
        with path.open("rb") as file:
            if file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            while line := file.readline(MAX_LINE_BYTES + 1):
                while not line.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
                    line = line[: MAX_LINE_BYTES + 1] + rest[-1:]
                yield line
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _depth(data: bytes) -> int:
    return max(accumulate(memoryview(data.translate(_STEPS, _NO_BRACKETS)).cast("b")), default=0)
