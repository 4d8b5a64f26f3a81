"""Images in tar files, as WebDataset lays them out: samples of members with a common name, `0042.jpg` and `0042.cls`.

The tars are uncompressed, so any image is at hand by its offset: the order of the images, resuming and the number of
workers are the same as with a folder. Those that are elsewhere are in `stream.py`.
"""

import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from foundation.errors import UserError
from foundation.images import EXTENSIONS, UnreadableImage, decode_rgb

LABEL = ".cls"  # a member with the number of the class, as text
UNLABELED = -1


@dataclass(frozen=True)
class TarIndex:
    """Where the images of a tar are, in the order of its members. Compact: each worker may hold many."""

    names: bytes  # of the members, with a zero byte between them
    offsets: np.ndarray  # (N,) int64, bytes
    sizes: np.ndarray  # (N,) int64, bytes
    labels: np.ndarray  # (N,) int32, `UNLABELED` where there is none

    @classmethod
    def of(cls, names: str, offsets: Sequence[int], sizes: Sequence[int], labels: Sequence[int]) -> "TarIndex":
        """Of lists. `names`: with a zero character between them."""
        columns = np.array(offsets, np.int64), np.array(sizes, np.int64), np.array(labels, np.int32)
        return cls(names.encode("utf-8", "surrogateescape"), *columns)

    def __len__(self) -> int:
        return len(self.offsets)

    def name(self, row: int) -> str:
        """Of a member."""
        return self.names.split(b"\0")[row].decode("utf-8", "replace")

    def lists(self) -> dict[str, Any]:
        """What `of` takes."""
        columns = {"offsets": self.offsets.tolist(), "sizes": self.sizes.tolist(), "labels": self.labels.tolist()}
        return {"names": self.names.decode("utf-8", "surrogateescape"), **columns}


class TarSource:
    """The images of some tars, in the order of the tars and of their members.

    Args:
        tars: what to call each.
        indexes: of each; None where it is not known yet.
        counts: images in each.
        root: where they are, for messages.

    Raises:
        UserError: there is no image, or only some have a label.
    """

    def __init__(
        self, tars: Sequence[str], indexes: Sequence[TarIndex | None], counts: Sequence[int], root: str
    ) -> None:
        self.shards: Sequence[int] = list(counts)  # images in each
        self._tars, self._indexes = tars, list(indexes)
        self._ends = np.cumsum(counts)
        if not sum(counts):
            raise UserError(f"there is no image in the tars of {root} (looked for {' '.join(EXTENSIONS)})")
        known = [index.labels for index in indexes if index is not None]
        complete = len(known) == len(indexes)
        labels = np.concatenate(known) if complete else np.full(sum(counts), UNLABELED)
        self.labels: Sequence[int] = labels.tolist()
        if UNLABELED in self.labels and (labels != UNLABELED).any():
            odd = self.name(self.labels.index(UNLABELED))
            raise UserError(f"some images in {root} have a label ({LABEL}) and some have not: {odd}")
        self.classes: Sequence[str] = [str(number) for number in range(max(self.labels) + 1)]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """The image as (H, W, 3) uint8 RGB. Raises `UnreadableImage`."""
        shard, row = self._place(index)
        known = self._index(shard)
        try:
            data = self._read_bytes(shard, int(known.offsets[row]), int(known.sizes[row]))
        except OSError as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from error
        return decode_rgb(data, self.name(index))

    def name(self, index: int) -> str:
        """The tar's path and the member's name."""
        shard, row = self._place(index)
        known = self._indexes[shard]
        return f"{self._tars[shard]}:{known.name(row) if known else f'image {row}'}"

    def shards_of(self, indices: np.ndarray) -> np.ndarray:
        """Numbers of the tars that hold these images."""
        return np.searchsorted(self._ends, indices, side="right")

    def _place(self, index: int) -> tuple[int, int]:
        """Tar, and image in it."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + self.shards[shard]

    def _index(self, shard: int) -> TarIndex:
        known = self._indexes[shard]
        assert known is not None
        return known

    def _read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        return os.pread(_open(self._tars[shard], os.getpid()), size, offset)


def local_tars(tars: Sequence[Path], root: str) -> TarSource:
    """The images of tars on this machine; see `TarSource`.

    Raises:
        UserError: as `TarSource`; there is no tar, or one is damaged or compressed.
    """
    if not tars:
        raise UserError(f"there is no .tar in {root}; check DATA.ROOT")
    indexes = [index_tar(path, str(path)) for path in tars]
    return TarSource([str(path) for path in tars], indexes, [len(index) for index in indexes], root)


@cache
def _open(path: str, process: int) -> int:
    """A descriptor, kept open. `process`: workers open their own."""
    return os.open(path, os.O_RDONLY)


def index_tar(path: Path, name: str) -> TarIndex:
    """Find the images of a tar, with their labels. Raises UserError, with `name`, where it cannot be read as one."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                folder, _, file = entry.name.rpartition("/")
                stem, dot, extension = file.partition(".")
                key, extension = f"{folder}/{stem}", f"{dot}{extension}".lower()
                if entry.isfile() and extension in EXTENSIONS:
                    images[key] = entry.name, entry.offset_data, entry.size
                elif entry.isfile() and extension == LABEL:
                    content = tar.extractfile(entry)
                    labels[key] = int(content.read()) if content else UNLABELED
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{name} cannot be read as an uncompressed tar: {error}") from error
    except ValueError as error:
        raise UserError(f"{name}: {entry.name} is not the number of a class: {error}") from error
    names, offsets, sizes = zip(*images.values(), strict=True) if images else ((), (), ())
    return TarIndex.of("\0".join(names), offsets, sizes, [labels.get(key, UNLABELED) for key in images])
