"""BatchNorm over the images of all processes, with one all-reduce of each layer forward and one backward.

N processes compute what one process with the whole batch computes: outputs, gradients and running statistics, even if
the processes hold different numbers of images. PyTorch's SyncBatchNorm runs only on GPUs. It gathers the statistics of
all processes and selects among them on the host, which waits for the GPU in each layer.

Each process contributes its count, mean and variance as the sums of 1, x and x^2. They are added in float64, so that
their difference, the variance, has the precision of float32 even where the mean is large.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm1d or BatchNorm2d whose batch is that of all processes. Same parameters, buffers and arguments."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C, ...), normalised; in eval mode by the running statistics."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        count, mean, variance = _global_statistics(input.detach(), self.eps)
        if self.track_running_stats:
            self._update(count, mean, variance)
        return _Normalize.apply(input, self.weight, self.bias, count, mean, variance, self.eps)

    @torch.no_grad()
    def _update(self, count: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics as `F.batch_norm` does: with the unbiased variance."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1).clamp_min(1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            assert running is not None
            running.copy_(running * (1 - momentum) + new * momentum)


class _Normalize(torch.autograd.Function):
    """Normalisation by statistics that depend on the inputs of all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        count: Tensor,
        mean: Tensor,
        variance: Tensor,
        eps: float,
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        inverse = (variance + eps).rsqrt().to(dtype)
        mean = mean.to(dtype)
        ctx.save_for_backward(x, weight, mean, inverse, count)
        return F.batch_norm(x, mean, variance.to(dtype), weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        if x.is_cuda:  # the kernels are fast where both have one memory format
            last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
            gradient = gradient.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        own = _sums_on_gpu(gradient, x, mean, inverse, weight) if x.is_cuda else _sums(gradient, x, mean)
        sums = torch.stack(own)
        dist.all_reduce(sums)
        if x.is_cuda:
            inward = torch.batch_norm_backward_elemt(
                gradient, x, mean, inverse, weight, sums[0], sums[1], count.to(torch.int32).view(1)
            )
        else:
            scale = inverse if weight is None else weight * inverse
            mean_gradient, mean_product = sums / count.to(sums.dtype)
            # gradient - mean(gradient) - (x - mean) * mean(gradient * (x - mean)) / variance, for each channel
            slope = _by_channel(mean_product * inverse.square(), x)
            inward = gradient.to(sums.dtype) - (x.to(sums.dtype) - _by_channel(mean, x)) * slope
            inward = ((inward - _by_channel(mean_gradient, x)) * _by_channel(scale, x)).to(x.dtype)
        if weight is None:
            return inward, None, None, None, None, None, None
        return inward, (own[1] * inverse).to(weight.dtype), own[0].to(weight.dtype), None, None, None, None


def _sums(gradient: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the gradient, and of gradient * (x - mean), for each channel (C,) of this process."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    gradient = gradient.to(mean.dtype)
    return gradient.sum(axes), (gradient * (x.to(mean.dtype) - _by_channel(mean, x))).sum(axes)


def _sums_on_gpu(gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same with PyTorch's kernel, in one pass."""
    return torch.batch_norm_backward_reduce(gradient, x, mean, inverse, weight, True, False, False)[:2]


def _global_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Count (scalar), mean and biased variance (C,) over all processes, in float64. One all-reduce."""
    if x.is_cuda:
        mean, inverse = (part.double() for part in torch.batch_norm_stats(x, eps))
        variance = inverse.pow(-2) - eps
    else:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = (part.double() for part in torch.var_mean(exact, axes, correction=0))
    count = x.numel() // x.shape[1]
    sums = torch.cat([mean.new_full((1,), count), mean * count, (variance + mean.square()) * count])
    dist.all_reduce(sums)
    mean, square = (sums[1:] / sums[0]).chunk(2)
    return sums[0], mean, (square - mean.square()).clamp_min(0)


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, ...), as many dimensions as x."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def convert(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm in a module, in place, by one over all processes. Returns the module.

    Parameters and buffers stay the same objects, which an optimizer may hold.
    """
    for name, child in module.named_children():
        if not isinstance(child, _BatchNorm):
            convert(child)
            continue
        norm = GlobalBatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
        norm._parameters, norm._buffers = child._parameters, child._buffers
        norm.train(child.training)
        setattr(module, name, norm)
    return module
