"""The device's part of a view (`augment.py`) as four Triton kernels, which read and write the images a few times.

Each of PyTorch's operations passes over all images once, which is some hundred passes for a view. Here one program
computes the colour jitter of some pixels of one image in registers. An operation that needs other pixels starts a new
kernel: the mean grey that the contrast is blended with, and the blur along each axis. Triton comes with PyTorch's
builds for GPUs. The tests compare the kernels with their reference, `augment.py`.
"""

# Triton's functions take pointers and compile-time constants, for which Python has no types.
# ruff: noqa: ANN001, ANN202
# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.batches import augment as reference
from pretrain.batches.draws import Param

PIXELS = 1024  # of one program
GRAY_RED, GRAY_GREEN, GRAY_BLUE = map(tl.constexpr, reference.GRAY_WEIGHTS)
SOLARIZE_THRESHOLD = tl.constexpr(reference.SOLARIZE_THRESHOLD)
BRIGHTNESS, CONTRAST, SATURATION = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # else hue
# Columns of the table: those of `Param`, and then the number of the adjustment at each of the four places, -1 for none.
FLIP, FACTORS = tl.constexpr(int(Param.FLIP)), tl.constexpr(int(Param.BRIGHTNESS))
GRAY, BLUR_SIGMA, SOLARIZE = (tl.constexpr(int(p)) for p in (Param.GRAY, Param.BLUR_SIGMA, Param.SOLARIZE))
ORDER, COLUMNS = tl.constexpr(len(Param)), tl.constexpr(len(Param) + 4)


def augment(images: Tensor, table: Tensor, mean: Tensor, std: Tensor, result: Tensor, radius: int) -> None:
    """Apply the operations.

    Args:
        images: (N, 3, H, W) uint8, contiguous, on the GPU, as all others.
        table: (N, COLUMNS) float32, of `augment.table_of`.
        mean, std: (3,) float32.
        result: (N, 3, H, W) in channels-last memory, of any floating type; it is filled.
        radius: pixels on each side that a blurred pixel depends on.
    """
    count, _, height, width = images.shape
    pixels = height * width
    blocks = triton.cdiv(pixels, PIXELS)
    sums = torch.empty(count, blocks, device=images.device)
    coloured, blurred = (torch.empty(images.shape, device=images.device) for _ in range(2))
    grid = (count, blocks)
    _sum_grey[grid](images, table, sums, pixels, PIXELS)
    _colour[grid](images, table, sums, coloured, width, pixels, blocks, triton.next_power_of_2(blocks), PIXELS)
    _blur_down[grid](coloured, table, blurred, height, width, min(radius, height - 1), PIXELS)
    _finish[grid](coloured, blurred, table, mean, std, result, width, pixels, min(radius, width - 1), PIXELS)


@triton.jit
def _sum_grey(images, table, sums, pixels, block: tl.constexpr):
    """The sum of the grey values that the contrast is blended with, over a program's pixels: sums (N, blocks)."""
    image = tl.program_id(0)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < pixels
    red, green, blue = _load(images + image * 3 * pixels + at, pixels, inside)
    row = table + image * COLUMNS
    before = 1  # the contrast
    for place in tl.static_range(4):
        adjustment = tl.load(row + ORDER + place)
        before = tl.where(adjustment == CONTRAST, 0, before)
        if before == 1:
            red, green, blue = _adjust(red, green, blue, adjustment, row, 0.0)
    total = tl.sum(tl.where(inside, _grey(red, green, blue), 0.0), axis=0)
    tl.store(sums + image * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit
def _colour(images, table, sums, result, width, pixels, blocks, most_blocks: tl.constexpr, block: tl.constexpr):
    """Flip, jitter, grey: images uint8 -> result float32, both (N, 3, H, W)."""
    image = tl.program_id(0)
    row = table + image * COLUMNS
    numbers = tl.arange(0, most_blocks)
    mean = tl.sum(tl.load(sums + image * blocks + numbers, numbers < blocks, 0.0), axis=0) / pixels
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < pixels
    column = at % width
    source = tl.where(tl.load(row + FLIP) > 0, at - column + (width - 1 - column), at)
    red, green, blue = _load(images + image * 3 * pixels + source, pixels, inside)
    for place in tl.static_range(4):
        adjustment = tl.load(row + ORDER + place)
        red, green, blue = _adjust(red, green, blue, adjustment, row, mean)
    if tl.load(row + GRAY) > 0:
        red = _grey(red, green, blue)
        green, blue = red, red
    to = result + image * 3 * pixels + at
    tl.store(to, red, inside)
    tl.store(to + pixels, green, inside)
    tl.store(to + 2 * pixels, blue, inside)


@triton.jit
def _blur_down(images, table, result, height, width, radius: tl.constexpr, block: tl.constexpr):
    """The blur along columns, of images that are blurred: float32 -> float32, both (N, 3, H, W)."""
    image = tl.program_id(0)
    sigma = tl.load(table + image * COLUMNS + BLUR_SIGMA)
    if sigma > 0:
        at = tl.program_id(1) * block + tl.arange(0, block)
        inside = at < height * width
        line, column = at // width, at % width
        for channel in tl.static_range(3):
            plane = (image * 3 + channel) * height * width
            total = tl.zeros([block], tl.float32)
            for tap in tl.static_range(2 * radius + 1):
                near = _reflect(line + (tap - radius), height)
                value = tl.load(images + plane + near * width + column, inside, 0.0)
                total += _weight(tap - radius, sigma) * value
            tl.store(result + plane + at, total / _sum_of_weights(radius, sigma), inside)


@triton.jit
def _finish(coloured, blurred, table, mean, std, result, width, pixels, radius: tl.constexpr, block: tl.constexpr):
    """The blur along lines, solarize, normalise: (N, 3, H, W) -> result in channels-last memory."""
    image = tl.program_id(0)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < pixels
    column = at % width
    row = table + image * COLUMNS
    sigma = tl.load(row + BLUR_SIGMA)
    threshold = tl.where(tl.load(row + SOLARIZE) > 0, SOLARIZE_THRESHOLD, 2.0)  # all values are below 2
    for channel in tl.static_range(3):
        plane = (image * 3 + channel) * pixels
        if sigma > 0:
            value = tl.zeros([block], tl.float32)
            for tap in tl.static_range(2 * radius + 1):
                near = at - column + _reflect(column + (tap - radius), width)
                value += _weight(tap - radius, sigma) * tl.load(blurred + plane + near, inside, 0.0)
            value = value / _sum_of_weights(radius, sigma)
        else:
            value = tl.load(coloured + plane + at, inside, 0.0)
        value = tl.where(value >= threshold, 1 - value, value)
        value = (value - tl.load(mean + channel)) / tl.load(std + channel)
        tl.store(result + (image * pixels + at) * 3 + channel, value.to(result.dtype.element_ty), inside)


@triton.jit
def _load(at, pixels, inside):
    """Red, green and blue in [0, 1] of pixels of a (3, H, W) uint8 image."""
    red = tl.div_rn(tl.load(at, inside, 0).to(tl.float32), 255.0)
    green = tl.div_rn(tl.load(at + pixels, inside, 0).to(tl.float32), 255.0)
    blue = tl.div_rn(tl.load(at + 2 * pixels, inside, 0).to(tl.float32), 255.0)
    return red, green, blue


@triton.jit
def _grey(red, green, blue):
    """Luma of RGB values."""
    return red * GRAY_RED + green * GRAY_GREEN + blue * GRAY_BLUE


@triton.jit
def _clamp(x):
    """Limit values to [0, 1]."""
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _adjust(red, green, blue, adjustment, row, mean):
    """One adjustment of the jitter, by its number; below 0: none. mean: the image's grey before the contrast."""
    if adjustment == BRIGHTNESS:
        factor = tl.load(row + FACTORS + BRIGHTNESS)
        red, green, blue = _clamp(red * factor), _clamp(green * factor), _clamp(blue * factor)
    elif adjustment == CONTRAST:
        factor = tl.load(row + FACTORS + CONTRAST)
        base = mean * (1 - factor)
        red, green, blue = _clamp(red * factor + base), _clamp(green * factor + base), _clamp(blue * factor + base)
    elif adjustment == SATURATION:
        factor = tl.load(row + FACTORS + SATURATION)
        base = _grey(red, green, blue) * (1 - factor)
        red, green, blue = _clamp(red * factor + base), _clamp(green * factor + base), _clamp(blue * factor + base)
    elif adjustment >= 0:
        red, green, blue = _rotate_hue(red, green, blue, tl.load(row + FACTORS + 3))
    return red, green, blue


@triton.jit
def _rotate_hue(red, green, blue, turns):
    """Rotate the hue by `turns` of the colour circle, at constant HSV saturation and value.

    It has no branches and, unlike `augment.adjust_hue`, no loop. In sixths of the circle, where red is 0, green 2 and
    blue -2, the distance to red is e + f (3 - 2 e) with e = |green - blue| / chroma and f = (value - red) / chroma: of
    the three sextants between red and cyan, f is 0 in the first, e is 1 in the second and f is 1 in the last.
    """
    value = tl.maximum(tl.maximum(red, green), blue)
    chroma = value - tl.minimum(tl.minimum(red, green), blue)
    scale = 1.0 / tl.maximum(chroma, 1e-12)
    difference = green - blue
    e, f = tl.abs(difference * scale), (value - red) * scale
    hue = e + f * (3 - 2 * e)
    hue = tl.where(difference < 0, -hue, hue) + 6 * turns
    return _channel(hue, value, chroma), _channel(hue - 2, value, chroma), _channel(hue + 2, value, chroma)


@triton.jit
def _channel(distance, value, chroma):
    """A channel, by the distance of the hue from the channel's own, perhaps the long way round."""
    distance = tl.abs(distance)
    distance = tl.minimum(distance, tl.abs(distance - 6))
    return value - _clamp(distance - 1) * chroma


@triton.jit
def _reflect(position, length):
    """Reflect positions beyond either end of an axis."""
    return (length - 1) - tl.abs((length - 1) - tl.abs(position))


@triton.jit
def _weight(offset, sigma):
    """Weight of the Gaussian kernel at an offset, not normalised."""
    ratio = offset / sigma
    return tl.exp(-0.5 * ratio * ratio)


@triton.jit
def _sum_of_weights(radius: tl.constexpr, sigma):
    total = 0.0
    for tap in tl.static_range(2 * radius + 1):
        total += _weight(tap - radius, sigma)
    return total
