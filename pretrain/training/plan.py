"""`--dry-run`: what a configuration comes to, before anything is trained: steps, learning rates, sizes."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60  # characters of the curve
FLOAT = 4  # bytes


def describe_plan(
    *,
    images: int,
    batch_size: int,
    micro_batch: int,
    processes: int,
    epochs: int,
    warmup_epochs: int,
    last_step: int,
    schedule: Callable[[int], float],
    network: nn.Module,
    dim: int,
) -> Iterator[str]:
    """The lines to print.

    Args:
        images: in the dataset.
        batch_size: over all processes.
        micro_batch: images at a time in each process, 0 for all.
        processes: how many.
        epochs, warmup_epochs: of the schedule.
        last_step: one past the last step that is taken; the whole schedule's, or before.
        schedule: step -> learning rate.
        network: encoder and projector; on the meta device will do.
        dim: P, dimension of the embedding.
    """
    per_epoch = images // batch_size
    total = per_epoch * epochs
    share = batch_size // processes
    passes = -(-share // micro_batch) if micro_batch else 1
    yield f"batch             {batch_size} = {processes} process(es) x {share}, each in {passes} pass(es)"
    rest = images - per_epoch * batch_size
    yield f"epoch             {per_epoch} steps; {rest} of {images} images are left out, others each time"
    yield f"steps             {last_step} of {total} ({epochs} epochs)"
    yield from _describe_schedule(schedule, total, per_epoch * warmup_epochs)
    yield from _describe_sizes(network, dim)


def text_curve(schedule: Callable[[int], float], total: int, width: int = WIDTH) -> str:
    """A schedule over `total` steps as one line of bars, the highest at its peak."""
    places = [round(i * (total - 1) / max(width - 1, 1)) for i in range(width)]
    rates = [schedule(step) for step in places]
    top = max(rates)
    return "".join(BARS[min(int(rate / top * len(BARS)), len(BARS) - 1)] if top > 0 else BARS[0] for rate in rates)


def build_without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """A module whose tensors have shapes and no content."""
    with torch.device("meta"):
        return build()


def _describe_schedule(schedule: Callable[[int], float], total: int, warmup: int) -> Iterator[str]:
    yield f"learning rate     {text_curve(schedule, total)}"
    points = {"first": 0, "last of warm-up": warmup - 1, "first after it": warmup}
    for name, step in {**points, "middle": total // 2, "last": total - 1}.items():
        if 0 <= step < total:
            yield f"  {name:<15} {schedule(step):.6g} (step {step})"


def _describe_sizes(network: nn.Module, dim: int) -> Iterator[str]:
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    parameters = sum(counts.values())
    buffers = sum(b.numel() * b.element_size() for b in network.buffers())
    estimates = 8 * (3 * dim * dim + 2 * dim)  # float64: two covariances, the cross-covariance, the means
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    yield f"parameters        {parameters:,} ({listed})"
    kept = FLOAT * parameters * 3 + buffers + estimates
    yield f"memory            {format_size(kept)} for weights, gradients, momentum, covariance"
    saved = FLOAT * parameters * 2 + buffers + estimates
    yield f"checkpoint        {format_size(saved)}, up to three on the disk at a time"


def format_size(count: int) -> str:
    """Bytes in MB or GB, for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
