"""BatchNorm, the sum with a residual branch and ReLU as one differentiable operation, for large maps on a GPU."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain import gpu_kernels


def should_use(norm: _BatchNorm, x: Tensor) -> bool:
    """Whether the kernels compute this layer on this input."""
    affine = norm.weight is not None and norm.weight.dtype == torch.float32
    return affine and norm.momentum is not None and gpu_kernels.should_use(x)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of each channel of (N, C, H, W), float32. `x` has no gradient."""
    found: tuple[Tensor, Tensor] = torch.ops.corinfomax.batch_norm_statistics(x, None, None, 0.0)
    return found


def normalize(
    norm: _BatchNorm,
    x: Tensor,
    residual: Tensor | None,
    relu: bool,
    of_all: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Normalise, add the residual branch, apply ReLU.

    Args:
        norm: has weight, bias and eps. Its running statistics are updated, unless `of_all` is given.
        x: (N, C, H, W) in channels-last memory.
        residual: (N, C, H, W), or None.
        relu: whether ReLU follows.
        of_all: mean and biased variance (C,) of the images of all processes, and the number of values that they are of
            (1,), float32. By default x is normalised by its own. The gradient takes into account that they depend on x.
    """
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
    running = norm.running_mean, norm.running_var, norm.momentum
    result: Tensor = _Normalize.apply(x, residual, norm.weight, norm.bias, running, of_all, norm.eps, relu)
    return result


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor | None, Tensor | None, float],
        of_all: tuple[Tensor, Tensor, Tensor] | None,
        eps: float,
        relu: bool,
    ) -> Tensor:
        operations = torch.ops.corinfomax
        mean, variance, count = of_all or (*operations.batch_norm_statistics(x, *running), None)
        y: Tensor = operations.batch_norm_normalize(x, residual, mean, variance, weight, bias, eps, relu)
        ctx.save_for_backward(count, x, None if residual is None else y, mean, variance, weight, bias)
        ctx.options = eps, relu
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        count, *saved = ctx.saved_tensors
        inputs = gradient.contiguous(memory_format=torch.channels_last), *saved, *ctx.options
        sums, of_weight, of_bias = torch.ops.corinfomax.batch_norm_sums(*inputs)
        if count is not None:
            # Without the count, as in `GlobalBatchNorm` without kernels, which other processes may use in this layer.
            dist.all_reduce(sums[:-1])
            sums[-1:] = count
        inward, branch = torch.ops.corinfomax.batch_norm_propagate(*inputs, sums)
        return inward, branch if len(branch) else None, of_weight, of_bias, None, None, None, None


def _register(name: str, schema: str, simulate: Any) -> None:
    kernels = "pretrain.distributed.batch_norm_kernels"
    gpu_kernels.register(f"batch_norm_{name}{schema}", kernels, name, simulate)


def _of_channels(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


_register(
    "statistics",
    "(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum) -> (Tensor, Tensor)",
    lambda x, *_: (_of_channels(x), _of_channels(x)),
)
_register(
    "normalize",
    "(Tensor x, Tensor? residual, Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps, bool relu)"
    " -> Tensor",
    lambda x, *_: torch.empty_like(x),
)
_register(
    "sums",
    "(Tensor gradient, Tensor x, Tensor? y, Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps,"
    " bool relu) -> (Tensor, Tensor, Tensor)",
    lambda gradient, x, *_: (
        x.new_empty(2 * x.shape[1] + 1, dtype=torch.float32),
        _of_channels(x),
        _of_channels(x),
    ),
)
_register(
    "propagate",
    "(Tensor gradient, Tensor x, Tensor? y, Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps,"
    " bool relu, Tensor sums) -> (Tensor, Tensor)",
    lambda gradient, x, y, *_: (torch.empty_like(x), x.new_empty(0) if y is None else torch.empty_like(x)),
)
