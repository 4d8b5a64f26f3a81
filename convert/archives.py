"""PyTorch's two file formats: the zip archive since 1.6, and the stream of pickles before.

Tensor data is mapped, not read: a storage's bytes are views of the file until someone uses them.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert.pickles import RestrictedUnpickler, Storage, StorageType, UnreadableTensor, item_size
from foundation.errors import UserError

# The older format begins with a pickled magic number.
STREAM_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def _storage_of(pid: Any, make: Callable[[str, str, int], Storage]) -> Storage:
    """The storage that a persistent id (`"storage"`, type, key, location, count, view) names."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], StorageType):
        raise UnreadableTensor("it refers to tensor data in an unknown way")
    count = pid[4]
    if not isinstance(count, int) or count < 0:
        raise UnreadableTensor(f"a storage of {count} elements")
    return make(str(pid[2]), pid[1].dtype, count)


def read_zip(path: Path, trust: bool) -> Any:
    """PyTorch's format since 1.6: a zip archive with `NAME/data.pkl` and one record a storage.

    Raises:
        UserError: another zip archive, a TorchScript program, or one from a big-endian machine.
    """
    with zipfile.ZipFile(path) as archive:
        root = _find_root(path, set(archive.namelist()))
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"{path} was written on a big-endian machine, which is not supported")
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        records: dict[str, Callable[[], np.ndarray]] = {}

        def make(key: str, dtype: str, count: int) -> Storage:
            storage = Storage(dtype, count)
            if key not in records:
                info = archive.getinfo(f"{root}data/{key}")
                if info.file_size < storage.size:
                    raise UnreadableTensor(f"its record {info.filename} is shorter than the tensors in it")
                records[key] = _zip_record(path, info, mapped, check=not trust)
            storage.locate = records[key]
            return storage

        pickled = io.BytesIO(archive.read(f"{root}data.pkl"))
        return RestrictedUnpickler(pickled, lambda pid: _storage_of(pid, make), trust).load()


def _find_root(path: Path, names: set[str]) -> str:
    """The folder in the archive that PyTorch wrote, with its slash."""
    roots = sorted(name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl"))
    for root in roots:
        if f"{root}constants.pkl" in names or any(name.startswith(f"{root}code/") for name in names):
            raise UserError(f"{path} is a TorchScript archive, which holds a program; save its state_dict() instead")
    if len(roots) != 1:
        raise UserError(f"{path} is a zip archive, but none of PyTorch's; unpack it and name the file inside")
    return roots[0]


def _zip_record(path: Path, info: zipfile.ZipInfo, mapped: np.ndarray, check: bool) -> Callable[[], np.ndarray]:
    """A function that gives a record's bytes, compared with its checksum the first time if `check`."""
    checked = not check

    def locate() -> np.ndarray:
        nonlocal checked
        if info.compress_type != zipfile.ZIP_STORED:  # somebody packed the archive anew
            with zipfile.ZipFile(path) as archive:
                return np.frombuffer(archive.read(info), np.uint8)
        names, extra = struct.unpack("<HH", mapped[info.header_offset + 26 : info.header_offset + 30].tobytes())
        start = info.header_offset + 30 + names + extra
        data = mapped[start : start + info.file_size]
        if not checked and zlib.crc32(data.data) != info.CRC:
            raise zipfile.BadZipFile(
                f"the checksum of its record {info.filename} does not match (if it was written with PyTorch's "
                "checksums turned off, say --trust)"
            )
        checked = True
        return data

    return locate


def read_stream(path: Path, trust: bool) -> Any:
    """PyTorch's format before 1.6: pickles (magic, version, system, object, keys), then the storages one
    by one.
    """
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
