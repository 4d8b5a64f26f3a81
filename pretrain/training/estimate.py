"""`--dry-run`: what a run costs on this machine, measured on a few steps of noise: memory for activations, and time."""

import time
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from pretrain.batches.views import Batch, Param, draw_photometric, random_stream
from pretrain.config import build_recipes, resolve_precision
from pretrain.training.build import build_network, build_parts, build_trainer
from pretrain.training.plan import build_without_memory, format_size

STEPS = 3  # timed, after one to warm up
MOST = {"cpu": 16, "cuda": 256}  # pairs in a timed step
BYTES = {"float32": 4, "bfloat16": 2}


def describe_cost(config: CfgNode, *, processes: int, steps: int, device: torch.device) -> Iterator[str]:
    """The lines to print.

    Args:
        config: of the run.
        processes: that share the batch.
        steps: of the run.
        device: of this process.
    """
    share = config.TRAIN.BATCH_SIZE // processes
    at_once = min(share, config.TRAIN.MICRO_BATCH or share)
    precision = resolve_precision(config.TRAIN.PRECISION, device)
    network = build_without_memory(lambda: build_network(config))
    kept = at_once * activation_bytes(network, config.DATA.IMAGE_SIZE, precision)
    yield f"activations       about {format_size(kept)}, {at_once} pairs at once in {precision} (TRAIN.MICRO_BATCH)"
    size = min(at_once, MOST.get(device.type, 16))
    try:
        speed = pairs_per_second(config, size, device)
    except torch.OutOfMemoryError:
        yield f"time              not known: {size} pairs at once do not fit this {device.type}; set TRAIN.MICRO_BATCH"
        return
    passes = 4 / 3 if at_once < share else 1  # embeddings first, without gradient: a third of forward and backward
    duration = timedelta(seconds=round(steps * share * passes / speed))
    yield (
        f"time              about {duration} if loading keeps up: {speed:.3g} pairs/s on this {device.type}, timed on"
        f" {STEPS} steps of {size} pairs"
    )
    if device.type == "cuda":
        most, there = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        yield f"memory of these   {format_size(most)} at most, of the GPU's {format_size(there)}"


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
    trainer = build_trainer(config, parts, device, total_steps=STEPS + 1, steps_per_epoch=STEPS + 1)
    batch = synthetic_batch(config, size)
    if device.type == "cuda":
        batch = batch.pin_memory()
    for step in range(STEPS + 1):
        if step == 1:
            started = _now(device)
        trainer.step(step, batch)
    return STEPS * size / (_now(device) - started)


def synthetic_batch(config: CfgNode, size: int) -> Batch:
    """Crops of noise, with parameters as a worker draws them."""
    side, recipes = config.DATA.IMAGE_SIZE, build_recipes(config)
    params = np.empty((2, size, len(Param)), np.float32)
    for view, recipe in enumerate(recipes):
        for index in range(size):
            params[view, index] = draw_photometric(recipe, random_stream(0, 0, index, view))
    images = torch.randint(0, 256, (2, size, 3, side, side), dtype=torch.uint8)
    return Batch(images, torch.from_numpy(params), torch.zeros(size, dtype=torch.int64), torch.arange(size), [])


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
    return time.perf_counter()
