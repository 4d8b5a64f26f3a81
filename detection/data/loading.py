"""Batches of training images, in an order and with augmentations that are a function of the seed and the position.

The images of all processes form one endless stream, epoch after epoch, each shuffled. It is cut into groups of as many
images as one process puts through the model at once; with aspect ratio grouping, wide images with wide ones and tall
with tall, so that less of a batch is padding. The groups are assigned in turn to the passes of an iteration and the
processes.

So 8 processes with one pass see in each iteration what one process with 8 passes sees, the result does not depend on
the number of workers, and a resumed run continues with the images that the interrupted one would have seen next: the
order is recomputed from its beginning, which reads no image.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from detection.data.seeding import Stream, generator, seed_libraries
from foundation.errors import UserError
from foundation.signals import end_workers_at_exit, leave_to_parent

Record = dict[str, Any]
Key = tuple[int, int]  # position in the stream, index of the record


@dataclass(frozen=True)
class ProcessBatch:
    """Which of the groups one of several processes gets.

    Attributes:
        passes: groups that it puts through the model in an iteration.
        processes: their number.
        rank: of this process.
    """

    passes: int = 1
    processes: int = 1
    rank: int = 0

    def of(self, groups: Iterable[list[Key]], iteration: int) -> Iterator[list[Key]]:
        """Its groups, from the first one of an iteration on."""
        return itertools.islice(groups, iteration * self.passes * self.processes + self.rank, None, self.processes)


class TrainingBatches:
    """Endless batches of mapped records, from any iteration on.

    Args:
        records: of the images, in Detectron2's form; the mapper may change what indexing returns.
        mapper: turns a record into the input of the model.
        groups: starts the sequence of groups of all processes.
        process_batch: which of them this process gets.
        seed: of the augmentations.
        workers: processes that read ahead; with 0 this process reads.
        device: where the images go. To a GPU they are copied from pinned memory, for which the host does not wait.
    """

    def __init__(
        self,
        records: Sequence[Record],
        mapper: Callable[[Record], Record],
        groups: Callable[[], Iterator[list[Key]]],
        process_batch: ProcessBatch,
        *,
        seed: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self._images = _MappedImages(records, mapper, seed)
        self._groups, self._process_batch, self._workers, self._device = groups, process_batch, workers, device

    def starting(self, iteration: int) -> Iterator[list[Record]]:
        """The batches of this process from an iteration on, `process_batch.passes` of them for each.

        Raises:
            UserError: while iterating: an image cannot be read, or a worker has died.
        """
        loader = torch.utils.data.DataLoader(
            self._images,
            batch_sampler=self._process_batch.of(self._groups(), iteration),
            num_workers=self._workers,
            collate_fn=list,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=leave_to_parent,
        )
        end_workers_at_exit()
        with report_dead_workers(self._workers):
            for batch in loader:
                for image in batch:
                    if isinstance(image, UserError):
                        raise image
                yield [_send(image, self._device) for image in batch]

    def __iter__(self) -> Iterator[list[Record]]:
        """From the first iteration. Nothing is read before the first batch is asked for."""
        yield from self.starting(0)


def _send(record: Record, device: torch.device) -> Record:
    """The record with its tensors, image and labels, on the device. Objects, which are small, follow in the model."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in record.items()
    }


@contextlib.contextmanager
def report_dead_workers(workers: int) -> Iterator[None]:
    """Report the death of a loader worker as one line. PyTorch raises it from a signal handler: anywhere in the code.

    Args:
        workers: their number, for the message.

    Raises:
        UserError: in place of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise UserError(
            f"a process that reads images has died ({error}); if memory ran out, lower DATALOADER.NUM_WORKERS"
            f" (now {workers}), then continue with --resume"
        ) from error


def shuffled(size: int, seed: int) -> Iterator[int]:
    """Endless indices of `size` images: each once an epoch, in a different order each epoch."""
    for epoch in itertools.count():
        yield from generator(seed, Stream.ORDER, epoch).permutation(size).tolist()


def repeated(factors: Sequence[float], seed: int) -> Iterator[int]:
    """The same, where an image appears `factors[index]` times an epoch in expectation (LVIS, appendix B.2)."""
    wanted = numpy.asarray(factors)
    for epoch in itertools.count():
        draws = generator(seed, Stream.ORDER, epoch)
        times = numpy.floor(wanted + draws.random(len(wanted))).astype(int)
        yield from draws.permutation(numpy.repeat(numpy.arange(len(wanted)), times)).tolist()


def group(order: Iterable[int], size: int, wide: Sequence[bool] | None = None) -> Iterator[list[Key]]:
    """Cut a stream of indices into groups of `size` images; if `wide` tells wide images, a group does not mix them."""
    waiting: tuple[list[Key], list[Key]] = ([], [])
    for position, index in enumerate(order):
        fitting = waiting[wide[index] if wide else 0]
        fitting.append((position, index))
        if len(fitting) == size:
            yield fitting[:]
            fitting.clear()


def are_wide(records: Iterable[Record]) -> list[bool]:
    """Whether each image is wider than high; False where its record has no size."""
    return [record.get("width", 0) > record.get("height", 0) for record in records]


class _MappedImages(torch.utils.data.Dataset[Record | UserError]):
    """Mapped records by (position, index). For an image that cannot be read it returns the error: raised in a worker,
    its message would contain a traceback.
    """

    def __init__(self, records: Sequence[Record], mapper: Callable[[Record], Record], seed: int) -> None:
        self._records, self._mapper, self._seed = records, mapper, seed

    def __getitem__(self, key: Key) -> Record | UserError:
        position, index = key
        record = self._records[index]
        seed_libraries(self._seed, Stream.IMAGE, position)
        try:
            return self._mapper(record)
        except UserError as error:
            return error
