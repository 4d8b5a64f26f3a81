"""Write files completely or not at all, with the same bytes for the same weights.

Detectron2 reads weights from a real pickle, `{"model": {name: float32 array}, "__author__": ...,
"matching_heuristics": True}`. The pickle is written opcode by opcode: each array goes from the mapped
source to the disk, so that the weights are never held twice, and the bytes depend neither on Python's nor on numpy's
version. Arrays are named by the module of numpy 1, which every later numpy can load.
"""

import fcntl
import glob
import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from foundation.errors import UserError
from foundation.files import FULL_DISK, free_space, sync_folder

_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
_FLOAT32 = (
    b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R"
    b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)


class Digesting:
    """A file that takes the digest of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        """Write, and account for it."""
        self._hash.update(data)
        self._file.write(data)

    def digest(self) -> str:
        """SHA-256 of everything written so far."""
        return self._hash.hexdigest()


def write_together(
    writers: Mapping[Path, Callable[[Digesting], None]],
    check: Callable[[Mapping[Path, Path]], None] | None = None,
) -> None:
    """Fill files under temporary names, check them, and only then rename them.

    Every file is on the disk before the first one takes its name, and a name changes hands in one step: whatever
    happens, a path holds its old content or the new, never a part. Temporary files that a killed process has left for
    the same paths are removed.

    Args:
        writers: for each path, what fills it. They are called in this order; names are taken in the reverse order.
        check: called with {path: where its content lies now} before the renaming; what it raises leaves every path as
            it was.

    Raises:
        UserError: a folder does not exist or cannot be written, or the disk is full.
    """
    drafts = {path: _draft(path, str(os.getpid())) for path in writers}
    try:
        # Within `try`: closing a file writes what its buffer still holds, and on a full disk fails once more.
        with ExitStack() as stack:
            for path, write in writers.items():
                if not path.parent.is_dir():
                    raise UserError(f"the folder {path.parent} does not exist; create it first")
                _remove_abandoned(path)
                stack.callback(_remove, drafts[path])
                file = stack.enter_context(drafts[path].open("wb"))
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                write(Digesting(file))
                file.flush()
                os.fsync(file.fileno())
            if check is not None:
                check(drafts)
            for path in reversed(drafts):
                os.replace(drafts[path], path)
                sync_folder(path.parent)
    except OSError as error:
        name = error.filename or next(iter(writers))
        room = f" ({free_space(Path(name).parent)})" if error.errno in FULL_DISK else ""
        raise UserError(f"{name} cannot be written: {error.strerror or error}{room}") from error


def _draft(path: Path, process: str) -> Path:
    """The temporary name of a path; the suffix stays, because Detectron2 goes by it when a check loads the file."""
    return path.with_name(f".{path.stem}.{process}.partial{path.suffix}")


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files that nobody holds any more."""
    name = _draft(Path(glob.escape(path.name)), "*").name
    for draft in path.parent.glob(name):
        with suppress(OSError), draft.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.unlink()


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def write_detectron2(file: Digesting, tensors: Mapping[str, np.ndarray], author: str) -> None:
    """The pickle that Detectron2 loads, names in alphabetical order.

    Args:
        file: the output.
        tensors: float32 arrays by Detectron2's short names (`stem.conv1.weight`, `res2.0...`). Each is read once, so
            that a mapping may make them on access.
        author: of the weights; Detectron2 takes a file without an author for one of Caffe2.
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


def write_safetensors(file: Digesting, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """A safetensors file with names and metadata in alphabetical order; the library's own writer shuffles the latter.

    Args:
        file: the output.
        tensors: float32 arrays.
        metadata: strings by name.
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
