"""Write files whole or not at all, with the same bytes for the same weights.

Detectron2 reads weights from a real pickle, `{"model": {name: float32 array}, "__author__": ...,
"matching_heuristics": True}`. The pickle is emitted here opcode by opcode: each array goes from the mapped
source straight to the disk, so that no second copy of the weights is held, and the bytes depend neither on
Python's nor on numpy's version. Arrays are named by numpy 1's module, which every numpy since can load.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from foundation.errors import UserError
from foundation.files import sync_folder

_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
_FLOAT32 = (
    b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R"
    b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)


def write_together(
    writers: Mapping[Path, Callable[[BinaryIO], None]],
    check: Callable[[Mapping[Path, Path]], None] | None = None,
) -> None:
    """Fill files beside their places, check them, and only then put them in place.

    Every file is on the disk before the first one takes its name, and a name changes hands in one step:
    whatever happens, a path holds its old content or the new, never a part.

    Args:
        writers: for each path, what fills it; they take their names in this order.
        check: called with {path: where its content lies now} before that; what it raises leaves every path as
            it was.

    Raises:
        UserError: a folder does not exist or cannot be written, or the disk is full.
    """
    # The suffix stays, because Detectron2 goes by it when a check loads the file.
    aside = {path: path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}") for path in writers}
    try:
        for path, write in writers.items():
            if not path.parent.is_dir():
                raise UserError(f"the folder {path.parent} does not exist; make it first")
            with aside[path].open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        if check is not None:
            check(aside)
        for path, content in aside.items():
            os.replace(content, path)
            sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"{error.filename or next(iter(writers))} cannot be written: {error.strerror or error}"
        ) from error
    finally:
        for content in aside.values():
            with suppress(OSError):
                content.unlink()


def write_detectron2(file: BinaryIO, tensors: Mapping[str, np.ndarray], author: str) -> None:
    """The pickle that Detectron2 loads, names in alphabetical order.

    Args:
        file: where to.
        tensors: float32 arrays by Detectron2's short names (`stem.conv1.weight`, `res2.0...`); a callable
            mapping may make them on access, as each is read once.
        author: who made the weights; Detectron2 takes a file without it for one of Caffe2.
    """
    file.write(b"\x80\x03}(" + _text("model") + b"}(")
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name], dtype="<f4")
        file.write(_text(name) + _ARRAY + b"(K\x01")
        file.write(b"(" + b"".join(b"J" + struct.pack("<i", size) for size in array.shape) + b"t" + _FLOAT32)
        file.write(b"\x89B" + struct.pack("<I", array.nbytes))
        file.write(array.data)
        file.write(b"tb")
    file.write(b"u" + _text("__author__") + _text(author) + _text("matching_heuristics") + b"\x88u.")


def write_safetensors(file: BinaryIO, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """A safetensors file with names and metadata in alphabetical order; the library's own writer shuffles the latter.

    Args:
        file: where to.
        tensors: float32 arrays.
        metadata: texts by name.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name in sorted(tensors):
        array = tensors[name]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in sorted(tensors):
        file.write(np.ascontiguousarray(tensors[name], dtype="<f4").data)


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data
