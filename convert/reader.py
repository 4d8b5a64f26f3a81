"""Read any checkpoint file into nested plain containers, without running it. All packages read weights with it.

The kind of a file is recognised by its first bytes, not by its name:

- PyTorch's zip format and its older stream format, safetensors, plain pickles (Detectron2, Caffe2, DeepMind);
- anything else is refused by what it is: an HTML page, an image, an archive, an empty or a sparse file.

Neither PyTorch nor any class of the file is imported; see `convert.pickles`. Tensors are views of the mapped file, so
that reading costs no memory until a tensor is used.
"""

import json
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.archives import STREAM_MAGIC, map_file, read_stream, read_zip
from convert.pickles import Unpickler
from convert.stand_ins import Array, ForbiddenGlobal
from convert.tensors import Storage, StoredTensor, UnreadableTensor, item_size
from foundation.errors import UserError
from foundation.files import sha256_of

if TYPE_CHECKING:
    import torch

_SIGNATURES = (
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"RIFF", "a WebP image or a sound file"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"BZh", "bzip2-compressed; unpack it first"),
    (b"\xfd7zXZ", "xz-compressed; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\x89HDF", "an HDF5 file (Keras); convert it to PyTorch first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
)
_SAFETENSORS_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    **{
        f"{sign}{8 * size}": f"{kind}{8 * size}"
        for sign, kind in (("I", "int"), ("U", "uint"))
        for size in (1, 2, 4, 8)
    },
    "BOOL": "bool",
}
_RUN_FILES = ("encoder.safetensors", "checkpoints/last.pt", "model_final.pth")
_LARGEST_HEADER = 16 << 20  # bytes of a safetensors header: 100,000 tensors
_DEEPEST = 100  # containers within each other
# What readers raise on bytes that are not what they seem.
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    ImportError,
    NotImplementedError,  # zipfile's, for a compression or encryption that it does not know
    OverflowError,
    RecursionError,
    RuntimeError,
    MemoryError,
    struct.error,
)


@dataclass(frozen=True)
class Source:
    """A file that has been read.

    Attributes:
        path: as the user gave it.
        content: nested dicts, lists and `Record`s with `StoredTensor`s as leaves.
        metadata: what safetensors files carry beside tensors.
    """

    path: Path
    content: Any
    metadata: dict[str, str] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """Digest of the whole file."""
        return sha256_of(self.path)


def checkpoint_in(path: Path) -> Path:
    """The file to read: the path itself, or in the folder of a run its encoder, else its last checkpoint.

    Raises:
        UserError: a folder without either.
    """
    if not path.is_dir():
        return path
    found = [path / name for name in _RUN_FILES if (path / name).is_file()]
    if not found:
        raise UserError(f"{path} is a folder, and not that of a run: there is no {' or '.join(_RUN_FILES)} in it")
    return found[0]


def read_checkpoint(path: Path, allow_unknown: bool = False) -> Source:
    """Read a file of any supported kind.

    Args:
        path: the file.
        allow_unknown: accept names outside the allow-list, as inert records.

    Raises:
        UserError: the file is missing, not a checkpoint, damaged, or names code that is not on the
            allow-list.
    """
    head = _head(path)
    with reading(path):
        if head.startswith(b"PK\x03\x04"):
            return Source(path, read_zip(path, allow_unknown))
        if head.startswith(STREAM_MAGIC):
            return Source(path, read_stream(path, allow_unknown))
        if _looks_like_safetensors(head):
            content, metadata = _read_safetensors(path)
            return Source(path, content, metadata)
        _refuse_by_signature(path, head)
        return Source(path, Unpickler(map_file(path).data, allow_unknown=allow_unknown).load())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file causes into an error that names it.

    Raises:
        UserError: instead of any such exception.
    """
    try:
        yield
    except ForbiddenGlobal as error:
        raise UserError(
            f"{path} asks for {error.name}, which is neither a tensor nor a known record; nothing of it was "
            "run. `convert/to_d2.py --allow-unknown` reads such names as empty records"
        ) from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{path} is not a checkpoint that can be read, or it is damaged: {reason}") from error


def load_tree(path: Path) -> Any:
    """The content of a file with PyTorch's tensors in it, as `torch.load(path, weights_only=True)` gives it.

    Containers become dictionaries, lists and tuples, arrays become tensors, and inert records stay what they are. Every
    tensor has memory of its own, even where the file shares it.

    Raises:
        UserError: as `read_checkpoint`; or tensors that cannot be read.
    """
    source = read_checkpoint(path)
    with reading(path):
        return _Copy(to_torch, _most(path)).of(source.content)


def load_arrays(path: Path) -> Any:
    """The content of a file with numpy's arrays in it, as `pickle.load` gives it; see `load_tree`."""
    source = read_checkpoint(path)
    with reading(path):
        return _Copy(to_array, _most(path)).of(source.content)


def load_tensors(source: Source, table: Any) -> "dict[str, torch.Tensor]":
    """The tensors in one dictionary of a file, by name, in PyTorch's memory; its other values are left out.

    Raises:
        UserError: it is no dictionary, or tensors cannot be read.
    """
    if not isinstance(table, dict):
        raise UserError(f"{source.path} holds no table of tensors; make one with convert/to_d2.py")
    copy = _Copy(to_torch, _most(source.path))
    with reading(source.path):
        return {str(name): copy.of(value) for name, value in table.items() if leaf(value) is not None}


def leaf(value: Any) -> StoredTensor | None:
    """The tensor that a value is, if it is one."""
    if isinstance(value, Array):
        return value.tensor
    return value if isinstance(value, StoredTensor) else None


def to_torch(tensor: StoredTensor) -> "torch.Tensor":
    """A tensor in PyTorch's memory, of its own type and memory format (channels last, say)."""
    import torch

    made = torch.from_numpy(to_array(tensor))
    return made.to(torch.bfloat16) if tensor.dtype == "bfloat16" else made


def to_array(tensor: StoredTensor) -> np.ndarray:
    """A tensor's values in memory of their own, in this machine's byte order; bfloat16 becomes float32."""
    array = np.asarray(tensor.read())
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="K")


def _most(path: Path) -> int:
    """Bytes that a file's tensors may take in memory: they may share their data, be half as wide, or compressed."""
    return 8 * path.stat().st_size + (1 << 20)


class _Copy:
    """Copies a tree; a part that is in several places is copied once.

    Args:
        make: what a tensor becomes.
        most: bytes that its tensors may take.
    """

    def __init__(self, make: Callable[[StoredTensor], Any], most: int) -> None:
        self._make = make
        self._left = most
        self._done: dict[int, Any] = {}

    def of(self, value: Any, depth: int = 0) -> Any:
        """The copy of a value."""
        if depth > _DEEPEST:
            raise UnreadableTensor("its containers are nested too deeply")
        if not isinstance(value, (dict, list, tuple, StoredTensor, Array)):
            return value
        if id(value) in self._done:
            return self._done[id(value)]
        made: Any = value
        if isinstance(value, dict):
            made = self._done[id(value)] = {}
            made.update({key: self.of(child, depth + 1) for key, child in value.items()})
        elif isinstance(value, list):
            made = self._done[id(value)] = []
            made.extend(self.of(child, depth + 1) for child in value)
        elif isinstance(value, tuple):
            made = tuple(self.of(child, depth + 1) for child in value)
        elif (tensor := leaf(value)) is not None:
            self._left -= 4 * tensor.count
            if self._left < 0:
                raise UnreadableTensor("its tensors share their data more often than those of a network do")
            made = self._make(tensor)
        self._done[id(value)] = made
        return made


def read_values(source: Source, tensor: StoredTensor) -> np.ndarray:
    """The values of a tensor of a file.

    Raises:
        UserError: they cannot be read, or do not match their checksum.
    """
    with reading(source.path):
        return np.asarray(tensor.read())


def _head(path: Path) -> bytes:
    """The first bytes, once it is clear that this is a file that can be read."""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name the checkpoint in it")
        if not path.exists():
            raise UserError(f"{path} does not exist; check the path")
        if not path.is_file():
            raise UserError(f"{path} is not a regular file")
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise UserError(f"{path} is empty; fetch or copy it again")
    if not any(head):
        raise UserError(f"{path} begins with zeros only: a sparse file, or an unfinished download; fetch it again")
    return head


def _refuse_by_signature(path: Path, head: bytes) -> None:
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            raise UserError(f"{path} is {what}")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError(f"{path} is a web page: the download saved a page instead of the file; fetch the file itself")
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive; unpack it first")
    if text.startswith((b"{", b"[")) and b"\x00" not in head:
        raise UserError(f"{path} is JSON text, not a checkpoint")


def _looks_like_safetensors(head: bytes) -> bool:
    """Eight bytes of header length (the format allows 100 MB), then a JSON object."""
    return len(head) >= 10 and struct.unpack("<Q", head[:8])[0] <= 100_000_000 and head[8:9] == b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, once its own library has found it valid."""
    from safetensors import SafetensorError, safe_open

    mapped = map_file(path)
    start = 8 + struct.unpack("<Q", mapped[:8].tobytes())[0]
    if start > _LARGEST_HEADER:
        raise UserError(f"{path} has a header of {start} bytes, which no file of weights needs")
    try:
        with safe_open(path, framework="numpy"):
            header = json.loads(mapped[8:start].tobytes())
    except SafetensorError as error:
        raise UserError(f"{path} is not a valid safetensors file: {str(error)[:300]}") from error
    metadata = header.pop("__metadata__", {})
    return {name: _safetensor(mapped[start:], entry) for name, entry in header.items()}, metadata


def _safetensor(data: np.ndarray, entry: dict[str, Any]) -> StoredTensor:
    kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in _SAFETENSORS_TYPES:
        return StoredTensor(tuple(shape), kind, _unreadable(f"numbers of type {kind} cannot be converted"))
    dtype = _SAFETENSORS_TYPES[kind]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return Storage(dtype, (end - begin) // item_size(dtype), lambda: data[begin:end]).tensor(0, shape, strides)


def _unreadable(reason: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        raise UnreadableTensor(reason)

    return read
