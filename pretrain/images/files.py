"""Image files in folders: found, and listed compactly.

ImageNet has 1.28 million files. As Python objects their paths take hundreds of megabytes, which each loader worker
copies page by page, because reading an object changes its reference count. Here all names are in one buffer.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np

from foundation.images import EXTENSIONS, UNREAD_EXTENSIONS, OpenImage, open_file

logger = logging.getLogger("pretrain")


@dataclass
class LeftOut:
    """What was found beside the images that are listed.

    Args:
        unread: how many pictures of kinds that are not read, by extension.
        hidden_images: images whose name begins with a dot.
        hidden_folders: folders whose name does. What is in them is not listed.
    """

    unread: Counter[str] = field(default_factory=Counter)
    hidden_images: int = 0
    hidden_folders: int = 0


class PathList(Sequence[Path]):
    """Paths below a root: an immutable sequence in three buffers.

    Args:
        root: of all paths.
        folders: relative to the root; "" is the root itself.
        names: for each folder, the names of its files, separated by zero characters.
        counts: for each folder, the number of its files.
        left_out: what was found beside them.
    """

    def __init__(
        self,
        root: str,
        folders: Sequence[str],
        names: Sequence[str],
        counts: Sequence[int],
        left_out: LeftOut,
    ) -> None:
        self.left_out = left_out
        self._root = root
        self._folders = os.fsencode("\0".join(folders)).split(b"\0")
        self._names = os.fsencode("\0".join(text for text in names if text))
        separators = np.flatnonzero(np.frombuffer(self._names, np.uint8) == 0)
        self._ends = np.append(separators, len(self._names)).astype(np.int64)  # of each name
        self._last = np.cumsum(counts, dtype=np.int64)  # of each folder: one past its last file

    def __len__(self) -> int:
        return int(self._last[-1]) if len(self._last) else 0

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | Sequence[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = int(index) % len(self)
        start = int(self._ends[place - 1]) + 1 if place else 0
        folder = self._folders[int(np.searchsorted(self._last, place, side="right"))]
        return Path(self._root, os.fsdecode(folder), os.fsdecode(self._names[start : int(self._ends[place])]))

    def top_folders(self) -> tuple[Sequence[str], np.ndarray]:
        """The names of the first level below the root, sorted, and for each path the number of its own, (N,).

        Files directly in the root have the name "".
        """
        tops = [os.fsdecode(folder.partition(b"/")[0]) for folder in self._folders]
        names = sorted(set(tops))
        number = {name: i for i, name in enumerate(names)}
        counts = np.diff(self._last, prepend=0)
        return names, np.repeat(np.array([number[top] for top in tops], np.int32), counts)


@dataclass(frozen=True)
class FileSource:
    """Image files, decoded when they are read. A `Source`."""

    paths: Sequence[Path]
    labels: Sequence[int] | np.ndarray
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> OpenImage:
        """The image, which is decoded when its pixels are asked for. Raises `UnreadableImage`."""
        return open_file(self.paths[index])

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.paths[index])


def find_images(root: Path, tops: Sequence[str] = ()) -> PathList:
    """Every image file below a folder, in the order of the sorted paths.

    Links are followed, but not to a folder that contains them. Hidden files and folders (`.ipynb_checkpoints`, macOS's
    `._1.jpg`) are left out.

    Args:
        root: the folder.
        tops: the folders in it to search; none: all of it.
    """
    folders: list[str] = []
    names: list[str] = []
    counts: list[int] = []
    left_out = LeftOut()
    for folder, files in _walk(str(root), sorted(tops), left_out):
        folders.append(folder)
        names.append("\0".join(files))
        counts.append(len(files))
    return PathList(str(root), folders, names, counts, left_out)


def _walk(root: str, tops: Sequence[str], left_out: LeftOut) -> Iterator[tuple[str, Sequence[str]]]:
    """Folders relative to the root, with image files that follow one another in the order of the sorted paths.

    A folder comes several times where its files and subfolders alternate in that order. `left_out` counts what is not
    listed.
    """
    # A stack of what is left to visit in each folder down to the present one, with the folder's own identity.
    visiting: list[tuple[str, Iterator[tuple[str, bool]], tuple[int, int]]] = []

    def enter(folder: str, entries: Sequence[tuple[str, bool]] | None = None) -> None:
        path = os.path.join(root, folder) if folder else root
        try:
            status = os.stat(path)
            identity = status.st_dev, status.st_ino
            if all(identity != above for _, _, above in visiting):
                visiting.append((folder, iter(_list(path, left_out) if entries is None else entries), identity))
        except OSError as error:  # a folder without permission, or removed in the meantime
            logger.warning("%s: %s; its images are left out", path, error.strerror or error)

    enter("", [(top, True) for top in tops] or None)
    files: list[str] = []
    while visiting:
        folder, entries, _ = visiting[-1]
        for name, is_folder in entries:
            if is_folder:
                break
            files.append(name)
        else:
            name, is_folder = "", False
            visiting.pop()
        if files:
            yield folder, files
            files = []
        if is_folder:
            enter(f"{folder}/{name}" if folder else name)


def _list(path: str, left_out: LeftOut) -> Sequence[tuple[str, bool]]:
    """The image files and folders in a folder, sorted: (name, whether it is a folder)."""
    found = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                if _is_folder(entry):
                    left_out.hidden_folders += 1
                elif name.lower().endswith(EXTENSIONS):
                    left_out.hidden_images += 1
                continue
            if _is_folder(entry):
                found.append((name, True))
            elif name.lower().endswith(EXTENSIONS):
                found.append((name, False))
            elif (extension := os.path.splitext(name)[1].lower()) in UNREAD_EXTENSIONS:
                left_out.unread[extension] += 1
    found.sort()
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one. A link to itself, or to where there is no permission, is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False
