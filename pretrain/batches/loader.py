"""The loader of batches, and its messages about workers and images that fail."""

import contextlib
import logging
import multiprocessing
import os
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from foundation.errors import UserError
from foundation.images import UnreadableImage
from foundation.names import counted
from foundation.signals import leave_to_parent
from pretrain.batches.read_ahead import ReadAhead, follow, stream_of
from pretrain.batches.sampler import ShuffledBatches
from pretrain.batches.views import Batch, ignore
from pretrain.images.sources import Source

WORKER_TIMEOUT = 300  # seconds without a batch after which a hanging worker is reported
NO_SHARED_MEMORY = (
    "a loader worker finds no room in shared memory (/dev/shm), where it puts the batches; give the machine more, a "
    "container with --shm-size, or lower DATA.WORKERS (0 needs none)"
)
logger = logging.getLogger("pretrain")


class ImageDataset(Protocol):
    """Makes batches of the images of a source."""

    source: Source

    def __len__(self) -> int: ...

    def read(self, keys: Sequence[tuple[int, int]], begin: Callable[[int], None]) -> Any:
        """A batch, of the images with keys (epoch, index). `begin` is called with each index before it is read."""
        ...


def build_loader(
    dataset: ImageDataset,
    batches: Sampler,
    workers: int,
    device: torch.device,
    timeout: float = WORKER_TIMEOUT,
) -> DataLoader:
    """A loader of the dataset's batches.

    Args:
        dataset: the images.
        batches: lists of (epoch, index).
        workers: loader processes; 0: this process reads.
        device: where the batches go.
        timeout: seconds without a batch after which a hanging worker is reported.

    Raises:
        UserError: the images are streamed, and the tars needed at a time do not fit DATA.CACHE_GB.
    """
    stream = stream_of(dataset.source)
    if stream and isinstance(batches, ShuffledBatches):
        stream.check_room(batches.window)
    with warnings.catch_warnings():
        # DATA.WORKERS is the user's choice, and readers that wait for a disk or a network may outnumber the cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        return DataLoader(
            WatchedDataset(dataset, workers),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=device.type == "cuda",
            timeout=timeout if workers else 0,
            worker_init_fn=leave_to_parent,
        )


def _unchanged(batch: Any) -> Any:
    """The loader's collate function: `read` has made a complete batch already."""
    return batch


_watched: "weakref.WeakSet[WatchedDataset]" = weakref.WeakSet()


class WatchedDataset(Dataset):
    """A dataset that records, in memory shared with the workers, what each worker is reading and since when."""

    def __init__(self, dataset: ImageDataset, workers: int) -> None:
        self.dataset = dataset
        self._board = torch.zeros(max(workers, 1), 3, dtype=torch.float64).share_memory_()  # process, index, since
        _watched.add(self)

    @property
    def source(self) -> Source:
        """The images."""
        return self.dataset.source

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Any:
        """A batch. PyTorch's loader calls this with all keys of a batch, in a worker or in the training process."""
        worker = get_worker_info()
        if worker is None:
            return self.dataset.read(keys, ignore)
        row = self._board.numpy()[worker.id]

        def begin(index: int) -> None:
            row[:] = os.getpid(), index, time.monotonic()

        batch = self.dataset.read(keys, begin)
        row[2] = 0
        return batch

    def processes(self) -> set[int]:
        """The processes that have read from it."""
        return {int(row[0]) for row in self._board.tolist()}

    def describe(self, process: int | None = None) -> str:
        """The worker of a process, or the one that has been reading for the longest time, and its image."""
        busy = [
            (worker, row) for worker, row in enumerate(self._board.tolist()) if row[2] and process in (None, row[0])
        ]
        if not busy:
            return "a loader worker" if process is None else f"a loader worker (process {process})"
        worker, (own, index, since) = min(busy, key=lambda entry: entry[1][2])
        name, seconds = self.dataset.source.name(int(index)), time.monotonic() - since
        return f"loader worker {worker} (process {own:.0f}), at {name} for {seconds:.0f} s,"


def read_batches(loader: DataLoader) -> Generator[Any, None, None]:
    """The loader's batches.

    Raises:
        UserError: too many images in a row are unreadable, a tar cannot be fetched, or a worker has died or hangs. The
            worker is named, and all workers are ended.
    """
    with contextlib.ExitStack() as stack:
        ahead = follow(loader)
        if ahead:
            stack.callback(ahead.close)
            ahead.advance()
        yield from _read(loader, ahead)


def _read(loader: DataLoader, ahead: ReadAhead | None) -> Generator[Any, None, None]:
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    workers = [process for process in multiprocessing.active_children() if process not in others]
    failure = ""
    try:
        try:
            while (batch := next(batches, None)) is not None:
                yield batch
                if ahead:
                    ahead.advance()
        except (UnreadableImage, UserError) as error:
            # A worker's exception holds its traceback as text; the message is the last line.
            last = (
                str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
            )
            traceback.clear_frames(error.__traceback__)  # its frames hold the loader, which must end before its workers
            failure = f"{last}; check the dataset" if isinstance(error, UnreadableImage) else last
        except (RuntimeError, OSError, EOFError) as error:
            if lacks_shared_memory(str(error)):
                traceback.clear_frames(error.__traceback__)  # as above
                failure = NO_SHARED_MEMORY
            else:
                # torch may miss the death of a worker and report a timeout later. Any other error may come from the
                # connection to a worker that is dying.
                gone = find_dead(workers, patience=0 if str(error).startswith("DataLoader") else 5)
                failure = worker_failure(loader, f"DataLoader worker {gone}" if gone else str(error))
            if not failure:
                workers = []
                raise
        finally:
            del batches  # ends the workers that listen
    finally:  # after torch has stopped watching them, because it would report these kills as failures
        for worker in workers:
            if worker.is_alive():
                worker.kill()
    if failure:
        raise UserError(failure)


def find_dead(workers: Sequence[BaseProcess], patience: float) -> int | None:
    """The id of a process that has ended or does so within `patience` seconds.

    A process that is killed closes its sockets and its sentinel some time before it has ended.
    """
    with contextlib.suppress(RuntimeError):  # torch's handler of SIGCHLD raises it, here or later
        wait([process.sentinel for process in workers], patience)
    for process in workers:
        with contextlib.suppress(RuntimeError):
            if wait([process.sentinel], 0):
                process.join(1)
    return next((process.pid for process in workers if not process.is_alive()), None)


@contextlib.contextmanager
def report_dead_workers() -> Iterator[None]:
    """Report the death of a worker of any loader as a UserError. torch raises it from a signal handler, at any line."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if not message.startswith("DataLoader"):
            raise
        if lacks_shared_memory(message):
            raise UserError(NO_SHARED_MEMORY) from error
        dead = _processes(message)
        watched = next((dataset for dataset in _watched if set(dead) & dataset.processes()), None)
        raise UserError(_died(watched, dead)) from error


def lacks_shared_memory(message: str) -> bool:
    """Whether a message of torch says that a worker has no room for a batch: a refusal, or a bus error."""
    return "shared memory(shm)" in message or "out of shared memory" in message


def worker_failure(loader: DataLoader, message: str) -> str:
    """The message for a RuntimeError of torch about a worker; empty if it is about something else."""
    if not message.startswith("DataLoader"):
        return ""
    dataset = loader.dataset
    assert isinstance(dataset, WatchedDataset)
    if "timed out" in message:
        return f"{dataset.describe()} hangs: no batch came for {loader.timeout:g} s; check the disk that holds it"
    return _died(dataset, _processes(message))


def _processes(message: str) -> list[int]:
    """The process numbers in a message of torch."""
    return [int(word) for word in message.replace(")", " ").replace(",", " ").split() if word.isdigit()]


def _died(dataset: "WatchedDataset | None", dead: Sequence[int]) -> str:
    who = dataset.describe(dead[0] if dead else None) if dataset is not None else "a loader worker"
    return f"{who} has died; the usual reason is that memory ran out: lower DATA.WORKERS"


def report_unreadable(batch: Batch, known: set[str], allowed: float | None) -> None:
    """Warn once of each damaged image.

    Args:
        batch: the next batch.
        known: the messages so far, to which those of the batch are added.
        allowed: number of images; between 0 and 1 it is 1, so that a fraction of a small set allows one; None where the
            caller leaves out those that the batch has replaced, however many.

    Raises:
        UserError: there are more than `allowed`.
    """
    done = "left out" if allowed is None else "replaced by the next one"
    for message in batch.unreadable:
        if message not in known:
            known.add(message)
            logger.warning("unreadable image, %s: %s", done, message)
    if allowed is not None and len(known) > (most := max(int(allowed), 1) if allowed else 0):
        listed = "; ".join(sorted(known)[:20])
        raise UserError(
            f"{counted(len(known), 'image')} cannot be read, and the limit is {most}; replace or remove them, or raise "
            f"DATA.MAX_UNREADABLE where the command has a configuration: {listed}"
        )
