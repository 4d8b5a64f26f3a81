"""`--check-data`: read every image of a dataset, as training does, and list those that cannot be read."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from foundation.errors import UserError
from pretrain.batches.loader import build_loader, read_batches
from pretrain.batches.sampler import SequentialBatches
from pretrain.images.sources import Source
from pretrain.images.survey import fault_of
from pretrain.runs.metrics import Progress

BATCH = 64  # images between two updates of the progress


class Readings:
    """For images of a source, by (epoch, index), why they cannot be read; empty if they can."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def read(self, keys: Sequence[tuple[int, int]], begin: Callable[[int], None]) -> Sequence[str]:
        """A message for each of some images."""
        return [self._read(index, begin) for _, index in keys]

    def _read(self, index: int, begin: Callable[[int], None]) -> str:
        begin(index)
        return fault_of(self.source, index)


def find_unreadable(source: Source, workers: int, timeout: float) -> Sequence[str]:
    """A message for each image that cannot be read, in the order of the dataset.

    Args:
        source: the images.
        workers: loader processes.
        timeout: seconds without a batch after which a hanging worker is reported.

    Raises:
        UserError: a worker has died or hangs.
    """
    batches = SequentialBatches(np.arange(len(source)), BATCH)
    loader = build_loader(Readings(source), batches, workers, torch.device("cpu"), timeout)
    progress = Progress(len(batches), unit="batch")
    found: list[str] = []
    for messages in read_batches(loader):
        found += filter(None, messages)
        progress.advance(f"{len(found)} unreadable")
    progress.close()
    return found


def check_data(source: Source, workers: int, timeout: float) -> None:
    """Print every image that cannot be read. Raises UserError where there is one."""
    found = find_unreadable(source, workers, timeout)
    for message in found:
        print(message)
    if found:
        raise UserError(f"{len(found)} of {len(source)} images cannot be read; replace or remove those listed above")
    print(f"all {len(source)} images can be read")
