"""Max-pooling with kernels of 3 x 3, a stride of 2 and a padding of 1, as Triton kernels on channels-last memory.

A window's place of the maximum is a number from 0 to 8, row by row: the first of equal ones, as PyTorch has it.
"""

# Triton's functions take pointers and compile-time constants, for which Python has no types.
# ruff: noqa: ANN001, ANN202
# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements of a program
MOST_COLUMNS = 128  # channels of a program
WARPS = 4


def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima and their places.

    Args:
        x: (N, C, H, W) in channels-last memory.

    Returns:
        y: (N, C, (H + 1) // 2, (W + 1) // 2), as x.
        places: as y, uint8.
    """
    count, channels, height, width = x.shape
    sides = (height + 1) // 2, (width + 1) // 2
    y = _empty_as(x, count, channels, *sides)
    places = torch.empty_like(y, dtype=torch.uint8)
    rows = count * sides[0] * sides[1]
    grid, block, columns = _grid(rows, channels)
    _pool[grid](x, y, places, rows, channels, height, width, *sides, block, columns, num_warps=WARPS)
    return y, places


def max_pool_backward(gradient: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    """The gradient (N, C, H, W) of the input, from that of the output; both in channels-last memory."""
    count, channels, *sides = gradient.shape
    inward = _empty_as(gradient, count, channels, height, width)
    rows = count * height * width
    grid, block, columns = _grid(rows, channels)
    _propagate[grid](gradient, places, inward, rows, channels, height, width, *sides, block, columns, num_warps=WARPS)
    return inward


def _empty_as(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _grid(rows: int, channels: int) -> tuple[tuple[int, int], int, int]:
    """The programs, and the rows and columns of each."""
    columns = min(triton.next_power_of_2(channels), MOST_COLUMNS)
    block = TILE // columns
    return (triton.cdiv(rows, block), triton.cdiv(channels, columns)), block, columns


@triton.jit
def _pool(
    x,
    y,
    places,
    rows,
    channels,
    height,
    width,
    out_height,
    out_width,
    block: tl.constexpr,
    columns: tl.constexpr,
):
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    row = tl.program_id(0) * block + tl.arange(0, block)
    within = (row[:, None] < rows) & (column[None, :] < channels)
    image, at = row // (out_height * out_width), row % (out_height * out_width)
    top, left = 2 * (at // out_width) - 1, 2 * (at % out_width) - 1
    most = tl.full([block, columns], float("-inf"), tl.float32)
    place = tl.zeros([block, columns], tl.int32)
    for tap in tl.static_range(9):
        line, across = top + tap // 3, left + tap % 3
        exists = (line >= 0) & (line < height) & (across >= 0) & (across < width)
        start = tl.cast((image * height + line) * width + across, tl.int64) * channels
        value = tl.load(x + start[:, None] + column[None, :], within & exists[:, None], float("-inf")).to(tl.float32)
        larger = (value > most) | (value != value)  # NaN is passed on
        most = tl.where(larger, value, most)
        place = tl.where(larger, tap, place)
    to = tl.cast(row, tl.int64)[:, None] * channels + column[None, :]
    tl.store(y + to, most.to(y.dtype.element_ty), within)
    tl.store(places + to, place.to(tl.uint8), within)


@triton.jit
def _propagate(
    gradient,
    places,
    inward,
    rows,
    channels,
    height,
    width,
    out_height,
    out_width,
    block: tl.constexpr,
    columns: tl.constexpr,
):
    """A pixel in an odd line is in the windows of two lines, one in an even line in those of one; likewise columns."""
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    row = tl.program_id(0) * block + tl.arange(0, block)
    within = (row[:, None] < rows) & (column[None, :] < channels)
    image, at = row // (height * width), row % (height * width)
    line, across = at // width, at % width
    total = tl.zeros([block, columns], tl.float32)
    for window in tl.static_range(4):
        out_line, out_across = (line + 1) // 2 - window // 2, (across + 1) // 2 - window % 2
        tap_line, tap_across = line - (2 * out_line - 1), across - (2 * out_across - 1)
        exists = (out_line >= 0) & (out_line < out_height) & (out_across >= 0) & (out_across < out_width)
        exists = exists & (tap_line < 3) & (tap_across < 3)
        start = tl.cast((image * out_height + out_line) * out_width + out_across, tl.int64) * channels
        there = within & exists[:, None]
        place = tl.load(places + start[:, None] + column[None, :], there, 255).to(tl.int32)
        value = tl.load(gradient + start[:, None] + column[None, :], there, 0.0).to(tl.float32)
        total += tl.where(place == (3 * tap_line + tap_across)[:, None], value, 0.0)
    to = tl.cast(row, tl.int64)[:, None] * channels + column[None, :]
    tl.store(inward + to, total.to(inward.dtype.element_ty), within)
