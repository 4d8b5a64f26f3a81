"""Images in tar files, as WebDataset lays them out: samples of members with a common name, `0042.jpg` and `0042.cls`.

The tars are uncompressed, so each image is read at its offset, and the order of the images, resuming and the number of
workers are the same as with a folder. Remote tars are in `stream.py`.

A member's key is its path up to the first dot of the file name, and the rest is its extension, as in WebDataset. Hidden
files are left out. An image is a member whose whole extension is one of `foundation.images.EXTENSIONS`. Other members
that end like an image (`v1.0.jpg`, `x.input.jpg`, a second image under one key, a symbolic link) are ignored, and a
warning says so. Hard links are read as what they link to.
"""

import io
import logging
import os
import stat
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from foundation.errors import UserError
from foundation.images import EXTENSIONS, MAX_BYTES, OpenImage, UnreadableImage, open_image

LABEL = ".cls"  # a member with the number of the class, as text
UNLABELED = -1
INVALID = -2  # in an index: there is a label, but it is not the number of a class
MAX_LABEL = 32  # bytes of a `LABEL` member that holds a number
MAX_CLASS = 1_000_000  # a larger number is not a class; ImageNet-21k has 21,841
MAX_HEADER = 1024**2  # bytes of a long name or an extended header
OPEN_TARS = 128  # at a time in each process: a system may allow 256 or 1,024 open files, and a dataset has more tars
logger = logging.getLogger("pretrain")


@dataclass(frozen=True)
class TarIndex:
    """Where the images of a tar are, in the order of its members. Compact, because each worker may hold many."""

    names: bytes  # of the members, separated by zero bytes
    offsets: np.ndarray  # (N,) int64, bytes
    sizes: np.ndarray  # (N,) int64, bytes
    labels: np.ndarray  # (N,) int32; `UNLABELED` where there is none, `INVALID` where it is not a number
    ignored: Sequence[str] = ()  # image members that are not used, at most `len(EXAMPLES)` of them
    ignored_count: int = 0

    @classmethod
    def of(
        cls,
        names: str,
        offsets: Sequence[int],
        sizes: Sequence[int],
        labels: Sequence[int],
        ignored: Sequence[str] = (),
        ignored_count: int = 0,
    ) -> "TarIndex":
        """From lists. `names` is separated by zero characters. Raises ValueError where they do not belong together."""
        columns = np.array(offsets, np.int64), np.array(sizes, np.int64), np.array(labels, np.int32)
        count = names.count("\0") + 1 if len(offsets) else 0
        if any(column.shape != (count,) for column in columns) or any((column < 0).any() for column in columns[:2]):
            raise ValueError("offsets, sizes, labels and names differ in number, or are negative")
        return cls(names.encode("utf-8", "surrogateescape"), *columns, list(ignored), ignored_count)

    def __len__(self) -> int:
        return len(self.offsets)

    def name(self, row: int) -> str:
        """The name of a member."""
        start = int(self._ends[row - 1]) + 1 if row else 0
        return self.names[start : int(self._ends[row])].decode("utf-8", "replace")

    @cached_property
    def _ends(self) -> np.ndarray:
        """Where each name ends in `names`: each image that is read is named, in case that it is damaged."""
        return np.append(np.flatnonzero(np.frombuffer(self.names, np.uint8) == 0), len(self.names))

    def lists(self) -> dict[str, Any]:
        """The arguments of `of`."""
        columns = {"offsets": self.offsets.tolist(), "sizes": self.sizes.tolist(), "labels": self.labels.tolist()}
        ignored = {"ignored": list(self.ignored), "ignored_count": self.ignored_count}
        return {"names": self.names.decode("utf-8", "surrogateescape"), **columns, **ignored}


class TarSource:
    """The images of some tars, in the order of the tars and of their members.

    Args:
        tars: the name of each.
        indexes: of each; None where it is not known yet.
        counts: images in each.
        root: where they are, for messages.
        labelled: whether labels are used. If not, all images are `UNLABELED`.

    Raises:
        UserError: there is no image, or labels are used and one is missing or is not a number.
    """

    def __init__(
        self,
        tars: Sequence[str],
        indexes: Sequence[TarIndex | None],
        counts: Sequence[int],
        root: str,
        labelled: bool = True,
    ) -> None:
        self.shards: Sequence[int] = list(counts)  # images in each
        self._tars, self._indexes = tars, list(indexes)
        self._ends = np.cumsum(counts, dtype=np.int64)
        total = int(self._ends[-1]) if len(self._ends) else 0
        known = [index for index in indexes if index is not None]
        _warn_of_ignored(known, root, total)
        if not total:
            raise UserError(f"there is no image in the tars of {root} (looked for {' '.join(EXTENSIONS)})")
        self.labels: np.ndarray = np.broadcast_to(np.int32(UNLABELED), total)  # takes no memory
        if labelled and len(known) == len(indexes):
            self.labels = np.concatenate([index.labels for index in known])
            self._check_labels(root)
        self.classes: Sequence[str] = [str(number) for number in range(int(self.labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> OpenImage:
        """The image, which is decoded when its pixels are asked for. Raises `UnreadableImage`."""
        shard, row = self._place(index)
        known = self._index(shard)
        size = int(known.sizes[row])
        if size > MAX_BYTES:
            raise UnreadableImage(f"{self.name(index)}: {size:,} bytes are more than the {MAX_BYTES:,} allowed")
        try:
            data = self._read_bytes(shard, int(known.offsets[row]), size)
        except OSError as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from error
        return open_image(data, self.name(index))

    def name(self, index: int) -> str:
        """The tar's path and the member's name."""
        shard, row = self._place(index)
        known = self._indexes[shard]
        return f"{self._tars[shard]}:{known.name(row) if known else f'image {row}'}"

    def shards_of(self, indices: np.ndarray) -> np.ndarray:
        """Numbers of the tars that hold these images, (N,) -> (N,)."""
        return np.searchsorted(self._ends, indices, side="right")

    def _check_labels(self, root: str) -> None:
        """Refuse labels that are not numbers, and images without one beside images that have one."""
        invalid, missing = self.labels == INVALID, self.labels == UNLABELED
        if invalid.any():
            name = self.name(int(invalid.argmax()))
            raise UserError(
                f"{name}: its label ({LABEL}) is not the number of a class, from 0 to {MAX_CLASS:,}; write numbers, "
                "the same for train and val"
            )
        if missing.any() and not missing.all():
            name = self.name(int(missing.argmax()))
            raise UserError(
                f"some images in {root} have a label ({LABEL}) and others do not: {name}; label all or none"
            )

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the tar, and of the image in it."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + self.shards[shard]

    def _index(self, shard: int) -> TarIndex:
        known = self._indexes[shard]
        assert known is not None
        return known

    def _read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        tar = _open(self._tars[shard], os.getpid())
        return os.pread(tar.descriptor, size, offset)


def local_tars(tars: Sequence[Path], root: str, labelled: bool, origin: str = "DATA.ROOT") -> TarSource:
    """The images of local tars; see `TarSource`. `origin`: the option or key that `root` comes from, for messages.

    Raises:
        UserError: as `TarSource`; or there is no tar, or one is damaged or compressed.
    """
    if not tars:
        raise UserError(f"there is no .tar in {root}; check {origin}")
    indexes = [index_tar(path, str(path)) for path in tars]
    return TarSource([str(path) for path in tars], indexes, [len(index) for index in indexes], root, labelled)


def index_tar(path: Path, name: str) -> TarIndex:
    """Find the images of a tar and their labels.

    The size of what is read into memory, apart from the index, is bounded whatever the file holds.

    Args:
        path: of the tar.
        name: of the tar in messages.

    Raises:
        UserError: it cannot be read as an uncompressed tar, or an image is stored as a sparse file.
    """
    found, last = _Members(), -1
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would block
            raise UserError(f"{name} is not a file")
        with path.open("rb") as file, tarfile.open(fileobj=_BoundedFile(file), mode="r:") as tar:
            while entry := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
                if entry.size < 0 or entry.offset <= last:  # an extended header may say so, without end
                    raise tarfile.ReadError(f"{entry.name} has a negative size")
                last = entry.offset
                if entry.isfile():
                    found.add(tar, entry)
                elif entry.islnk() or entry.issym():
                    found.add_link(entry)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
    except RecursionError as error:  # tarfile reads the header behind an extended header by calling itself
        raise UserError(f"{name} cannot be read as an uncompressed tar: too many extended headers in a row") from error
    except Exception as error:  # tarfile raises whatever its parser runs into: IndexError, ...
        raise UserError(f"{name} cannot be read as an uncompressed tar: {error or type(error).__name__}") from error
    return found.index()


class _Members:
    """The members of a tar that matter, collected in order."""

    EXAMPLES = 3

    def __init__(self) -> None:
        self._images: dict[str, tuple[str, int, int]] = {}  # by key: name, offset, size
        self._labels: dict[str, int] = {}
        self._ignored: list[str] = []
        self._ignored_count = 0

    def add(self, tar: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        key, extension = _parts_of(entry.name)
        if not key:
            return
        if extension == LABEL:
            self._labels[key] = _read_label(tar, entry)
        elif extension in EXTENSIONS and key not in self._images:
            if entry.issparse():
                raise UserError(f"{entry.name} is stored as a sparse file; write the tar without --sparse")
            self._images[key] = entry.name, entry.offset_data, entry.size
        elif extension.endswith(EXTENSIONS):
            self._ignore(entry.name)

    def add_link(self, entry: tarfile.TarInfo) -> None:
        """A member without content of its own: tar writes a file with several names once, then hard links to it."""
        key, extension = _parts_of(entry.name)
        if not key:
            return
        target = _parts_of(entry.linkname)[0] if entry.islnk() else ""
        name, offset, size = self._images.get(target, ("", 0, 0))
        if extension == LABEL and target in self._labels:
            self._labels[key] = self._labels[target]
        elif extension in EXTENSIONS and key not in self._images and target and name == entry.linkname:
            self._images[key] = entry.name, offset, size
        elif extension.endswith(EXTENSIONS):
            self._ignore(entry.name)

    def _ignore(self, name: str) -> None:
        self._ignored_count += 1
        if len(self._ignored) < self.EXAMPLES:
            self._ignored.append(name)

    def index(self) -> TarIndex:
        names, offsets, sizes = zip(*self._images.values(), strict=True) if self._images else ((), (), ())
        labels = [self._labels.get(key, UNLABELED) for key in self._images]
        return TarIndex.of("\0".join(names), offsets, sizes, labels, self._ignored, self._ignored_count)


def _parts_of(name: str) -> tuple[str, str]:
    """Key and extension of a member; no key where it is hidden: `.ipynb_checkpoints/0042.jpg`, macOS's `._0042.jpg`."""
    folder, _, file = name.rpartition("/")
    stem, _, rest = file.partition(".")
    hidden = any(part.startswith(".") for part in folder.split("/") if part not in ("", ".", ".."))
    return (f"{folder}/{stem}" if stem and not hidden else "", f".{rest}".lower())


class _BoundedFile(io.RawIOBase):
    """A file for tarfile, which reads whole extended headers into memory, however large they claim to be."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise UserError(f"a header of {size:,} bytes is larger than the {MAX_HEADER:,} allowed")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _read_label(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> int:
    """The number in a `LABEL` member, or `INVALID`."""
    content = tar.extractfile(entry) if entry.size <= MAX_LABEL and not entry.issparse() else None
    text = content.read().strip() if content else b""
    return int(text) if text.isdigit() and int(text) <= MAX_CLASS else INVALID


def _warn_of_ignored(indexes: Sequence[TarIndex], root: str, total: int) -> None:
    count = sum(index.ignored_count for index in indexes)
    if not count:
        return
    examples = [name for index in indexes for name in index.ignored][: _Members.EXAMPLES]
    logger.warning(
        "%d images of %s are ignored, %d are used: a name has one image, which is not a symbolic link, and whose "
        "extension begins at the first dot of the file name; rename %s",
        count,
        root,
        total,
        ", ".join(examples),
    )


class _OpenTar:
    """A tar that is open until nothing refers to it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # it could be opened
            os.close(self.descriptor)


@lru_cache(OPEN_TARS)
def _open(path: str, process: int) -> _OpenTar:
    """A tar that stays open while it is among the last ones used. `process`: each worker opens its own."""
    return _OpenTar(path)
