"""Batches: which images, in which order, for which process; and the loader that fetches them."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from cli.errors import UserError
from pretrain.views import ViewDataset, collate

WORKER_TIMEOUT = 300  # seconds without a batch after which a hanging worker is reported


class ShuffledBatches(Sampler):
    """The batches of all epochs from a given step on, each a list of (epoch, index).

    The order is a permutation by (seed, epoch). A batch is a run of it, and each process takes its part of the
    batch, so that the images of a step are the same for any number of processes. An incomplete last batch is dropped.

    Args:
        count: images in the dataset.
        batch_size: over all processes.
        epochs: in all.
        seed: of the order.
        first_step: where to begin, counted over all epochs.
        last_step: where to end; the end of the last epoch, or before.
        rank: this process.
        world_size: number of processes; divides `batch_size`.
    """

    def __init__(
        self,
        count: int,
        *,
        batch_size: int,
        seed: int,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.first_step, self.last_step = first_step, last_step
        self.rank, self.share = rank, batch_size // world_size
        self.steps_per_epoch = count // batch_size

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_epoch = np.empty(0, np.int64), -1
        for step in range(self.first_step, self.last_step):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.count, self.seed, epoch), epoch
            start = place * self.batch_size + self.rank * self.share
            yield [(epoch, int(index)) for index in order[start : start + self.share]]


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of the images in an epoch."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, epoch])).permutation(count)


def check_batch(count: int, batch_size: int, world_size: int) -> None:
    """Refuse a batch that cannot be formed. Raises UserError naming the numbers."""
    if batch_size % world_size:
        raise UserError(
            f"TRAIN.BATCH_SIZE {batch_size} is not divisible by the {world_size} processes; "
            f"the nearest that is: {max(batch_size // world_size, 1) * world_size}"
        )
    if batch_size > count:
        raise UserError(f"TRAIN.BATCH_SIZE is {batch_size}, but the dataset has {count} images; lower the batch size")


def build_loader(dataset: ViewDataset, batches: Sampler, workers: int, device: torch.device) -> DataLoader:
    """A loader of `Batch`es."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        timeout=WORKER_TIMEOUT if workers else 0,
    )


class SequentialBatches(Sampler):
    """All images once in order, in one epoch; the last batch may be smaller."""

    def __init__(self, indices: np.ndarray, batch_size: int, epoch: int = 0) -> None:
        self.indices, self.batch_size, self.epoch = indices, batch_size, epoch

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(self.epoch, int(index)) for index in self.indices[start : start + self.batch_size]]
