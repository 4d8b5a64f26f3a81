"""The copy of the images to a GPU, one batch ahead of the training step."""

import contextlib
import dataclasses
from collections.abc import Generator

import torch

from pretrain.batches.views import Batch


def copy_ahead(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """The same batches, with their images on the device.

    On a GPU the images of a batch are copied on a stream of their own while the previous batch is computed. The host
    does not wait for the copy if the images are in pinned memory. On a CPU the batches are passed on unchanged.

    Args:
        batches: the batches on the host; closed at the end.
        device: where the training happens.
    """
    with contextlib.closing(batches):
        if device.type != "cuda":
            yield from batches
            return
        stream = torch.cuda.Stream(device)
        before: tuple[Batch, torch.cuda.Event] | None = None
        for batch in batches:
            copying = _start_copy(batch, stream, device)
            if before:
                yield _arrived(*before, device)
            before = copying
        if before:
            yield _arrived(*before, device)


def _start_copy(batch: Batch, stream: torch.cuda.Stream, device: torch.device) -> tuple[Batch, torch.cuda.Event]:
    with torch.cuda.stream(stream):
        images = batch.images.to(device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    return dataclasses.replace(batch, images=images), copied


def _arrived(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """The batch, once the computing stream waits for its copy and keeps its memory until the work on it is done."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(copied)
    batch.images.record_stream(computing)
    return batch
