"""BatchNorm of batches that hold several views, and of batches that are divided among several processes.

`ViewBatchNorm` normalises each view of a batch by itself, so that one forward pass of all views computes what one pass
of each computes. `GlobalBatchNorm` does so over the images of all processes, with one all-reduce of each layer forward
and one backward, whatever the number of views.

N processes compute what one process with the whole batch computes: outputs, gradients and running statistics, even if
the processes hold different numbers of images. PyTorch's SyncBatchNorm runs only on GPUs. It gathers the statistics of
all processes and selects among them on the host, which waits for the GPU in each layer.

Each process contributes its count, mean and variance as the sums of 1, x and x^2. They are added in float64, so that
their difference, the variance, has the precision of float32 even where the mean is large.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.distributed import batch_norm_gpu


class ViewBatchNorm(_BatchNorm):
    """BatchNorm1d or BatchNorm2d that normalises each view of a batch. Same parameters, buffers and arguments.

    It can do what follows it in a residual network too: add the other branch and apply ReLU. On a GPU this is one
    operation (`batch_norm_gpu.py`).

    Attributes:
        views: V in (V N, C, ...), the images of the first view before those of the second. Each updates the running
            statistics, in this order.
        counts: whether to count batches in `num_batches_tracked`. Where `momentum` is a number nothing depends on the
            count, and a network can add to the counts of all its layers at once.
    """

    views = 1
    counts = True

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or (self.training and len(input) % self.views):
            raise ValueError(f"expected (N, C, ...) with {self.views} views in N, got {tuple(input.shape)}")

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """(V N, C, ...) -> (V N, C, ...), normalised; in eval mode by the running statistics.

        Args:
            residual: as the input; is added to the result.
            relu: whether ReLU follows.
        """
        if not self.training:
            return add_and_activate(super().forward(input), residual, relu)
        self._check_input_dim(input)
        if self.counts and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(self.views)
        if self.views == 1 and batch_norm_gpu.should_use(self, input):
            return self._normalize_by_kernels(input, residual, relu)
        return add_and_activate(self._normalize(input), residual, relu)

    def _normalize_by_kernels(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        return batch_norm_gpu.normalize(self, x, residual, relu)

    def _normalize(self, x: Tensor) -> Tensor:
        if self.views > 1 and x.dim() == 4 and not x.is_cuda and not torch.compiler.is_compiling():
            running = self.running_mean, self.running_var
            return _NormalizeViews.apply(x, self.weight, self.bias, self.views, *running, self.momentum, self.eps)
        return _join([self._normalize_view(part) for part in self._split(x)])

    def _normalize_view(self, x: Tensor) -> Tensor:
        momentum: float = self.momentum  # type: ignore[assignment]
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps)

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        return x.chunk(self.views) if self.views > 1 else [x]


class _NormalizeViews(torch.autograd.Function):
    """Normalisation of each view by PyTorch's kernels for CPUs, which write into the one result.

    It takes less time than `torch.cat`, whose copies cost half of what the common pass of all views gains.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        views: int,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        result = torch.empty_like(x)
        statistics = x.new_empty(views, 2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        for part, out, (mean, inverse) in zip(x.chunk(views), result.chunk(views), statistics, strict=True):
            running = weight, bias, running_mean, running_var
            torch.native_batch_norm(part, *running, True, momentum, eps, out=(out, mean, inverse))
        ctx.save_for_backward(x, weight, statistics)
        ctx.views, ctx.eps = views, eps
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, statistics = ctx.saved_tensors
        inward = torch.empty_like(x)
        own: list[Any] = []
        parts = [each.chunk(ctx.views) for each in (gradient, x, inward)]
        for slope, part, out, (mean, inverse) in zip(*parts, statistics, strict=True):
            found = torch.ops.aten.native_batch_norm_backward(
                slope, part, weight, None, None, mean, inverse, True, ctx.eps, [True, *ctx.needs_input_grad[1:3]]
            )
            out.copy_(found[0])
            own.append(found[1:])
        of_weight, of_bias = (
            reduce(torch.add, each) if each[0] is not None else None for each in zip(*own, strict=True)
        )
        return inward, of_weight, of_bias, None, None, None, None, None


class GlobalBatchNorm(ViewBatchNorm):
    """`ViewBatchNorm` whose batch statistics are those of the images of all processes."""

    def _normalize_by_kernels(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        count, mean, variance = (each.float() for each in self._statistics([x.detach()]))
        return batch_norm_gpu.normalize(self, x, residual, relu, (mean[0], variance[0], count))

    def _normalize(self, x: Tensor) -> Tensor:
        count, mean, variance = self._statistics(self._split(x.detach()))
        return _NormalizeGlobally.apply(x, self.weight, self.bias, count, mean, variance, self.eps)

    def _statistics(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As `_global_statistics`; updates the running statistics."""
        count, mean, variance = _global_statistics(parts, self)
        if self.track_running_stats:
            for view in range(self.views):
                self._update(count[view], mean[view], variance[view])
        return count, mean, variance

    @torch.no_grad()
    def _update(self, count: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics as `F.batch_norm` does: with the unbiased variance."""
        assert self.num_batches_tracked is not None
        momentum = 1 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1).clamp_min(1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            assert running is not None
            running.copy_(running * (1 - momentum) + new * momentum)


class _NormalizeGlobally(torch.autograd.Function):
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
        """Statistics as `_global_statistics` gives them."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        inverse = (variance + eps).rsqrt().to(dtype)
        mean, variance = mean.to(dtype), variance.to(dtype)
        ctx.save_for_backward(x, weight, mean, inverse, count)
        parts = zip(x.chunk(len(mean)), mean, variance, strict=True)
        return _join([F.batch_norm(part, m, v, weight, bias, training=False, eps=eps) for part, m, v in parts])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        if x.is_cuda:  # the kernels are fast where both have one memory format
            last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
            gradient = gradient.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        views = len(mean)
        parts = list(zip(gradient.chunk(views), x.chunk(views), mean, inverse, strict=True))
        sum_up = _sums_on_gpu if x.is_cuda else _sums
        own = torch.stack([torch.stack(sum_up(*part, weight)) for part in parts])  # (V, 2, C)
        sums = own.clone()
        dist.all_reduce(sums)
        propagate = _inward_on_gpu if x.is_cuda else _inward
        inward = _join([propagate(*part, weight, *each) for part, *each in zip(parts, sums, count, strict=True)])
        if weight is None:
            return inward, None, None, None, None, None, None
        of_bias, products = own.unbind(1)
        of_weight = (products * inverse).sum(0)
        return inward, of_weight.to(weight.dtype), of_bias.sum(0).to(weight.dtype), None, None, None, None


def add_and_activate(x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Add a residual branch, if there is one, then apply ReLU, if asked for; in place."""
    if residual is not None:
        x += residual
    return F.relu(x, inplace=True) if relu else x


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _sums(gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of the gradient, and of gradient * (x - mean), for each channel (C,) of one view of this process."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    gradient = gradient.to(mean.dtype)
    return gradient.sum(axes), (gradient * (x.to(mean.dtype) - _by_channel(mean, x))).sum(axes)


def _sums_on_gpu(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same with PyTorch's kernel, in one pass."""
    return torch.batch_norm_backward_reduce(gradient, x, mean, inverse, weight, True, False, False)[:2]


def _inward(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> Tensor:
    """The gradient of one view's input, from the sums (2, C) over all processes and their number of values."""
    scale = inverse if weight is None else weight * inverse
    mean_gradient, mean_product = sums / count.to(sums.dtype)
    # gradient - mean(gradient) - (x - mean) * mean(gradient * (x - mean)) / variance, for each channel
    slope = _by_channel(mean_product * inverse.square(), x)
    inward = gradient.to(sums.dtype) - (x.to(sums.dtype) - _by_channel(mean, x)) * slope
    return ((inward - _by_channel(mean_gradient, x)) * _by_channel(scale, x)).to(x.dtype)


def _inward_on_gpu(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> Tensor:
    """The same with PyTorch's kernel."""
    counts = count.to(torch.int32).view(1)
    return torch.batch_norm_backward_elemt(gradient, x, mean, inverse, weight, sums[0], sums[1], counts)


def _global_statistics(parts: Sequence[Tensor], norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Count (V,), mean and biased variance (V, C) of V views over all processes, in float64. One all-reduce."""
    sums = torch.stack([_own_sums(part, norm) for part in parts])
    dist.all_reduce(sums)
    count = sums[:, :1]
    mean, square = (sums[:, 1:] / count).chunk(2, dim=1)
    return count[:, 0], mean, (square - mean.square()).clamp_min(0)


def _own_sums(x: Tensor, norm: _BatchNorm) -> Tensor:
    """The sums of 1, x and x^2 for one view of this process, (1 + 2 C,) in float64."""
    if batch_norm_gpu.should_use(norm, x):
        mean, variance = (part.double() for part in batch_norm_gpu.statistics(x))
    elif x.is_cuda:
        mean, inverse = (part.double() for part in torch.batch_norm_stats(x, norm.eps))
        variance = inverse.pow(-2) - norm.eps
    else:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = (part.double() for part in torch.var_mean(exact, axes, correction=0))
    count = x.numel() // x.shape[1]
    return torch.cat([mean.new_full((1,), count), mean * count, (variance + mean.square()) * count])


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, ...), as many dimensions as x."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def convert(module: nn.Module, kind: type[ViewBatchNorm] = GlobalBatchNorm, views: int | None = None) -> nn.Module:
    """Replace every BatchNorm in a module, in place, by one of another kind. Returns the module.

    Parameters and buffers stay the same objects, which an optimizer may hold.

    Args:
        views: in a batch; by default as many as the replaced layer has, or one.
    """
    for name, child in module.named_children():
        if not isinstance(child, _BatchNorm):
            convert(child, kind, views)
            continue
        norm = kind(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
        norm._parameters, norm._buffers = child._parameters, child._buffers
        norm.views = getattr(child, "views", 1) if views is None else views
        norm.counts = getattr(child, "counts", True)
        norm.train(child.training)
        setattr(module, name, norm)
    return module
