"""Read any checkpoint file into nested plain containers, without running it.

The kind of a file is told from its first bytes, never from its name:

- PyTorch's zip format and its older stream format, safetensors, plain pickles (Detectron2, Caffe2, DeepMind);
- anything else is refused by what it is: an HTML page, an image, an archive, an empty or a sparse file.

Neither PyTorch nor any class of the file is imported; see `convert.pickles`. Tensors are views of the mapped file, so
that reading costs no memory until a tensor is used.
"""

import hashlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cli.errors import UserError
from convert.pickles import (
    ForbiddenGlobal,
    RestrictedUnpickler,
    Storage,
    StorageType,
    UnreadableTensor,
    item_size,
)
from convert.tensors import StoredTensor

_STREAM_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # PyTorch before 1.6: a pickled magic number
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
    NotImplementedError,
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
        UserError: the file is missing, not a checkpoint, damaged, or names code that is not on the allow-list.
    """
    head = _head(path)
    try:
        if head.startswith(b"PK\x03\x04"):
            return Source(path, _read_zip(path, trust))
        if head.startswith(_STREAM_MAGIC):
            return Source(path, _read_stream(path, trust))
        if _looks_like_safetensors(head, path.stat().st_size):
            content, metadata = _read_safetensors(path)
            return Source(path, content, metadata)
        _refuse_by_signature(path, head)
        with path.open("rb") as file:
            return Source(path, RestrictedUnpickler(file, trust=trust).load())
    except ForbiddenGlobal as error:
        raise UserError(
            f"{path} asks for {error.name}, which is neither a tensor nor a known record; nothing of it was run. "
            "If you know where the file comes from, --trust reads such names as empty records"
        ) from error
    except UnreadableTensor as error:
        raise UserError(f"{path} is damaged or unsupported: {error}") from error
    except _DAMAGE as error:
        raise UserError(
            f"{path} is not a checkpoint that can be read, or it is damaged: {_reason(error)}"
        ) from error


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


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


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


def _looks_like_safetensors(head: bytes, size: int) -> bool:
    """Eight bytes of header length, then a JSON object."""
    if len(head) < 10:
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return head[8:9] == b"{" and 2 <= length <= min(size, 100 << 20)


def _storage_of(pid: Any, make: Callable[[str, str, int], Storage]) -> Storage:
    """The storage that a persistent id (`"storage"`, type, key, location, count, view) names."""
    if (
        not isinstance(pid, tuple)
        or len(pid) < 5
        or pid[0] != "storage"
        or not isinstance(pid[1], StorageType)
    ):
        raise UnreadableTensor("it refers to tensor data in an unknown way")
    count = pid[4]
    if not isinstance(count, int) or count < 0:
        raise UnreadableTensor(f"a storage of {count} elements")
    return make(str(pid[2]), pid[1].dtype, count)


def _read_zip(path: Path, trust: bool) -> Any:
    """PyTorch's format since 1.6: a zip archive with `NAME/data.pkl` and one record a storage, not compressed."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        roots = sorted(name[: -len("data.pkl")] for name in names if name.endswith("/data.pkl"))
        if any(name.startswith(f"{root}code/") for root in roots for name in names) or any(
            f"{root}constants.pkl" in names for root in roots
        ):
            raise UserError(
                f"{path} is a TorchScript archive, which holds a program; save its state_dict() instead"
            )
        if len(roots) != 1:
            raise UserError(
                f"{path} is a zip archive, but not one that PyTorch wrote; unpack it and name the file inside"
            )
        root = roots[0]
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"{path} was written on a big-endian machine, which is not supported")
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        storages: dict[str, Storage] = {}

        def make(key: str, dtype: str, count: int) -> Storage:
            if key not in storages:
                storages[key] = Storage(dtype, count)
                storages[key].locate = _zip_record(path, archive.getinfo(f"{root}data/{key}"), mapped)
            # Parameters may share a storage; a later mention may call it by another element type.
            shared = storages[key]
            if shared.dtype != dtype:
                shared = Storage(dtype, count)
                shared.locate = storages[key].locate
            return shared

        with archive.open(f"{root}data.pkl") as file:
            unpickler = RestrictedUnpickler(file, lambda pid: _storage_of(pid, make), trust)  # type: ignore[arg-type]
            return unpickler.load()


def _zip_record(path: Path, info: zipfile.ZipInfo, mapped: np.ndarray) -> Callable[[], np.ndarray]:
    """A function that gives a record's bytes, checked against its checksum the first time."""
    checked = False

    def locate() -> np.ndarray:
        nonlocal checked
        if info.compress_type != zipfile.ZIP_STORED:
            with zipfile.ZipFile(path) as archive:
                return np.frombuffer(archive.read(info), np.uint8)
        header = bytes(mapped[info.header_offset : info.header_offset + 30])
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = info.header_offset + 30 + name_length + extra_length
        data = mapped[start : start + info.file_size]
        if not checked and zlib.crc32(data) != info.CRC:
            raise UserError(f"{path} is damaged: the checksum of its record {info.filename} does not match")
        checked = True
        return data

    return locate


def _read_stream(path: Path, trust: bool) -> Any:
    """PyTorch's format before 1.6: pickles (magic, version, system, object, keys), then the storages one by one."""
    storages: dict[str, Storage] = {}
    views: list[tuple[Storage, str, int]] = []

    def make(key: str, dtype: str, count: int) -> Storage:
        return storages.setdefault(key, Storage(dtype, count))

    def storage(pid: Any) -> Storage:
        whole = _storage_of(pid, make)
        if len(pid) < 6 or pid[5] is None:
            return whole
        _, offset, count = pid[5]  # a storage that is a part of another one
        part = Storage(whole.dtype, count)
        views.append((part, str(pid[2]), offset))
        return part

    with path.open("rb") as file:
        for _ in range(3):
            RestrictedUnpickler(file, trust=trust).load()
        content = RestrictedUnpickler(file, storage, trust).load()
        keys = RestrictedUnpickler(file, trust=trust).load()
        start = file.tell()
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    starts = {}
    for key in map(str, keys):
        starts[key] = start + 8  # a storage is preceded by its number of elements, as int64
        size = storages[key].size
        if start + 8 + size > mapped.size:
            raise UnreadableTensor("the file ends before its last tensor")
        storages[key].locate = _slice(mapped, start + 8, size)
        start += 8 + size
    for part, key, offset in views:
        part.locate = _slice(mapped, starts[key] + offset * item_size(part.dtype), part.size)
    return content


def _slice(data: np.ndarray, start: int, size: int) -> Callable[[], np.ndarray]:
    return lambda: data[start : start + size]


def _read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, by its own reader."""
    from safetensors import SafetensorError, safe_open

    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118: it is not a mapping
            kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise UserError(f"{path} is not a valid safetensors file: {_reason(error)}") from error

    def reader(name: str, dtype: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if dtype != "BF16":
                with safe_open(path, framework="numpy") as file:
                    return file.get_tensor(name)
            with safe_open(path, framework="pt") as file:  # numpy knows no bfloat16
                return file.get_tensor(name).float().numpy()

        return read

    tensors = {
        name: StoredTensor(
            shape,
            names.get(dtype, dtype.lower().replace("i", "int").replace("u", "uint", 1)),
            reader(name, dtype),
        )
        for name, (shape, dtype) in kinds.items()
    }
    return tensors, metadata
