"""The tars that the next batches need, fetched before the loader needs them.

The order of the images decides which tars are fetched and which may be removed. A batch is handed to the loader only
when its tars are there. So on a slow network the training process waits, and reports it; a worker that waited would be
taken for one that hangs.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader

from foundation.names import counted
from pretrain.distributed import group
from pretrain.images.cache import key_of
from pretrain.images.labelled import Subset
from pretrain.images.prefetch import Prefetcher
from pretrain.images.sources import Source
from pretrain.images.stream import StreamedTars
from pretrain.runs.metrics import Progress

LOOK_AHEAD = 1000  # batches
BEHIND = 4  # batches by which other processes, which share the folder, may be behind
LONG = 10.0  # seconds of waiting that are reported
logger = logging.getLogger("pretrain")


def stream_of(source: Source) -> StreamedTars | None:
    """The remote tars that a source, possibly through `Subset`s, reads; None if it reads none."""
    while isinstance(source, Subset):
        source = source.source
    return source if isinstance(source, StreamedTars) else None


def shards_of(source: Source, indices: np.ndarray) -> np.ndarray:
    """Numbers of the tars that hold these images (N,): (T,), sorted, each once."""
    while isinstance(source, Subset):
        indices, source = source.indices[indices], source.source
    assert isinstance(source, StreamedTars)
    return np.unique(source.shards_of(indices))


def follow(loader: DataLoader) -> "ReadAhead | None":
    """A `ReadAhead` for a loader; None where its images are not streamed."""
    source = loader.dataset.source  # type: ignore[attr-defined]
    in_hand = loader.num_workers * (loader.prefetch_factor or 0)
    return ReadAhead(source, loader.batch_sampler, in_hand) if stream_of(source) else None  # type: ignore[arg-type]


class ReadAhead:
    """Fetches the tars that a loader needs next.

    Args:
        source: for which `stream_of` gives tars.
        batches: the loader's sampler: lists of (epoch, index), the same in each iteration.
        in_hand: batches that the loader gives to its workers beyond the one that it returns.
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
        # For each tar that is needed from now on, in order: the first and the last batch known to need it.
        self._needs: dict[int, tuple[int, int]] = {}

    def advance(self) -> None:
        """Wait for the tars of the next batch, and of all batches that the loader then gives to its workers.

        Raises:
            UserError: a tar cannot be fetched.
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
        """Stop fetching."""
        self._prefetcher.close()

    def _reaches(self, shards: np.ndarray) -> bool:
        """Whether there is room for the tars of a batch beside those of the batches before it."""
        if self._number > self._given + LOOK_AHEAD or len(self._needs) == len(self._places):
            return False
        return self._bytes({*self._needs, *shards.tolist()}) <= self._cache.limit

    def _fitting(self) -> Sequence[int]:
        """The needed tars, as many as fit. All do, unless the batches in hand alone need more."""
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
            count = counted(len(missing), "tar")
            logger.info("waited %.0f s for %s, the last of them %s", waited, count, self._places[i].url)
