"""BatchNorm with its ReLU and the sum with the residual branch as Triton kernels, on maps in channels-last memory.

PyTorch's kernels for bfloat16 take more time in a ResNet than its convolutions (docs/benchmarks.md). Training is bound
by memory there, so these kernels read and write each activation as rarely as possible: forward they read a map once
for the statistics, and once to normalise it, add the residual branch and apply the ReLU. Backward they read the map
and the gradient twice; whether the ReLU passed a value is recomputed, or read from the output where a residual branch
was added.

A map (N, C, H, W) in channels-last memory is a matrix of N H W rows and C columns. Sums over the rows are computed in
parts, which a second kernel combines, so the result does not depend on the order in which programs run.
"""

# Triton's functions take pointers and compile-time constants, for which Python has no types.
# ruff: noqa: ANN001, ANN202
# mypy: ignore-errors

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements that a program holds at a time
MOST_COLUMNS = 128  # of a tile
TILES = 4  # of a program that normalises or propagates
PROGRAMS = 8  # of a reduction, for each multiprocessor
PARTS, COLUMNS = 64, 16  # of a tile of `_combine_*`
WARPS = 8
# How the gradient passes the ReLU.
NO_RELU, RECOMPUTED, FROM_OUTPUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, and the update of the running statistics.

    Args:
        x: (N, C, H, W) in channels-last memory, on the GPU, as all others.
        running_mean, running_var: (C,) float32, changed in place; None: not kept.
        momentum: weight of the new values.

    Returns:
        mean, variance: (C,) float32.
    """
    rows, channels = _shape(x)
    block, columns = _tile(channels)
    parts, rows_each = _parts(x, rows, channels)
    partial = x.new_empty(parts, 2, channels, dtype=torch.float32)
    mean, variance = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    grid = parts, triton.cdiv(channels, columns)
    _partial_statistics[grid](x, partial, rows, channels, rows_each, block, columns, num_warps=WARPS)
    keeps = running_mean is not None
    running = (running_mean, running_var) if keeps else (mean, variance)
    _combine_statistics[(triton.cdiv(channels, COLUMNS),)](
        partial, mean, variance, *running, rows, channels, rows_each, parts, momentum, keeps, PARTS, COLUMNS
    )
    return mean, variance


def normalize(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, plus the residual branch, with or without ReLU.

    Args:
        x: (N, C, H, W) in channels-last memory.
        residual: as x, or None.
        mean, variance, weight, bias: (C,) float32.

    Returns:
        as x.
    """
    rows, channels = _shape(x)
    block, columns = _tile(channels)
    y = torch.empty_like(x)
    adds = residual is not None
    rows_each = TILES * block
    grid = triton.cdiv(rows, rows_each), triton.cdiv(channels, columns)
    of_channels = mean, variance, weight, bias
    branch = residual if adds else x
    _normalize[grid](
        x, branch, *of_channels, y, rows, channels, rows_each, eps, adds, relu, block, columns, num_warps=WARPS
    )
    return y


def sums(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward pass needs to know of all rows.

    Args:
        gradient: of the output, as x.
        y: the output, where a residual branch was added; else None.

    Returns:
        sums: (2 C + 1,) float32: the sums over the rows of g and of g * (x - mean) for each channel, where g is the
            gradient before the ReLU, which may be added over processes, and the number of rows.
        of_weight, of_bias: (C,) float32, the gradients of weight and bias.
    """
    rows, channels = _shape(x)
    block, columns = _tile(channels)
    parts, rows_each = _parts(x, rows, channels)
    partial = x.new_empty(parts, 2, channels, dtype=torch.float32)
    total = x.new_empty(2 * channels + 1, dtype=torch.float32)
    of_weight, of_bias = (torch.empty_like(weight) for _ in range(2))
    of_channels = mean, variance, weight, bias
    mode, output = _mode(relu, y, x)
    shape = rows, channels, rows_each
    _partial_sums[parts, triton.cdiv(channels, columns)](
        gradient, x, output, *of_channels, partial, *shape, eps, mode, block, columns, num_warps=WARPS
    )
    _combine_sums[(triton.cdiv(channels, COLUMNS),)](
        partial, variance, total, of_weight, of_bias, rows, channels, parts, eps, PARTS, COLUMNS
    )
    return total, of_weight, of_bias


def propagate(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
    total: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the residual branch, each as x; the second is empty if y is None.

    Args:
        total: `sums`, with those of all processes.
    """
    rows, channels = _shape(x)
    block, columns = _tile(channels)
    inward = torch.empty_like(x)
    mode, output = _mode(relu, y, x)
    adds = y is not None
    branch = torch.empty_like(x) if adds else x.new_empty(0)
    of_channels = mean, variance, weight, bias
    rows_each = TILES * block
    grid = triton.cdiv(rows, rows_each), triton.cdiv(channels, columns)
    _propagate[grid](
        gradient,
        x,
        output,
        *of_channels,
        total,
        inward,
        branch if adds else inward,
        rows,
        channels,
        rows_each,
        eps,
        adds,
        mode,
        block,
        columns,
        num_warps=WARPS,
    )
    return inward, branch


def _shape(x: Tensor) -> tuple[int, int]:
    """Rows and channels."""
    return x.numel() // x.shape[1], x.shape[1]


def _tile(channels: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    columns = min(triton.next_power_of_2(channels), MOST_COLUMNS)
    return TILE // columns, columns


def _parts(x: Tensor, rows: int, channels: int) -> tuple[int, int]:
    """Into how many parts a sum over the rows is divided, and the rows of each but the last. No part is empty."""
    block, columns = _tile(channels)
    wanted = max(1, PROGRAMS * _multiprocessors(x.device) // triton.cdiv(channels, columns))
    rows_each = block * triton.cdiv(rows, block * wanted)
    return triton.cdiv(rows, rows_each), rows_each


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # On a CPU, where Triton interprets the kernels, any small number.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _mode(relu: bool, y: Tensor | None, x: Tensor) -> tuple[int, Tensor]:
    """How the gradient passes the ReLU, and the output, or anything in its place."""
    if not relu:
        return NO_RELU.value, x
    return (RECOMPUTED.value, x) if y is None else (FROM_OUTPUT.value, y)


@triton.jit
def _partial_statistics(x, partial, rows, channels, rows_each, block: tl.constexpr, columns: tl.constexpr):
    """Of each part: mean and sum of squared differences from it, partial (parts, 2, C)."""
    part = tl.program_id(0)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    first = part * rows_each
    last = tl.minimum(first + rows_each, rows)
    # Differences from the first row's values: sums of squares lose no digits where the mean is large.
    shift = tl.load(x + first.to(tl.int64) * channels + column, column < channels, 0.0).to(tl.float32)
    total = tl.zeros([block, columns], tl.float32)
    squares = tl.zeros([block, columns], tl.float32)
    for start in range(first, last, block):
        at, inside = _place(start, last, channels, column, block)
        value = tl.load(x + at, inside, 0.0).to(tl.float32) - shift[None, :]
        value = tl.where(inside, value, 0.0)
        total += value
        squares += value * value
    count = (last - first).to(tl.float32)
    difference = tl.sum(total, axis=0) / count
    to = partial + part * 2 * channels + column
    tl.store(to, shift + difference, column < channels)
    tl.store(to + channels, tl.sum(squares, axis=0) - difference * difference * count, column < channels)


@triton.jit
def _combine_statistics(
    partial,
    mean,
    variance,
    running_mean,
    running_var,
    rows,
    channels,
    rows_each,
    parts,
    momentum,
    keeps: tl.constexpr,
    some: tl.constexpr,
    columns: tl.constexpr,
):
    """Mean and variance of all rows from those of the parts (Chan et al. 1979)."""
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    total = tl.zeros([some, columns], tl.float32)
    for start in range(0, parts, some):
        number, at, inside = _part(start, parts, channels, column, some)
        count = tl.minimum(rows - number * rows_each, rows_each).to(tl.float32)
        total += tl.load(partial + at, inside, 0.0) * count[:, None]
    average = tl.sum(total, axis=0) / rows
    squares = tl.zeros([some, columns], tl.float32)
    for start in range(0, parts, some):
        number, at, inside = _part(start, parts, channels, column, some)
        count = tl.minimum(rows - number * rows_each, rows_each).to(tl.float32)
        difference = tl.load(partial + at, inside, 0.0) - average[None, :]
        difference = tl.where(inside, difference, 0.0)
        squares += tl.load(partial + at + channels, inside, 0.0) + difference * difference * count[:, None]
    square = tl.maximum(tl.sum(squares, axis=0), 0.0, propagate_nan=tl.PropagateNan.ALL)
    within = column < channels
    tl.store(mean + column, average, within)
    tl.store(variance + column, square / rows, within)
    if keeps:
        old = tl.load(running_mean + column, within, 0.0)
        tl.store(running_mean + column, old * (1 - momentum) + average * momentum, within)
        old = tl.load(running_var + column, within, 0.0)
        unbiased = square / tl.maximum(rows - 1, 1)
        tl.store(running_var + column, old * (1 - momentum) + unbiased * momentum, within)


@triton.jit
def _normalize(
    x,
    residual,
    mean,
    variance,
    weight,
    bias,
    y,
    rows,
    channels,
    rows_each,
    eps,
    adds: tl.constexpr,
    relu: tl.constexpr,
    block: tl.constexpr,
    columns: tl.constexpr,
):
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    average, inverse, slope, offset = _channels(mean, variance, weight, bias, column, channels, eps)
    first = tl.program_id(0) * rows_each
    last = tl.minimum(first + rows_each, rows)
    for start in range(first, last, block):
        at, inside = _place(start, last, channels, column, block)
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        value = (value - average[None, :]) * (inverse * slope)[None, :] + offset[None, :]
        if adds:
            value += tl.load(residual + at, inside, 0.0).to(tl.float32)
        if relu:
            value = tl.where(value <= 0, 0.0, value)  # NaN stays NaN, so that the step is found to be bad
        tl.store(y + at, value.to(y.dtype.element_ty), inside)


@triton.jit
def _partial_sums(
    gradient,
    x,
    y,
    mean,
    variance,
    weight,
    bias,
    partial,
    rows,
    channels,
    rows_each,
    eps,
    mode: tl.constexpr,
    block: tl.constexpr,
    columns: tl.constexpr,
):
    """Of each part: the sums of g and of g * (x - mean), partial (parts, 2, C)."""
    part = tl.program_id(0)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    average, inverse, slope, offset = _channels(mean, variance, weight, bias, column, channels, eps)
    first = part * rows_each
    last = tl.minimum(first + rows_each, rows)
    total = tl.zeros([block, columns], tl.float32)
    products = tl.zeros([block, columns], tl.float32)
    for start in range(first, last, block):
        at, inside = _place(start, last, channels, column, block)
        value = tl.load(x + at, inside, 0.0).to(tl.float32) - average[None, :]
        passed = _before_relu(gradient, y, at, inside, value, inverse * slope, offset, mode)
        total += passed
        products += passed * value
    to = partial + part * 2 * channels + column
    tl.store(to, tl.sum(total, axis=0), column < channels)
    tl.store(to + channels, tl.sum(products, axis=0), column < channels)


@triton.jit
def _combine_sums(
    partial, variance, sums, of_weight, of_bias, rows, channels, parts, eps, some: tl.constexpr, columns: tl.constexpr
):
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    within = column < channels
    total = tl.zeros([some, columns], tl.float32)
    products = tl.zeros([some, columns], tl.float32)
    for start in range(0, parts, some):
        _, at, inside = _part(start, parts, channels, column, some)
        total += tl.load(partial + at, inside, 0.0)
        products += tl.load(partial + at + channels, inside, 0.0)
    gradient, product = tl.sum(total, axis=0), tl.sum(products, axis=0)
    tl.store(sums + column, gradient, within)
    tl.store(sums + channels + column, product, within)
    if tl.program_id(0) == 0:
        tl.store(sums + 2 * channels, tl.cast(rows, tl.float32))
    inverse = 1 / tl.sqrt(tl.load(variance + column, within, 1.0) + eps)
    tl.store(of_weight + column, product * inverse, within)
    tl.store(of_bias + column, gradient, within)


@triton.jit
def _propagate(
    gradient,
    x,
    y,
    mean,
    variance,
    weight,
    bias,
    sums,
    inward,
    branch,
    rows,
    channels,
    rows_each,
    eps,
    adds: tl.constexpr,
    mode: tl.constexpr,
    block: tl.constexpr,
    columns: tl.constexpr,
):
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    average, inverse, slope, offset = _channels(mean, variance, weight, bias, column, channels, eps)
    within = column < channels
    count = tl.load(sums + 2 * channels)
    mean_gradient = tl.load(sums + column, within, 0.0) / count
    mean_product = tl.load(sums + channels + column, within, 0.0) / count
    first = tl.program_id(0) * rows_each
    last = tl.minimum(first + rows_each, rows)
    for start in range(first, last, block):
        at, inside = _place(start, last, channels, column, block)
        value = tl.load(x + at, inside, 0.0).to(tl.float32) - average[None, :]
        passed = _before_relu(gradient, y, at, inside, value, inverse * slope, offset, mode)
        if adds:
            tl.store(branch + at, passed.to(branch.dtype.element_ty), inside)
        # g - mean(g) - (x - mean) * mean(g * (x - mean)) / (variance + eps), for each channel
        passed -= mean_gradient[None, :] + value * (mean_product * inverse * inverse)[None, :]
        tl.store(inward + at, (passed * (inverse * slope)[None, :]).to(inward.dtype.element_ty), inside)


@triton.jit
def _before_relu(gradient, y, at, inside, value, scale, offset, mode: tl.constexpr):
    """The gradient of the ReLU's input: zero where the output is zero."""
    passed = tl.load(gradient + at, inside, 0.0).to(tl.float32)
    if mode == RECOMPUTED:
        passed = tl.where(value * scale[None, :] + offset[None, :] <= 0, 0.0, passed)
    if mode == FROM_OUTPUT:
        passed = tl.where(tl.load(y + at, inside, 0.0).to(tl.float32) <= 0, 0.0, passed)
    return passed


@triton.jit
def _channels(mean, variance, weight, bias, column, channels, eps):
    """Mean, 1 / sqrt(variance + eps), weight and bias of some channels."""
    within = column < channels
    inverse = 1 / tl.sqrt(tl.load(variance + column, within, 1.0) + eps)
    average = tl.load(mean + column, within, 0.0)
    return average, inverse, tl.load(weight + column, within, 0.0), tl.load(bias + column, within, 0.0)


@triton.jit
def _place(start, last, channels, column, block: tl.constexpr):
    """Where the elements of a tile are, and which of them exist. A matrix may have more than 2^31 elements."""
    row = tl.arange(0, block)
    inside = (row[:, None] < last - start) & (column[None, :] < channels)
    return tl.cast(start, tl.int64) * channels + (row[:, None] * channels + column[None, :]), inside


@triton.jit
def _part(start, parts, channels, column, some: tl.constexpr):
    """Numbers of some parts, where they are in (parts, 2, C), and which of their elements exist."""
    number = start + tl.arange(0, some)
    inside = (number[:, None] < parts) & (column[None, :] < channels)
    return number, number[:, None] * (2 * channels) + column[None, :], inside
