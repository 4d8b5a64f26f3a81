"""Convolutions with an output of a few pixels, as matrix products: on a CPU several times as fast as PyTorch's.

With views of 32 to 48 pixels the last stages of a ResNet have maps of 1 x 1 to 3 x 3 pixels. There most products of a
3 x 3 kernel are with padding: 8 of 9 on one pixel, 5 of 9 on 2 x 2, 32 of 81 on 3 x 3. oneDNN computes all of them;
here each matrix product has only the taps that meet a pixel (`benchmarks/convolution.py`, docs/benchmarks.md).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MAX_PIXELS = 9  # of an output map: above, PyTorch's convolution is faster (docs/benchmarks.md)


class SmallMapConv2d(nn.Conv2d):
    """`nn.Conv2d` with matrix products where the output map is small and on a CPU: the same function, up to rounding.

    It takes weight, stride and padding of a layer with square kernels, zero padding, one group, no dilation, no bias,
    and has the same names in a state_dict.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        size, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        super().__init__(layer.in_channels, layer.out_channels, size, stride, padding, bias=False, device="meta")
        self.weight = layer.weight

    def forward(self, images: Tensor) -> Tensor:
        """Maps (N, C, H, W) -> (N, O, H', W'), in autocast's dtype where it is enabled."""
        if images.device.type != "cpu":
            return super().forward(images)
        rows, columns = _axes(images, self.weight, self.stride[0], int(self.padding[0]))
        if rows.outputs * columns.outputs > MAX_PIXELS:
            return super().forward(images)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            images, weight = images.to(dtype), weight.to(dtype)
        return _convolve(images, weight, self.stride[0], int(self.padding[0]))


def use_matrix_products(encoder: nn.Module) -> None:
    """Replace convolutions of a torchvision ResNet in place by `SmallMapConv2d` with the same parameters.

    The first layer, whose maps are large, and 1 x 1 convolutions without stride, which are one matrix product already,
    stay what they are.
    """
    for parent in list(encoder.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Conv2d and layer.in_channels > 3 and (layer.kernel_size[0] > 1 or layer.stride[0] > 1):
                setattr(parent, name, SmallMapConv2d(layer))


class _Axis(NamedTuple):
    """One axis of a convolution: output o and tap t meet input o * stride + t - padding, where there is one."""

    inputs: int
    taps: int
    stride: int
    padding: int

    @property
    def outputs(self) -> int:
        return (self.inputs + 2 * self.padding - self.taps) // self.stride + 1

    def of_output(self, output: int) -> tuple[slice, slice]:
        """The taps that meet an input, and those inputs."""
        first = output * self.stride - self.padding
        start, stop = max(first, 0), min(first + self.taps, self.inputs)
        return slice(start - first, stop - first), slice(start, stop)

    def of_input(self, position: int) -> list[tuple[int, int]]:
        """The outputs that read an input, each with the tap that meets it."""
        pairs = ((output, position + self.padding - output * self.stride) for output in range(self.outputs))
        return [(output, tap) for output, tap in pairs if 0 <= tap < self.taps]

    def of_tap(self, tap: int) -> tuple[slice, slice]:
        """The outputs for which a tap meets an input, and those inputs. Both are empty where there are none."""
        met = [o for o in range(self.outputs) if 0 <= o * self.stride + tap - self.padding < self.inputs]
        if not met:
            return slice(0, 0), slice(0, 0)
        first, last = (output * self.stride + tap - self.padding for output in (met[0], met[-1]))
        return slice(met[0], met[-1] + 1), slice(first, last + 1, self.stride)


def _axes(images: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[_Axis, _Axis]:
    """Rows and columns of maps (N, C, H, W) under kernels (O, C, T, T)."""
    rows, columns = (_Axis(images.shape[i], weight.shape[i], stride, padding) for i in (2, 3))
    return rows, columns


# Operators of PyTorch's, so that torch.compile calls them as they are instead of tracing each product.
@torch.library.custom_op("corinfomax::small_map_conv2d", mutates_args=())
def _convolve(images: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Maps (N, C, H, W) and kernels (O, C, T, T) of one dtype -> maps (N, O, H', W'), channels last in memory."""
    rows, columns = _axes(images, weight, stride, padding)
    x, w = images.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)
    y = x.new_empty(len(x), rows.outputs, columns.outputs, len(w))
    for i in range(rows.outputs):
        taps_i, inputs_i = rows.of_output(i)
        for j in range(columns.outputs):
            taps_j, inputs_j = columns.of_output(j)
            window = x[:, inputs_i, inputs_j].flatten(1)
            y[:, i, j] = window @ w[:, taps_i, taps_j].reshape(len(w), -1).t()
    return y.permute(0, 3, 1, 2)


@torch.library.custom_op("corinfomax::small_map_conv2d_backward", mutates_args=())
def _gradients(grad: Tensor, images: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """Gradient (N, O, H', W') of the output -> gradients of the maps and of the kernels."""
    rows, columns = _axes(images, weight, stride, padding)
    g, x = grad.permute(0, 2, 3, 1), images.permute(0, 2, 3, 1)
    w = weight.permute(2, 3, 0, 1)  # (T, T, O, C)
    grad_x, grad_w = x.new_zeros(x.shape), weight.new_zeros(weight.permute(0, 2, 3, 1).shape)
    for i in range(rows.inputs):
        for j in range(columns.inputs):
            meetings = [(o, p, s, t) for o, s in rows.of_input(i) for p, t in columns.of_input(j)]
            if meetings:
                outer = torch.cat([g[:, o, p] for o, p, _, _ in meetings], dim=1)
                grad_x[:, i, j] = outer @ torch.cat([w[s, t] for _, _, s, t in meetings])
    for s in range(rows.taps):
        outputs_i, inputs_i = rows.of_tap(s)
        for t in range(columns.taps):
            outputs_j, inputs_j = columns.of_tap(t)
            outer = g[:, outputs_i, outputs_j].reshape(-1, g.shape[3])
            grad_w[:, s, t] = outer.t() @ x[:, inputs_i, inputs_j].reshape(-1, x.shape[3])
    return grad_x.permute(0, 3, 1, 2), grad_w.permute(0, 3, 1, 2)


@_convolve.register_fake
def _(images: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    rows, columns = _axes(images, weight, stride, padding)
    return images.new_empty(len(images), rows.outputs, columns.outputs, len(weight)).permute(0, 3, 1, 2)


@_gradients.register_fake
def _(grad: Tensor, images: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    def empty(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)

    return empty(images), empty(weight)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
    images, weight, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(images, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *_gradients(grad, *ctx.saved_tensors, ctx.stride, ctx.padding), None, None


_convolve.register_autograd(_differentiate, setup_context=_keep)
