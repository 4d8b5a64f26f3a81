"""`--dry-run`: what a configuration amounts to before anything is trained: steps, learning rates, memory and time.

Memory is counted; time is measured on a few steps of this machine. `Cost` holds both, and `verdict` says in words
whether the run fits the machine and whether its steps suffice.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from foundation import machine
from foundation.devices import is_out_of_memory
from foundation.images import UnreadableImage
from foundation.names import counted
from pretrain.batches.draws import Param, draw_photometric, random_stream
from pretrain.batches.views import Batch
from pretrain.config import build_augmentations, build_views, resolve_precision
from pretrain.distributed.group import announced_here
from pretrain.images.sources import Source
from pretrain.images.survey import sample_indices
from pretrain.training.build import (
    build_network,
    build_parts,
    build_schedule,
    build_trainer,
    report_failed_compilation,
)
from pretrain.training.cuda_graph import capture_step, uses_graph
from pretrain.training.schedule import StepRange

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60  # characters of the curve
FLOAT = 4  # bytes
TIMED_STEPS = 3  # after one to warm up
TIMED_PAIRS = {"cpu": 32, "cuda": 256}  # in a timed step, at most
TIMED_IMAGES = 16  # of which two views are made
BYTES = {"float32": 4, "bfloat16": 2}
ALLOCATOR = 1.4  # activations with the allocator's rounding and the convolutions' workspaces, of those counted
PREFETCHED = 3  # batches in a loader worker: two are ready, one is being made
# Bytes of a loader worker's own memory. Measured on Linux: 18 MB of a forked worker at its first batch; the rest of its
# 500 MB is shared with the training process until the worker writes to it.
WORKER = 100e6
ENOUGH_STEPS = 5000
FEW_STEPS = 1000
clock = time.perf_counter


@dataclass(frozen=True)
class Memory:
    """Bytes that a training process needs, by where they are."""

    parameters: int  # weights, gradients, momentum, running covariance
    activations: int  # kept from the forward pass for the backward pass
    loader: int  # of all workers of this process, in the host's memory

    @property
    def training(self) -> float:
        """On the training device."""
        return self.parameters + ALLOCATOR * self.activations


@dataclass(frozen=True)
class Cost:
    """What a run needs, for each of its processes.

    Args:
        at_once: pairs of images in a forward pass.
        memory: of that process.
        device_memory: bytes that are free for training; None where the system does not say.
        host_memory: the same, of the host, for each of its processes.
        pairs_per_second: with loading; None where the timed steps did not fit the device.
        loading_bound: whether the loader, and not the training step, sets that speed.
        seconds: of the whole run.
        sharing: processes on this machine.
    """

    at_once: int
    memory: Memory
    device_memory: int | None
    host_memory: int | None
    pairs_per_second: float | None
    loading_bound: bool
    seconds: float | None
    sharing: int = 1


def describe(config: CfgNode, source: Source, processes: int, device: torch.device) -> Iterator[str]:
    """The lines to print for a configuration and its images, the verdict last."""
    span = StepRange.of(config, len(source), first=0)
    yield from describe_training(
        images=len(source),
        batch_size=config.TRAIN.BATCH_SIZE,
        micro_batch=config.TRAIN.MICRO_BATCH,
        processes=processes,
        epochs=config.TRAIN.EPOCHS,
        warmup_epochs=config.TRAIN.WARMUP_EPOCHS,
        last_step=span.last,
        schedule=build_schedule(config, span.total, span.per_epoch),
        network=build_without_memory(partial(build_network, config)),
        dim=config.PROJECTOR.DIMS[-1],
    )
    cost = measure_cost(config, source, processes=processes, steps=span.last, device=device)
    yield from describe_cost(cost, config, device)
    yield from verdict(cost, span.last, device.type, needed_steps(config))


def describe_training(
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
    """Batches, steps, learning rates and sizes, one line each.

    Args:
        images: in the dataset.
        batch_size: over all processes.
        micro_batch: images at a time in each process, 0 for all.
        processes: how many.
        epochs, warmup_epochs: of the schedule.
        last_step: one past the last step that is taken; the whole schedule's, or before.
        schedule: step -> learning rate.
        network: encoder and projector; may be on the meta device.
        dim: P, dimension of the embedding.
    """
    per_epoch = images // batch_size
    total = per_epoch * epochs
    share = batch_size // processes
    passes = -(-share // micro_batch) if micro_batch else 1
    in_passes = f"each in {counted(passes, 'pass')}"
    yield f"batch             {batch_size} = {counted(processes, 'process')} x {share}, {in_passes}"
    rest = images - per_epoch * batch_size
    left_out = f"{rest} of {images} images are left out, a different set each epoch"
    yield f"epoch             {counted(per_epoch, 'step')}; {left_out}"
    yield f"steps             {last_step} of {total} ({counted(epochs, 'epoch')})"
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


def measure_cost(config: CfgNode, source: Source, *, processes: int, steps: int, device: torch.device) -> Cost:
    """Count the memory of a run and time a few of its steps and images on this machine.

    Args:
        config: of the run.
        source: its images.
        processes: that share the batch.
        steps: of the run.
        device: of this process.
    """
    share = config.TRAIN.BATCH_SIZE // processes
    at_once = min(share, config.TRAIN.MICRO_BATCH or share)
    passes = 4 / 3 if at_once < share else 1  # embeddings first, without gradient: a third of forward and backward
    speed, loading_bound = None, False
    try:
        # Compiled steps are timed with the run's own shapes: others would have to be compiled too.
        size = at_once if config.TRAIN.COMPILE else min(at_once, TIMED_PAIRS.get(device.type, 32))
        compute = passes / pairs_per_second(config, size, device)
        seconds, loading_bound = seconds_per_pair(
            compute=compute,
            load=loading_seconds(config, source),
            workers=config.DATA.WORKERS,
            cores=machine.usable_cores() / announced_here(processes),
            on_cpu=device.type == "cpu",
        )
        speed = 1 / seconds
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return Cost(
        at_once=at_once,
        memory=count_memory(config, processes, device),
        device_memory=device_memory(device, processes),
        host_memory=host_memory(processes),
        pairs_per_second=speed,
        loading_bound=loading_bound,
        seconds=steps * share / speed if speed else None,
        sharing=announced_here(processes),
    )


def seconds_per_pair(*, compute: float, load: float, workers: int, cores: float, on_cpu: bool) -> tuple[float, bool]:
    """Time of a pair of views in a run, and whether loading sets it.

    Args:
        compute: seconds of the training step for each pair, on all cores or on the GPU.
        load: seconds of one core to read an image and make its views.
        workers: loader processes; 0: the training process loads, and does not train meanwhile.
        cores: of this training process.
        on_cpu: whether training and loading share the cores.
    """
    if not workers:
        return compute + load, load > compute
    parallel = load / min(workers, cores)
    if on_cpu:  # what the workers compute, the training step cannot
        return max(compute + load / cores, parallel), parallel > compute
    return max(compute, parallel), parallel > compute


def describe_cost(cost: Cost, config: CfgNode, device: torch.device) -> Iterator[str]:
    """Activations and time, one line each."""
    precision = resolve_precision(config.TRAIN.PRECISION, device)
    kept = format_size(cost.memory.activations)
    yield f"activations       about {kept}, {cost.at_once} pairs at once in {precision} (TRAIN.MICRO_BATCH)"
    if cost.pairs_per_second is None or cost.seconds is None:
        there = cost.device_memory
        change = "lower PROJECTOR.DIMS" if there and cost.memory.parameters > there else "set TRAIN.MICRO_BATCH"
        yield f"time              unknown: the timed steps do not fit this {device.type}; {change}"
        return
    bound = "loading" if cost.loading_bound else "the training step"
    yield (
        f"time              about {timedelta(seconds=round(cost.seconds))}: {cost.pairs_per_second:.3g} pairs/s on "
        f"this {device.type}, limited by {bound} (timed on {TIMED_STEPS} steps and {TIMED_IMAGES} images)"
    )


def needed_steps(config: CfgNode) -> tuple[int, int]:
    """Steps below which little is learned, and steps that are enough; a tenth of them where weights are given.

    From ImageNet weights Reed et al. (2021) found 500 to 5,000 steps the best on small sets.
    """
    return (FEW_STEPS // 10, ENOUGH_STEPS // 10) if config.ENCODER.WEIGHTS else (FEW_STEPS, ENOUGH_STEPS)


def verdict(cost: Cost, steps: int, device: str, needed: tuple[int, int] = (FEW_STEPS, ENOUGH_STEPS)) -> Iterator[str]:
    """Whether the run fits the machine's memory, whether its steps suffice, and how long it takes, in words.

    Args:
        cost: of the run.
        steps: of the run.
        device: `cpu` or `cuda`.
        needed: see `needed_steps`.
    """
    few, enough = needed
    yield "verdict"
    for problem, line in _memory_verdict(cost, device):
        yield f"  memory          {'does NOT fit' if problem else 'fits'}: {line}"
    if steps >= enough:
        yield f"  steps           enough: {steps:,} ({enough:,} to {6 * enough:,} are usual for small sets)"
    elif steps >= few:
        yield f"  steps           few: {steps:,}; expect more from {enough:,}: raise TRAIN.EPOCHS"
    else:
        yield f"  steps           NOT enough: {steps:,}; little is learned below {few:,}: raise TRAIN.EPOCHS"
    if cost.seconds is not None:
        yield f"  time            {describe_hours(cost.seconds)}"


def _memory_verdict(cost: Cost, device: str) -> Iterator[tuple[bool, str]]:
    """(does it not fit, the reason), for the GPU and for the host."""
    training, loader = cost.memory.training, cost.memory.loader
    host = "each process's part of this machine's" if cost.sharing > 1 else "this machine's"
    if device == "cuda":
        yield _compare(training, cost.device_memory, "training", "the GPU's")
        yield _compare(loader, cost.host_memory, "the loader's workers", host)
    else:
        yield _compare(training + loader, cost.host_memory, "training and the loader's workers", host)


def _compare(needed: float, available: int | None, who: str, whose: str) -> tuple[bool, str]:
    if available is None:
        return False, f"{who} need about {format_size(needed)}; this system does not say what it has"
    return needed > available, f"{who} need about {format_size(needed)} of {whose} {format_size(available)}"


def describe_hours(seconds: float) -> str:
    """A number of seconds as text, such as `about 2.5 hours`."""
    if seconds < 5400:
        return f"about {counted(max(1, round(seconds / 60)), 'minute')}"
    return f"about {seconds / 3600:.1f} hours" if seconds < 172800 else f"about {seconds / 86400:.1f} days"


def count_memory(config: CfgNode, processes: int, device: torch.device) -> Memory:
    """What a training process of this configuration needs, counted without allocating it."""
    share = config.TRAIN.BATCH_SIZE // processes
    at_once = min(share, config.TRAIN.MICRO_BATCH or share)
    network = build_without_memory(partial(build_network, config))
    precision = resolve_precision(config.TRAIN.PRECISION, device)
    batch = 2 * share * 3 * config.DATA.IMAGE_SIZE**2
    return Memory(
        parameters=_state_bytes(network, config.PROJECTOR.DIMS[-1], copies=3),
        activations=at_once * activation_bytes(network, config.DATA.IMAGE_SIZE, precision),
        loader=round(config.DATA.WORKERS * (PREFETCHED * batch + WORKER)),
    )


def device_memory(device: torch.device, processes: int) -> int | None:
    """Bytes that are free on a GPU; of the host, for each of the processes that share it, for a CPU."""
    if device.type != "cuda":
        return host_memory(processes)
    torch.cuda.empty_cache()  # what PyTorch keeps of the timed steps is free for the run
    return torch.cuda.mem_get_info(device)[0]


def host_memory(processes: int) -> int | None:
    """Bytes that are free on this machine, for each of its processes; None where the system does not say."""
    free = machine.available_memory()
    return None if free is None else free // announced_here(processes)


def activation_bytes(network: nn.Module, side: int, precision: str) -> int:
    """Memory that the forward pass keeps for the backward pass, for each pair of images.

    Counted on the meta device, from what autograd saves, each tensor once; what is saved whatever the batch, such as
    weights, does not count. The allocator's rounding and the workspaces of convolutions come on top.

    Args:
        network: `SiameseNetwork` on the meta device.
        side: pixels of the square images.
        precision: `float32` or `bfloat16`, of what is kept.
    """
    few, more = (_saved_bytes(network, pairs, side, BYTES[precision]) for pairs in (2, 4))
    return (more - few) // 2


def pairs_per_second(config: CfgNode, size: int, device: torch.device) -> float:
    """Speed of whole training steps, augmentation and optimizer included, on pairs of noise that are in memory."""
    parts = build_parts(config, device)
    trainer = build_trainer(config, parts, device, total_steps=TIMED_STEPS + 1, steps_per_epoch=TIMED_STEPS + 1)
    if uses_graph(config, device, size):
        capture_step(trainer, size, config.DATA.IMAGE_SIZE)
    batch = synthetic_batch(config, size)
    if device.type == "cuda":
        batch = batch.pin_memory()
    with report_failed_compilation(config.TRAIN.COMPILE):
        trainer.step(0, batch)
    started = _now(device)
    for step in range(1, TIMED_STEPS + 1):
        trainer.step(step, batch)
    return TIMED_STEPS * size / (_now(device) - started)


def loading_seconds(config: CfgNode, source: Source) -> float:
    """Seconds that one core takes to read an image and make its two views; damaged images are left out."""
    dataset = build_views(config, source)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader worker
    times = []
    try:
        for index in sample_indices(source, TIMED_IMAGES):
            started = clock()
            try:
                dataset.read([(0, index)])
            except UnreadableImage:
                continue
            times.append(clock() - started)
    finally:
        torch.set_num_threads(threads)
    # The first image pays for what is loaded once.
    return float(np.mean(times[1:] or times or [0.0]))


def synthetic_batch(config: CfgNode, size: int) -> Batch:
    """Crops of noise, with parameters as a worker draws them."""
    side, augmentations = config.DATA.IMAGE_SIZE, build_augmentations(config)
    params = np.empty((2, size, len(Param)), np.float32)
    for view, augmentation in enumerate(augmentations):
        for index in range(size):
            params[view, index] = draw_photometric(augmentation, random_stream(0, 0, index, view))
    images = torch.randint(0, 256, (2, size, side, side, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    return Batch(images, torch.from_numpy(params), torch.zeros(size, dtype=torch.int64), torch.arange(size), [])


def format_size(count: float) -> str:
    """A number of bytes as text, in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _describe_schedule(schedule: Callable[[int], float], total: int, warmup: int) -> Iterator[str]:
    yield f"learning rate     {text_curve(schedule, total)}"
    points = {"first": 0, "last of warm-up": warmup - 1, "first after it": warmup}
    for name, step in {**points, "middle": total // 2, "last": total - 1}.items():
        if 0 <= step < total:
            yield f"  {name:<15} {schedule(step):.6g} (step {step})"


def _describe_sizes(network: nn.Module, dim: int) -> Iterator[str]:
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    yield f"parameters        {sum(counts.values()):,} ({listed})"
    yield (
        f"memory            {format_size(_state_bytes(network, dim, copies=3))} for weights, gradients, momentum, "
        "covariance"
    )
    yield f"checkpoint        {format_size(_state_bytes(network, dim, copies=2))}, up to three on the disk at a time"


def _state_bytes(network: nn.Module, dim: int, copies: int) -> int:
    """Parameters in so many copies (weights, momentum, gradients), buffers, and the running estimates in float64."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in network.buffers())
    estimates = 8 * (3 * dim * dim + 2 * dim)  # two covariances, the cross-covariance, the means
    return FLOAT * parameters * copies + buffers + estimates


def _saved_bytes(network: nn.Module, pairs: int, side: int, float_bytes: int) -> int:
    saved: dict[int, Tensor] = {}  # holds them, so that no storage takes the place of another

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    views = [torch.empty(pairs, 3, side, side, device="meta") for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(*views)
    return sum(
        tensor.untyped_storage().nbytes()
        // tensor.element_size()
        * (float_bytes if tensor.is_floating_point() else tensor.element_size())
        for tensor in saved.values()
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()
