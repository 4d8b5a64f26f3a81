"""A CUDA graph of the network. A GPU computes a step on small images in less time than the host takes to launch it.

A graph is launched at once, forward and backward. With a ResNet-18 on 1024 pairs of 40 pixels a step takes 40 % of the
time on an H100 (docs/benchmarks.md).
"""

from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from foundation.errors import UserError
from pretrain.distributed import group
from pretrain.training.step import Trainer

MOST_PIXELS = 8_000_000  # of a view of the batch, for `auto`; above, computing probably takes longer than launching


def uses_graph(config: CfgNode, device: torch.device, pairs: int) -> bool:
    """Whether steps of this number of pairs in each process are to be a graph.

    There can be none with several processes, which exchange statistics in each layer; nor with micro-batches, whose
    first pass keeps BatchNorm's statistics; nor of a compiled network.

    Raises:
        UserError: TRAIN.CUDA_GRAPH is `on`, and there can be none.
    """
    choice = config.TRAIN.CUDA_GRAPH
    wanted = choice == "on" or (choice == "auto" and pairs * config.DATA.IMAGE_SIZE**2 <= MOST_PIXELS)
    obstacles = {
        "a GPU": device.type != "cuda" or not torch.cuda.is_available(),
        "a single process": group.world_size() > 1,
        "TRAIN.MICRO_BATCH 0": 0 < config.TRAIN.MICRO_BATCH < pairs,
        "TRAIN.COMPILE False": bool(config.TRAIN.COMPILE),
    }
    missing = [name for name, there in obstacles.items() if there]
    if choice == "on" and missing:
        raise UserError(f"TRAIN.CUDA_GRAPH on needs {', '.join(missing)}; set it to auto")
    return wanted and not missing


def capture(network: nn.Module, views: Sequence[Tensor], precision: str) -> None:
    """Replace the passes of a network in training mode by a graph. Parameters, buffers and the random state stay.

    No other thread may use the GPU meanwhile, so this comes before loader workers start.

    Args:
        network: is not wrapped.
        views: its arguments, of the shapes that all later ones have.
        precision: `float32` or `bfloat16`.
    """
    network.train()
    warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)  # from torch 2.10 on
    if warn:
        warn(False)  # gradients come from the graph's stream
    before = [buffer.clone() for buffer in network.buffers()]
    # Weights that the cache of autocast holds would not be converted again when the graph runs.
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
        torch.cuda.make_graphed_callables(network, tuple(views))
    for buffer, earlier in zip(network.buffers(), before, strict=True):
        buffer.copy_(earlier)  # the passes before the capture have changed BatchNorm's running statistics


def capture_step(trainer: Trainer, pairs: int, size: int) -> None:
    """Let a trainer's network run as a graph, for views of `pairs` images of `size` x `size` pixels."""
    dtype = torch.bfloat16 if trainer.precision == "bfloat16" else torch.float32
    zeros = torch.zeros(pairs, 3, size, size, dtype=dtype, device=trainer.device)
    views = [zeros.to(memory_format=torch.channels_last, copy=True) for _ in range(2)]
    capture(trainer.network, views, trainer.precision)
