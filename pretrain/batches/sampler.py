"""Which images a step takes: the order of each epoch, and the part of it that each process takes."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from foundation.errors import UserError
from foundation.names import counted


def epoch_order(count: int, seed: int, epoch: int, shards: Sequence[int] = (), window: int = 0) -> np.ndarray:
    """The order of the images in an epoch, a permutation (count,) that depends on (seed, epoch) alone.

    Args:
        count: images.
        seed, epoch: what the permutation depends on.
        shards: images in each tar, in the order of the images; used only with `window`.
        window: number of tars needed at a time. The tars are permuted and taken in groups of this size, and the images
            are permuted within each group. 0, or as many as there are tars: all images are permuted together.
    """
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, epoch]))
    if not 0 < window < len(shards):
        return rng.permutation(count)
    ends, tars = np.cumsum(shards), rng.permutation(len(shards))
    images = [np.arange(ends[tar] - shards[tar], ends[tar]) for tar in tars]
    return np.concatenate(
        [rng.permutation(np.concatenate(images[i : i + window])) for i in range(0, len(images), window)]
    )


def batches_per_epoch(count: int, batch_size: int, drop_last: bool) -> int:
    """Steps of an epoch over `count` images.

    Without `drop_last` the incomplete last batch counts, unless it is a single image: BatchNorm needs two.
    """
    whole, rest = divmod(count, batch_size)
    return whole + (not drop_last and rest >= 2)


class ShuffledBatches(Sampler):
    """The batches of all epochs from a given step on, each a list of (epoch, index).

    The order is that of `epoch_order`. A batch is a contiguous part of it, and each process takes its part of the
    batch, so that the images of a step are the same for any number of processes.

    Args:
        count: images in the dataset.
        batch_size: over all processes.
        seed: of the order.
        first_step: the first step, counted over all epochs.
        last_step: one past the last step.
        rank: number of this process.
        world_size: number of processes; divides `batch_size`.
        shards, window: as in `epoch_order`.
        drop_last: as in `batches_per_epoch`.
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
        shards: Sequence[int] = (),
        window: int = 0,
        drop_last: bool = True,
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.shards, self.window = shards, window
        self.first_step, self.last_step = first_step, last_step
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = batches_per_epoch(count, batch_size, drop_last)

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_epoch = np.empty(0, np.int64), -1
        for step in range(self.first_step, self.last_step):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self._order(epoch), epoch
            batch = order[place * self.batch_size : (place + 1) * self.batch_size]
            # Where an incomplete batch cannot be divided, images repeat, as in PyTorch's DistributedSampler.
            size = max(-(-len(batch) // self.world_size), min(2, self.batch_size // self.world_size))
            places = np.arange(self.rank * size, (self.rank + 1) * size) % len(batch)
            yield [(epoch, int(index)) for index in batch[places]]

    def images_of(self, step: int) -> np.ndarray:
        """Indices of the images of a step, over all processes, (batch_size,) or fewer in an incomplete last batch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def _order(self, epoch: int) -> np.ndarray:
        return epoch_order(self.count, self.seed, epoch, self.shards, self.window)


def check_batch(count: int, batch_size: int, world_size: int) -> None:
    """Raises UserError where a batch cannot be formed."""
    if batch_size % world_size:
        raise UserError(
            f"TRAIN.BATCH_SIZE {batch_size} is not divisible by the {world_size} processes; "
            f"the nearest that is: {max(batch_size // world_size, 1) * world_size}"
        )
    if batch_size > count:
        most = count // world_size * world_size
        divisible = f", in multiples of the {world_size} processes" if world_size > 1 else ""
        fewer = f"use at most {counted(count, 'process')}"
        advice = f"set TRAIN.BATCH_SIZE {most} or lower{divisible}" if most else fewer
        raise UserError(f"TRAIN.BATCH_SIZE is {batch_size}, but the dataset has {count} images: {advice}")


class SequentialBatches(Sampler):
    """All images once, in order; the last batch may be smaller."""

    def __init__(self, indices: np.ndarray, batch_size: int, epoch: int = 0) -> None:
        self.indices, self.batch_size, self.epoch = indices, batch_size, epoch

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(self.epoch, int(index)) for index in self.indices[start : start + self.batch_size]]
