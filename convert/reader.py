"""Read any checkpoint file into nested plain containers, without running it.

The kind of a file is told from its first bytes, never from its name:

- PyTorch's zip format and its older stream format, safetensors, plain pickles (Detectron2, Caffe2, DeepMind);
- anything else is refused by what it is: an HTML page, an image, an archive, an empty or a sparse file.

Neither PyTorch nor any class of the file is imported; see `convert.pickles`. Tensors are views of the mapped
file, so that reading costs no memory until a tensor is used.
"""

import hashlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from convert.archives import STREAM_MAGIC, read_stream, read_zip
from convert.pickles import ForbiddenGlobal, RestrictedUnpickler
from convert.tensors import StoredTensor
from foundation.errors import UserError

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
    "I64": "int64",
    "BOOL": "bool",
}
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
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


def read_checkpoint(path: Path, trust: bool = False) -> Source:
    """Read a file of any supported kind.

    Args:
        path: the file.
        trust: accept names outside the allow-list, as inert records.

    Raises:
        UserError: the file is missing, not a checkpoint, damaged, or names code that is not on the
            allow-list.
    """
    head = _head(path)
    with reading(path):
        if head.startswith(b"PK\x03\x04"):
            return Source(path, read_zip(path, trust))
        if head.startswith(STREAM_MAGIC):
            return Source(path, read_stream(path, trust))
        if _looks_like_safetensors(head):
            content, metadata = _read_safetensors(path)
            return Source(path, content, metadata)
        _refuse_by_signature(path, head)
        with path.open("rb") as file:
            return Source(path, RestrictedUnpickler(file, trust=trust).load())


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
            "run. If you know where the file comes from, --trust reads such names as empty records"
        ) from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{path} is not a checkpoint that can be read, or it is damaged: {reason}") from error


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
            raise UserError(f"{path} is a folder; name the checkpoint file in it")
        if not path.exists():
            raise UserError(f"{path} does not exist")
        if not path.is_file():
            raise UserError(f"{path} is not a regular file")
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise UserError(f"{path} is empty")
    if not any(head):
        raise UserError(f"{path} begins with zeros only: a sparse file, or a download that did not finish")
    return head


def _refuse_by_signature(path: Path, head: bytes) -> None:
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            raise UserError(f"{path} is {what}")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError(f"{path} is a web page: the download saved a page instead of the file")
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive; unpack it first")
    if text.startswith((b"{", b"[")) and b"\x00" not in head:
        raise UserError(f"{path} is JSON text, not a checkpoint")


def _looks_like_safetensors(head: bytes) -> bool:
    """Eight bytes of header length (the format allows 100 MB), then a JSON object."""
    return len(head) >= 10 and struct.unpack("<Q", head[:8])[0] <= 100_000_000 and head[8:9] == b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, by its own reader."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is not a valid safetensors file: {error}") from error
    tensors = {
        name: StoredTensor(shape, _SAFETENSORS_TYPES.get(kind, kind), _safetensors_reader(path, name, kind))
        for name, (shape, kind) in kinds.items()
    }
    return tensors, metadata


def _safetensors_reader(path: Path, name: str, kind: str) -> Callable[[], np.ndarray]:
    from safetensors import safe_open

    def read() -> np.ndarray:
        if kind != "BF16":
            with safe_open(path, framework="numpy") as file:
                return file.get_tensor(name)
        with safe_open(path, framework="pt") as file:  # numpy knows no bfloat16
            return file.get_tensor(name).float().numpy()

    return read
