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

from convert.pickles import Unpickler
from convert.stand_ins import StorageType
from convert.tensors import Storage, UnreadableTensor, is_size, item_size
from foundation.errors import UserError

# The older format begins with a pickled magic number.
STREAM_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LARGEST_DIRECTORY = 8 << 20  # bytes of an archive's directory: 80,000 tensors
_LARGEST_PICKLE = 2 << 30  # bytes; some converters write whole networks into it
_LARGEST_UNPACKED = 512 << 20  # bytes that one compressed record may become


def map_file(path: Path) -> np.ndarray:
    """A file's bytes, read from the disk when they are used."""
    return np.memmap(path, dtype=np.uint8, mode="r")


def _storage_of(pid: Any, make: Callable[[str, str, int], Storage]) -> Any:
    """What a persistent id names: a storage, (`"storage"`, type, key, location, count, view), or in the older format a
    module's class with its source code, (`"module"`, class, file, source).
    """
    if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
        return pid[1]
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], StorageType):
        raise UnreadableTensor("it refers to tensor data in an unknown way")
    if not isinstance(pid[2], (str, int)) or not is_size(pid[4]):
        raise UnreadableTensor("a storage without a key and a number of elements")
    return make(str(pid[2]), pid[1].dtype, pid[4])


def read_zip(path: Path, allow_unknown: bool) -> Any:
    """PyTorch's format since 1.6: a zip archive with `NAME/data.pkl` and one record a storage.

    Raises:
        UserError: another zip archive, a TorchScript program, or one from a big-endian machine.
    """
    with path.open("rb") as file, zipfile.ZipFile(_Bounded(file)) as archive:
        names = set(archive.namelist())
        root = _find_root(path, names)
        records = _Records(path, map_file(path), archive)
        if f"{root}byteorder" in names and records.read(f"{root}byteorder", 64).tobytes() != b"little":
            raise UserError(f"{path} was written on a big-endian machine, which is not supported")
        storages: dict[tuple[str, str, int], Storage] = {}

        def make(key: str, dtype: str, count: int) -> Storage:
            if (key, dtype, count) not in storages:
                name = f"{root}data/{key}"
                made = Storage(dtype, count, lambda: records.read(name, count * item_size(dtype)))
                if records.size(name) < made.size:
                    raise UnreadableTensor(f"its record {name[:100]} is shorter than the tensors in it")
                storages[key, dtype, count] = made
            return storages[key, dtype, count]

        pickled = records.read(f"{root}data.pkl", None)
        return Unpickler(pickled.data, 0, lambda pid: _storage_of(pid, make), allow_unknown).load()


class _Bounded(io.BufferedReader):
    """A file for `zipfile`, which reads an archive's directory whole and makes an object of each entry."""

    def __init__(self, file: io.BufferedReader) -> None:
        super().__init__(file.raw)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGEST_DIRECTORY:
            raise zipfile.BadZipFile("its directory is larger than that of any checkpoint")
        return super().read(size)


def _find_root(path: Path, names: set[str]) -> str:
    """The folder in the archive that PyTorch wrote, with its slash."""
    roots = sorted(name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl"))
    if len(roots) == 1 and (
        f"{roots[0]}constants.pkl" in names or any(name.startswith(f"{roots[0]}code/") for name in names)
    ):
        raise UserError(f"{path} is a TorchScript archive, which holds a program; save its state_dict() instead")
    if len(roots) != 1:
        raise UserError(f"{path} is a zip archive, but not one of PyTorch's; unpack it and name the file inside")
    return roots[0]


class _Records:
    """The records of an archive. Each is compared with its checksum once, when it is read first.

    Args:
        path: of the archive.
        mapped: its bytes.
        archive: its directory.
    """

    def __init__(self, path: Path, mapped: np.ndarray, archive: zipfile.ZipFile) -> None:
        self._path = path
        self._mapped = mapped
        self._entries = {info.filename: info for info in archive.infolist()}
        self._check = any(info.CRC for info in archive.infolist())  # all are 0 if PyTorch was told to compute none
        self._checked: set[str] = set()
        self._work = 0  # bytes checked or unpacked
        self._unpacked: tuple[str, np.ndarray] | None = None  # the last one

    def size(self, name: str) -> int:
        """Bytes in a record."""
        if name not in self._entries:
            raise UnreadableTensor(f"its record {name[:100]} is missing")
        return self._entries[name].file_size

    def read(self, name: str, count: int | None) -> np.ndarray:
        """The first `count` bytes of a record, or all of them."""
        info = self._entries[name]
        if info.compress_type != zipfile.ZIP_STORED:  # somebody packed the archive anew
            return self._unpack(info, count)
        names, extra = struct.unpack("<HH", self._mapped[info.header_offset + 26 : info.header_offset + 30].tobytes())
        start = info.header_offset + 30 + names + extra
        data = self._mapped[start : start + info.file_size]
        if data.size < info.file_size or (count is None and data.size > _LARGEST_PICKLE):
            raise UnreadableTensor(f"its record {name[:100]} is too long")
        if self._check and name not in self._checked:
            self._account(info.file_size, 2 * self._mapped.size)
            if zlib.crc32(data.data) != info.CRC:
                raise zipfile.BadZipFile(f"the checksum of its record {name[:100]} does not match")
            self._checked.add(name)
        return data

    def _unpack(self, info: zipfile.ZipInfo, count: int | None) -> np.ndarray:
        if self._unpacked is None or self._unpacked[0] != info.filename:
            if info.file_size > _LARGEST_UNPACKED:
                raise UnreadableTensor(f"its compressed record {info.filename[:100]} is too long; save it uncompressed")
            self._account(info.file_size, 8 * _LARGEST_UNPACKED)
            self._unpacked = None
            with zipfile.ZipFile(self._path) as archive:
                self._unpacked = info.filename, np.frombuffer(archive.read(info), np.uint8)
        return self._unpacked[1]

    def _account(self, size: int, most: int) -> None:
        self._work += size
        if self._work > most:
            raise UnreadableTensor("its records overlap, or hold more than a network; save its state dict uncompressed")


def read_stream(path: Path, allow_unknown: bool) -> Any:
    """PyTorch's format before 1.6: pickles (magic, version, system, object, keys), then the storages one by one."""
    mapped = map_file(path)
    data = mapped.data
    storages: dict[str, Storage] = {}
    starts: dict[str, int] = {}  # of each storage's data; known once everything before it is read

    def locate(key: str, offset: int, size: int) -> np.ndarray:
        return mapped[starts[key] + offset : starts[key] + offset + size]

    def make(key: str, dtype: str, count: int) -> Storage:
        if key not in storages:
            storages[key] = Storage(dtype, count, lambda: locate(key, 0, count * item_size(dtype)))
        return storages[key]

    def storage(pid: Any) -> Any:
        whole = _storage_of(pid, make)
        if not isinstance(whole, Storage) or len(pid) < 6 or pid[5] is None:
            return whole
        _, offset, count = pid[5]  # a storage that is a part of another one
        if not is_size(offset) or not is_size(count) or offset + count > whole.count:
            raise UnreadableTensor("a part that reaches beyond its storage")
        key, size = str(pid[2]), item_size(whole.dtype)
        return Storage(whole.dtype, count, lambda: locate(key, offset * size, count * size))

    position = 0
    parts = []
    for index in range(5):
        reader = Unpickler(data, position, storage if index == 3 else None, allow_unknown)
        parts.append(reader.load())
        position = reader.position
    content, keys = parts[3:]
    for key in keys:
        if not isinstance(key, (str, int)) or str(key) not in storages or str(key) in starts:
            raise UnreadableTensor("its list of tensors does not fit its tensors")
        starts[str(key)] = position + 8  # a storage is preceded by its number of elements, as int64
        position += 8 + storages[str(key)].size
        if position > mapped.size:
            raise UnreadableTensor("the file ends before its last tensor")
    return content
