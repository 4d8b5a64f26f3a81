"""The part of a view that the training device computes: flip, colour jitter, grey, blur, solarize, normalise.

The operations are batched; the workers draw the parameters of each image (`views.py`). Each operation equals
torchvision's on floats (`torchvision.transforms.v2.functional`), and its uint8 version to 2/255. On a GPU with Triton
four kernels compute all of them (`augment_kernels.py`); the functions here are the reference, and run everywhere else.
"""

import logging
from collections.abc import Callable
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from foundation.devices import send
from pretrain.batches.draws import Param

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # thesis B.1.1
SOLARIZE_THRESHOLD = 128 / 255  # thesis B.1.1
BLUR_RADIUS = 6  # pixels: three standard deviations of the widest blur, 2 pixels
BLUR_BLOCK = 32  # pixels
CACHE_BYTES = 2**21  # of images that a CPU core works on at a time
GPU_BYTES = 2**28  # of images that a GPU works on at a time; intermediate results take several times that
ORDERS = np.array(list(permutations(range(4))))  # of the jitter


logger = logging.getLogger("pretrain")


def augment(images: Tensor, params: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Apply to each image the operations that its parameters name, in the order of torchvision's usual chain.

    Which images an operation changes is computed on the CPU, where the parameters are, so that the host never waits for
    a GPU. A CPU takes a few images at a time, which stay in its cache from the first operation to the last. A GPU takes
    some hundreds, so that the memory for intermediate results does not grow with the batch.

    Args:
        images: (N, 3, H, W) uint8, on the training device.
        params: (N, len(Param)) float32, on the CPU.
        mean: (3,) channel means in [0, 1], on the training device.
        std: (3,) channel standard deviations.
        dtype: of the result. Whatever it is, the operations are computed in float32.

    Returns:
        (N, 3, H, W) of `dtype`, normalised, in channels-last memory.
    """
    result = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    room = CACHE_BYTES * torch.get_num_threads() if images.device.type == "cpu" else GPU_BYTES
    count = max(room // (4 * images[0].numel()), 1)
    table = params.numpy()
    for start in range(0, len(images), count):
        part = slice(start, start + count)
        if images.device.type == "cuda" and _by_kernels(images[part], table[part], mean, std, result[part]):
            continue
        x = _photometric(images[part], table[part])
        result[part].copy_(x.sub_(mean[:, None, None]).div_(std[:, None, None]))
    return result


_kernels_work: dict[torch.device, bool] = {}  # by GPU, from the first attempt on


def _by_kernels(images: Tensor, params: np.ndarray, mean: Tensor, std: Tensor, result: Tensor) -> bool:
    """Fill the result with Triton's kernels. False where they cannot be used: the first attempt finds out."""
    if not _kernels_work.get(images.device, True):
        return False
    table = send(torch.from_numpy(table_of(params)), images.device)
    try:
        _launch(images.contiguous(), table, mean, std, result)
    except Exception as error:
        if _kernels_work.get(images.device) or isinstance(error, torch.OutOfMemoryError):
            raise
        if not isinstance(error, ImportError):  # PyTorch's builds for GPUs have Triton on Linux only
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            logger.warning("Triton cannot build the augmentation's kernels here, so it will be slower: %s", reason)
        _kernels_work[images.device] = False
        return False
    _kernels_work[images.device] = True
    return True


@torch.library.custom_op("corinfomax::augment", mutates_args=("result",), device_types="cuda")
def _launch(images: Tensor, table: Tensor, mean: Tensor, std: Tensor, result: Tensor) -> None:
    """The kernels as one operation of PyTorch, so that simulated GPUs know it too."""
    from pretrain.batches import augment_kernels

    with torch.cuda.device(images.device):
        augment_kernels.augment(images, table, mean, std, result, BLUR_RADIUS)


@_launch.register_fake
def _(images: Tensor, table: Tensor, mean: Tensor, std: Tensor, result: Tensor) -> None:
    """Nothing is computed on a simulated GPU."""


def table_of(params: np.ndarray) -> np.ndarray:
    """What the kernels need to know of each image: its parameters, then the number of the adjustment at each place.

    Args:
        params: (N, len(Param)).

    Returns:
        (N, len(Param) + 4) float32; -1 at the places of images without jitter.
    """
    chosen = params[:, Param.JITTER_ORDER].astype(int)
    places = np.where(chosen[:, None] >= 0, ORDERS[chosen], -1)
    return np.concatenate([params, places.astype(np.float32)], axis=1)


def _photometric(images: Tensor, table: np.ndarray) -> Tensor:
    """The operations, on images (N, 3, H, W) uint8 with parameters (N, len(Param)) -> float32 in [0, 1]."""
    # One pass for the type and for the layout: workers write channels last, these operations work on planes.
    x = torch.empty(images.shape, device=images.device).copy_(images).div_(255)
    x = _apply(x, table[:, Param.FLIP] > 0, lambda part, _: part.flip(-1))
    x = _jitter(x, table)
    x = _apply(x, table[:, Param.GRAY] > 0, lambda part, _: grayscale(part).expand_as(part).contiguous())
    sigma = send(torch.from_numpy(table[:, Param.BLUR_SIGMA]), x.device)
    x = _apply(x, table[:, Param.BLUR_SIGMA] > 0, lambda part, index: gaussian_blur(part, sigma[index]))
    return _apply(x, table[:, Param.SOLARIZE] > 0, lambda part, _: solarize(part))


def _apply(x: Tensor, chosen: np.ndarray, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Replace the chosen images by the operation's result. It gets the images and their indices. x may be changed."""
    (where,) = np.nonzero(chosen)
    if not len(where):
        return x
    index = send(torch.from_numpy(where), x.device)
    if len(where) == len(x):
        return operation(x, index)
    return x.index_copy_(0, index, operation(x.index_select(0, index), index))


def _jitter(x: Tensor, table: np.ndarray) -> Tensor:
    """Colour jitter: the four adjustments, in a random order for each image, as in torchvision."""
    adjustments = (
        (adjust_brightness, Param.BRIGHTNESS),
        (adjust_contrast, Param.CONTRAST),
        (adjust_saturation, Param.SATURATION),
        (adjust_hue, Param.HUE),
    )
    factors = send(torch.from_numpy(table), x.device)
    chosen = table[:, Param.JITTER_ORDER].astype(int)
    for place in range(4):
        at_place = np.where(chosen >= 0, ORDERS[chosen, place], -1)
        for number, (adjust, column) in enumerate(adjustments):
            x = _apply(x, at_place == number, lambda part, index, a=adjust, c=column: a(part, factors[index, c]))  # type: ignore[misc]
    return x


def _per_image(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)


def grayscale(x: Tensor) -> Tensor:
    """Luma, (N, 3, H, W) -> (N, 1, H, W)."""
    red, green, blue = GRAY_WEIGHTS
    return (x[:, 0] * red).add_(x[:, 1], alpha=green).add_(x[:, 2], alpha=blue).unsqueeze(1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale. x: (N, 3, H, W) in [0, 1]; factor: (N,), as in all adjustments."""
    return (x * _per_image(factor)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean grey. Shapes as in `adjust_brightness`."""
    return _blend(x, grayscale(x).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image in grey. Shapes as in `adjust_brightness`."""
    return _blend(x, grayscale(x), factor)


def _blend(x: Tensor, base: Tensor, factor: Tensor) -> Tensor:
    # In two steps, because the CPU's vector code takes at most one operand that is constant over an image.
    weight = _per_image(factor)
    return (x * weight).add_(base * (1 - weight)).clamp_(0, 1)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue by `turns` (N,) of the colour circle, at constant HSV saturation and value.

    It has no branches, which would take most of the time. In sixths of the circle, where red is 0, green 2 and blue -2,
    the distance to red is e + f (3 - 2 e) with e = |green - blue| / chroma and f = (value - red) / chroma: of the
    three sextants between red and cyan, f is 0 in the first, e is 1 in the second and f is 1 in the last.
    """
    red, green, blue = x.unbind(1)
    value = torch.maximum(red, green).maximum(blue)
    chroma = value - torch.minimum(red, green).minimum(blue)
    scale = chroma.clamp_min(1e-12).reciprocal_()
    difference = green - blue
    e, f = (difference * scale).abs_(), (value - red).mul_(scale)
    hue = e.addcmul_(f, torch.sub(3, e, alpha=2)).copysign_(difference)  # green is on the positive side
    hue += 6 * turns.view(-1, 1, 1)
    result = torch.empty_like(x)
    for channel, own in enumerate((0, 2, -2)):
        distance = (hue - own).abs_()  # to the channel's own hue, perhaps the long way round
        distance = torch.minimum(distance, (distance - 6).abs_())
        torch.addcmul(value, distance.sub_(1).clamp_(0, 1), chroma, value=-1, out=result[:, channel])
    return result


def solarize(x: Tensor) -> Tensor:
    """Invert the values in [0, 1] at or above the threshold, in a tensor of any shape."""
    over = x.clone().ge_(SOLARIZE_THRESHOLD)  # 0 or 1
    return over.mul_(torch.sub(1, x, alpha=2)).add_(x)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur with reflected borders. x: (N, 3, H, W); sigma: (N,) pixels.

    Along each axis it multiplies by a banded matrix for each image, block by block, leaving out the zeros.
    """
    count, channels, height, width = x.shape
    down = _blur_matrix(sigma, height).repeat_interleave(channels, dim=0)
    x = x.reshape(-1, height, width)
    x = torch.cat([down[:, to, near] @ x[:, near] for to, near in _blocks(height)], dim=1)
    across = _blur_matrix(sigma, width).mT
    x = x.view(count, -1, width)
    x = torch.cat([x[..., near] @ across[:, near, to] for to, near in _blocks(width)], dim=2)
    return x.view(count, channels, height, width)


def _blocks(length: int) -> list[tuple[slice, slice]]:
    """Blocks of pixels along an axis, and for each the surrounding pixels that its blur depends on."""
    return [
        (slice(start, start + BLUR_BLOCK), slice(max(start - BLUR_RADIUS, 0), start + BLUR_BLOCK + BLUR_RADIUS))
        for start in range(0, length, BLUR_BLOCK)
    ]


def _blur_matrix(sigma: Tensor, length: int) -> Tensor:
    """(N, length, length): row i holds the kernel's weights around i, folded back at the borders."""
    radius = min(BLUR_RADIUS, length - 1)
    offsets = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]).square())
    kernel = kernel / kernel.sum(dim=1, keepdim=True)  # (N, 2 radius + 1)
    positions = torch.arange(length, device=sigma.device)[:, None] + offsets
    reflected = (length - 1 - (length - 1 - positions.abs()).abs()).expand(len(sigma), -1, -1)
    matrix = torch.zeros(len(sigma), length, length, device=sigma.device)
    return matrix.scatter_add_(2, reflected, kernel[:, None].expand(-1, length, -1))
