"""Views of an image, the training device's share: flip, colour jitter, grey, blur, solarize, normalise.

Batched, with parameters of its own for each image, drawn by the workers (`views.py`). Each operation equals
torchvision's on floats (`torchvision.transforms.v2.functional`), and its uint8 version to 2/255.
"""

from collections.abc import Callable
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from pretrain.views import Param

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # thesis B.1.1
SOLARIZE_THRESHOLD = 128 / 255  # thesis B.1.1
BLUR_RADIUS = 6  # pixels: three standard deviations of the widest blur, 2 pixels


def augment(images: Tensor, params: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Apply to each image the operations that its parameters name, in the order of torchvision's usual chain.

    Which images an operation touches is worked out on the CPU, where the parameters are: a GPU is never waited for.

    Args:
        images: (N, 3, H, W) uint8, on the training device.
        params: (N, len(Param)) float32, on the CPU.
        mean: (3,) channel means in [0, 1], on the training device.
        std: (3,) channel standard deviations.

    Returns:
        (N, 3, H, W) float32, normalised, in channels-last memory.
    """
    table = params.numpy()
    x = images.float().div_(255)
    x = x.contiguous()
    _apply(x, table[:, Param.FLIP] > 0, lambda part, _: part.flip(-1))
    _jitter(x, table)
    _apply(x, table[:, Param.GRAY] > 0, lambda part, _: grayscale(part).expand_as(part))
    sigma = torch.from_numpy(table[:, Param.BLUR_SIGMA]).to(x.device)
    _apply(x, table[:, Param.BLUR_SIGMA] > 0, lambda part, index: gaussian_blur(part, sigma[index]))
    _apply(x, table[:, Param.SOLARIZE] > 0, lambda part, _: solarize(part))
    x = (x - mean[:, None, None]) / std[:, None, None]
    return x.contiguous(memory_format=torch.channels_last)


def _apply(x: Tensor, chosen: np.ndarray, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the chosen images by the operation's result, in place. It gets them and their indices."""
    (where,) = np.nonzero(chosen)
    if len(where):
        index = torch.from_numpy(where).to(x.device, non_blocking=True)
        x[index] = operation(x[index], index)


def _jitter(x: Tensor, table: np.ndarray) -> None:
    """Colour jitter in place: the four adjustments, each image in its own random order, as torchvision does."""
    adjustments = (
        (adjust_brightness, Param.BRIGHTNESS),
        (adjust_contrast, Param.CONTRAST),
        (adjust_saturation, Param.SATURATION),
        (adjust_hue, Param.HUE),
    )
    factors = torch.from_numpy(table).to(x.device, non_blocking=True)
    orders = np.array(list(permutations(range(4))))
    chosen = table[:, Param.JITTER_ORDER].astype(int)
    for place in range(4):
        at_place = np.where(chosen >= 0, orders[chosen, place], -1)
        for number, (adjust, column) in enumerate(adjustments):
            _apply(x, at_place == number, lambda part, index, a=adjust, c=column: a(part, factors[index, c]))  # type: ignore[misc]


def _per_image(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)


def grayscale(x: Tensor) -> Tensor:
    """Luma, (N, 3, H, W) -> (N, 1, H, W)."""
    red, green, blue = GRAY_WEIGHTS
    return (red * x[:, 0] + green * x[:, 1] + blue * x[:, 2]).unsqueeze(1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale. x: (N, 3, H, W) in [0, 1]; factor: (N,), as in all adjustments."""
    return (x * _per_image(factor)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean grey."""
    mean = grayscale(x).mean(dim=(1, 2, 3), keepdim=True)
    return mean.lerp(x, _per_image(factor)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image in grey."""
    return grayscale(x).lerp(x, _per_image(factor)).clamp_(0, 1)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue by `turns` (N,) of the colour circle, at constant HSV saturation and value."""
    value, minimum = x.amax(1), x.amin(1)
    chroma = value - minimum
    divisor = torch.where(chroma == 0, 1, chroma)
    red, green, blue = x.unbind(1)
    # Position on the circle in sixths: from red 0 over green 2 and blue 4.
    sixth = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixth = sixth + 6 * turns.view(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):  # red, green, blue: value - chroma * clamp(distance from the channel's own hue)
        k = (sixth + offset).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def solarize(x: Tensor) -> Tensor:
    """Invert the values at or above the threshold."""
    return torch.where(x >= SOLARIZE_THRESHOLD, 1 - x, x)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur with reflected borders. x: (N, 3, H, W); sigma: (N,) pixels.

    One matrix product per axis with a banded matrix for each image. Grouped convolution, the usual way to give each
    image a kernel of its own, is far slower on CPUs and GPUs alike.
    """
    _, _, height, width = x.shape
    return _blur_matrix(sigma, height)[:, None] @ x @ _blur_matrix(sigma, width)[:, None].mT


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
