"""The tars that coming batches need: fetched ahead of the loader, which gets no batch whose tars are not there.

So the order of the images decides what is fetched and what may go, whatever that order is; and a slow network has the
training process wait, where it is said, and not a worker, who would be taken for one that hangs.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader

from pretrain.distributed import group
from pretrain.images.cache import key_of
from pretrain.images.labelled import Subset
from pretrain.images.prefetch import Prefetcher
from pretrain.images.sources import Source
from pretrain.images.stream import StreamedTars
from pretrain.runs.metrics import Progress

LOOK_AHEAD = 1000  # batches
BEHIND = 4  # batches: other processes, which share the folder, may be so far behind
LONG = 10.0  # seconds that are worth a word
logger = logging.getLogger("pretrain")


def stream_of(source: Source) -> StreamedTars | None:
    """The tars from elsewhere that a source, or what it is a part of, reads; None where it reads none."""
    while isinstance(source, Subset):
        source = source.source
    return source if isinstance(source, StreamedTars) else None


def shards_of(source: Source, indices: np.ndarray) -> np.ndarray:
    """Numbers of the tars that hold these images."""
    while isinstance(source, Subset):
        indices, source = source.indices[indices], source.source
    assert isinstance(source, StreamedTars)
    return np.unique(source.shards_of(indices))


def follow(loader: DataLoader) -> "ReadAhead | None":
    """What reads ahead of a loader of images; None where they are not streamed."""
    source = loader.dataset.source  # type: ignore[attr-defined]
    in_hand = loader.num_workers * (loader.prefetch_factor or 0)
    return ReadAhead(source, loader.batch_sampler, in_hand) if stream_of(source) else None  # type: ignore[arg-type]


class ReadAhead:
    """What a loader of batches needs of a stream, before it needs it.

    Args:
        source: for which `stream_of` gives tars.
        batches: the loader's sampler: lists of (epoch, index), the same each time that it is begun.
        in_hand: batches that the loader hands to its workers beyond the one that it gives.
    """

    def __init__(self, source: Source, batches: Iterable[Sequence[tuple[int, int]]], in_hand: int) -> None:
        stream = stream_of(source)
        assert stream is not None
        self._cache, self._places, self._in_hand = stream.cache, stream.places, in_hand
        self._prefetcher = Prefetcher(stream.cache, stream.places)
        self._coming: Iterator[np.ndarray] = (shards_of(source, np.array([i for _, i in batch])) for batch in batches)
        self._next: np.ndarray | None = next(self._coming, None)
        self._number = 0  # of the batch `_next`
        self._given = 0  # batches that the loader was asked for
        # Of each tar that is needed from here on, in the order of need: the first and the last batch known to need it.
        self._needs: dict[int, tuple[int, int]] = {}

    def advance(self) -> None:
        """Have the tars there for the next batch that the loader is asked for, and for all that it then has in hand.

        Raises:
            UserError: a tar cannot be had.
        """
        before = list(self._needs)
        last = self._given + self._in_hand
        self._needs = {i: need for i, need in self._needs.items() if need[1] >= self._given - BEHIND}
        while self._next is not None and (self._number <= last or self._reaches(self._next)):
            for i in self._next.tolist():
                self._needs[i] = self._needs.get(i, (self._number, 0))[0], self._number
            self._next, self._number = next(self._coming, None), self._number + 1
        if list(self._needs) != before:
            self._prefetcher.want(self._fitting())
        self._wait([i for i, (first, _) in self._needs.items() if first <= last])
        self._given += 1

    def close(self) -> None:
        """Fetch no more."""
        self._prefetcher.close()

    def _reaches(self, shards: np.ndarray) -> bool:
        """Whether there is room for the tars of a batch, besides those of the batches before it."""
        if self._number > self._given + LOOK_AHEAD or len(self._needs) == len(self._places):
            return False
        return self._bytes({*self._needs, *shards.tolist()}) <= self._cache.limit

    def _fitting(self) -> Sequence[int]:
        """The needed tars, as far as they fit. All do, unless the batches in hand alone are too much."""
        numbers = list(self._needs)
        while self._bytes(numbers) > self._cache.limit:
            numbers.pop()
        return numbers

    def _bytes(self, numbers: Iterable[int]) -> int:
        return sum(self._places[i].size or 0 for i in numbers)

    def _wait(self, numbers: Sequence[int]) -> None:
        missing = [i for i in numbers if not self._cache.has(self._places[i])]
        if not missing:
            return
        started, keep = time.monotonic(), {key_of(self._places[i]) for i in self._needs}
        progress = Progress(len(missing), unit="tar", shown=group.is_main() and not self._given)
        for i in missing:
            self._cache.ensure(self._places[i], keep)
            progress.advance(f"fetched {self._places[i].url}")
        progress.close()
        waited = time.monotonic() - started
        if waited > LONG:
            logger.info("waited %.0f s for %d tars to come, %s the last", waited, len(missing), self._places[i].url)
