"""The max-pooling of a ResNet's stem, on a GPU by kernels that read and write less than PyTorch's.

PyTorch's take 5 % of a step of a ResNet-50 (docs/benchmarks.md). They keep the place of each maximum as 8 bytes, where
one suffices.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pretrain import gpu_kernels


class MaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` with kernels of 3 x 3, a stride of 2 and a padding of 1: the same function."""

    def __init__(self) -> None:
        super().__init__(kernel_size=3, stride=2, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C, H, W) -> maps (N, C, (H + 1) // 2, (W + 1) // 2)."""
        if not gpu_kernels.should_use(input):
            return super().forward(input)
        result: Tensor = _MaxPool.apply(input)
        return result


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y: Tensor
        y, places = torch.ops.corinfomax.max_pool(x)
        ctx.save_for_backward(places)
        ctx.sides = x.shape[2:]
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (places,) = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        inward: Tensor = torch.ops.corinfomax.max_pool_backward(gradient, places, *ctx.sides)
        return inward


def _simulate(x: Tensor) -> tuple[Tensor, Tensor]:
    count, channels, height, width = x.shape
    y = x.new_empty(count, channels, (height + 1) // 2, (width + 1) // 2).to(memory_format=torch.channels_last)
    return y, torch.empty_like(y, dtype=torch.uint8)


def _simulate_backward(gradient: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    inward = gradient.new_empty(*gradient.shape[:2], height, width)
    return inward.to(memory_format=torch.channels_last)


_KERNELS = "pretrain.pooling_kernels"
gpu_kernels.register("max_pool(Tensor x) -> (Tensor, Tensor)", _KERNELS, "max_pool", _simulate)
gpu_kernels.register(
    "max_pool_backward(Tensor gradient, Tensor places, int height, int width) -> Tensor",
    _KERNELS,
    "max_pool_backward",
    _simulate_backward,
)
