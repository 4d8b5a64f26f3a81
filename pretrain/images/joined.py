"""Several sources of images as one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from foundation.images import OpenImage
from pretrain.images.tars import UNLABELED

if TYPE_CHECKING:
    from pretrain.images.sources import Source


@dataclass(frozen=True)
class JoinedSource:
    """The images of several sources, one after the other, without labels: each source has classes of its own."""

    sources: "Sequence[Source]"
    labels: np.ndarray = field(init=False)
    classes: Sequence[str] = field(init=False, default=())
    _ends: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", np.cumsum([len(source) for source in self.sources]))
        object.__setattr__(self, "labels", np.broadcast_to(np.int32(UNLABELED), len(self)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def open(self, index: int) -> OpenImage:
        """The image, which is decoded when its pixels are asked for. Raises `UnreadableImage`."""
        source, place = self._place(index)
        return source.open(place)

    def name(self, index: int) -> str:
        """The name of the image in its source."""
        source, place = self._place(index)
        return source.name(place)

    def _place(self, index: int) -> "tuple[Source, int]":
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[number], index - (int(self._ends[number - 1]) if number else 0)
