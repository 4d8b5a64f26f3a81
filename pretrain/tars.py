"""Images in tar files, as WebDataset lays them out: samples of members with a common name, `0042.jpg` and `0042.cls`.

The tars are local and uncompressed, so any image is at hand by its offset: the order of the images, resuming and the
number of workers are the same as with a folder. Streams from elsewhere are not read.
"""

import os
import tarfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli.errors import UserError
from pretrain.images import EXTENSIONS, UnreadableImage, decode_rgb

LABEL = ".cls"  # a member with the number of the class, as text
UNLABELED = -1


class Member(NamedTuple):
    """Where an image is."""

    shard: Path
    name: str
    offset: int  # bytes
    size: int


class TarSource:
    """The images of all tars in a folder, in the order of the tars' names and of their members.

    Args:
        root: the folder.

    Raises:
        UserError: there is no tar or no image, a tar is damaged or compressed, or only some images have a label.
    """

    def __init__(self, root: Path) -> None:
        shards = sorted(root.glob("*.tar"))
        if not shards:
            raise UserError(f"there is no .tar in {root}; check DATA.ROOT")
        found = [entry for shard in shards for entry in _index(shard)]
        if not found:
            raise UserError(f"there is no image in the tars of {root} (looked for {' '.join(EXTENSIONS)})")
        self._members = [member for member, _ in found]
        self.labels: Sequence[int] = [label for _, label in found]
        if UNLABELED in self.labels and any(label != UNLABELED for label in self.labels):
            odd = self.name(self.labels.index(UNLABELED))
            raise UserError(f"some images in {root} have a label ({LABEL}) and some have not: {odd}")
        self.classes: Sequence[str] = [str(number) for number in range(max(self.labels) + 1)]

    def __len__(self) -> int:
        return len(self._members)

    def read(self, index: int) -> np.ndarray:
        """The image as (H, W, 3) uint8 RGB. Raises `UnreadableImage`."""
        member = self._members[index]
        try:
            data = os.pread(_open(member.shard, os.getpid()), member.size, member.offset)
        except OSError as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from error
        return decode_rgb(data, self.name(index))

    def name(self, index: int) -> str:
        """The tar's path and the member's name."""
        return f"{self._members[index].shard}:{self._members[index].name}"


@cache
def _open(shard: Path, process: int) -> int:
    """A descriptor, kept open. `process`: workers open their own."""
    return os.open(shard, os.O_RDONLY)


def _index(shard: Path) -> Iterator[tuple[Member, int]]:
    """The images of a tar with their labels."""
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for entry in tar:
                folder, _, file = entry.name.rpartition("/")
                stem, dot, extension = file.partition(".")
                key, extension = f"{folder}/{stem}", f"{dot}{extension}".lower()
                if entry.isfile() and extension in EXTENSIONS:
                    images[key] = Member(shard, entry.name, entry.offset_data, entry.size)
                elif entry.isfile() and extension == LABEL:
                    content = tar.extractfile(entry)
                    labels[key] = int(content.read()) if content else UNLABELED
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{shard} cannot be read as an uncompressed tar: {error}") from error
    except ValueError as error:
        raise UserError(f"{shard}: {entry.name} is not the number of a class: {error}") from error
    yield from ((member, labels.get(key, UNLABELED)) for key, member in images.items())
