"""The part of a view that the training device computes: flip, colour jitter, grey, blur, solarize, normalise.

The operations are batched; the workers draw the parameters of each image (`views.py`). Each operation equals
torchvision's on floats (`torchvision.transforms.v2.functional`), and its uint8 version to 2/255. On a GPU with Triton
four kernels compute all of them (`augment_kernels.py`); the functions here are the reference, and run everywhere else.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from foundation.devices import send
from pretrain import gpu_kernels
from pretrain.batches.draws import Param

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # thesis B.1.1
SOLARIZE_THRESHOLD = 128 / 255  # thesis B.1.1
BLUR_RADIUS = 6  # pixels: three standard deviations of the widest blur, 2 pixels
BLUR_REACH = 5.7  # standard deviations; the weights beyond are below the resolution of float32
CACHE_BYTES = 2**22  # of images that a CPU core works on at a time
BLUR_BYTES = 2**20  # of images that a CPU blurs at a time
LARGE_BYTES = 2**18  # of an image; larger ones are taken one by one by a single thread
GPU_BYTES = 2**28  # of images that a GPU works on at a time; intermediate results take several times that
ORDERS = np.array(list(permutations(range(4))))  # of the jitter


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
    result = _new_result(images.shape, dtype, images.device)
    table = table_of(params.numpy())
    count = _images_at_a_time(images)
    for start in range(0, len(images), count):
        part = slice(start, start + count)
        if images.device.type == "cuda" and _by_kernels(images[part], table[part], mean, std, result[part]):
            continue
        x = _photometric(images[part], table[part]).sub_(mean[:, None, None]).mul_(1 / std[:, None, None])
        if dtype != x.dtype:  # layout and type in one pass would take twice as long as in two
            x = x.contiguous(memory_format=torch.channels_last)
        result[part].copy_(x)
    return result


def _new_result(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for (N, 3, H, W), channels last.

    On a CPU it is NumPy's, which asks the system for huge pages, as PyTorch does not: a result of more than 32 MB is
    memory that is new in each step, and a third of the time would be spent on its page faults.
    """
    if device.type != "cpu":
        return torch.empty(*shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    count, channels, height, width = shape
    memory = torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8))
    return memory.view(dtype).view(count, height, width, channels).permute(0, 3, 1, 2)


def _images_at_a_time(images: Tensor) -> int:
    """How many images the operations take at a time.

    One thread takes large images one by one: an operation that changes some of several images copies them first. More
    threads take several, because one image is too little work to divide.
    """
    size = 4 * images[0].numel()
    if images.device.type != "cpu":
        return max(GPU_BYTES // size, 1)
    threads = torch.get_num_threads()
    return 1 if threads == 1 and size > LARGE_BYTES else max(CACHE_BYTES // size, 1) * threads


def _by_kernels(images: Tensor, table: np.ndarray, mean: Tensor, std: Tensor, result: Tensor) -> bool:
    """Fill the result with Triton's kernels. False where they cannot be used."""
    if not gpu_kernels.can_build(images.device):
        return False
    parameters = send(torch.from_numpy(table), images.device)
    torch.ops.corinfomax.augment(images.contiguous(), parameters, mean, std, result, BLUR_RADIUS)
    return True


gpu_kernels.register(
    "augment(Tensor images, Tensor table, Tensor mean, Tensor std, Tensor(a!) result, int radius) -> ()",
    "pretrain.batches.augment_kernels",
    "augment",
    lambda *_: None,
)


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
    """The operations, on images (N, 3, H, W) uint8 with a table (N, len(Param) + 4) of `table_of`.

    Returns:
        (N, 3, H, W) float32 in [0, 1].
    """
    sigma = table[:, Param.BLUR_SIGMA]
    # One pass for the type and for the layout: workers write channels last, these operations work on planes.
    x = torch.empty(images.shape, device=images.device).copy_(images).div_(255)
    x = _apply(x, np.flatnonzero(table[:, Param.FLIP]), lambda part, _: part.flip(-1))
    x = _jitter(x, table)
    x = _apply(x, np.flatnonzero(table[:, Param.GRAY]), lambda part, _: grayscale(part))
    x = _blur(x, sigma)
    x = _apply(x, np.flatnonzero(table[:, Param.SOLARIZE]), lambda part, _: solarize(part))
    return x if x.shape[1] == 3 else x.repeat(1, 3, 1, 1)


def _apply(x: Tensor, where: np.ndarray, operation: Callable[[Tensor, np.ndarray], Tensor]) -> Tensor:
    """Replace some images by the operation's result. It gets the images and their indices. x may be changed."""
    if not len(where):
        return x
    if len(where) == len(x):
        return operation(x, where)
    index = send(torch.from_numpy(where), x.device)
    return x.index_copy_(0, index, operation(x.index_select(0, index), where).expand(-1, x.shape[1], -1, -1))


def _jitter(x: Tensor, table: np.ndarray) -> Tensor:
    """Colour jitter: the four adjustments, in a random order for each image, as in torchvision. x may be changed."""
    adjustments = (
        (adjust_brightness, Param.BRIGHTNESS),
        (adjust_contrast, Param.CONTRAST),
        (adjust_saturation, Param.SATURATION),
        (adjust_hue, Param.HUE),
    )
    for at_place in table[:, len(Param) :].T:
        for number in set(at_place.tolist()) - {-1}:
            adjust, column = adjustments[int(number)]
            operation = partial(_adjust, adjust, table[:, column])
            x = _apply(x, np.flatnonzero(at_place == number), operation)
    return x


def _adjust(
    adjust: Callable[[Tensor, np.ndarray], Tensor], factors: np.ndarray, x: Tensor, where: np.ndarray
) -> Tensor:
    return adjust(x, factors[where])


def _per_image(factors: np.ndarray, x: Tensor) -> Tensor | float:
    """Factors (N,) to multiply images (N, C, H, W) by: of one image, a number, which takes less time than a tensor."""
    if len(factors) == 1:
        return float(factors[0])
    return send(torch.from_numpy(factors), x.device).view(-1, 1, 1, 1)


def grayscale(x: Tensor) -> Tensor:
    """Luma, (N, 3, H, W) -> (N, 1, H, W)."""
    red, green, blue = GRAY_WEIGHTS
    return (x[:, :1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:], alpha=blue)


def adjust_brightness(x: Tensor, factor: np.ndarray) -> Tensor:
    """Scale. x: (N, 3, H, W) in [0, 1], is changed; factor: (N,), as in all adjustments."""
    return x.mul_(_per_image(factor, x)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: np.ndarray) -> Tensor:
    """Blend with the image's mean grey. Arguments as in `adjust_brightness`."""
    return _blend(x, grayscale(x.mean(dim=(2, 3), keepdim=True)), factor)


def adjust_saturation(x: Tensor, factor: np.ndarray) -> Tensor:
    """Blend with the image in grey. Arguments as in `adjust_brightness`."""
    return _blend(x, grayscale(x), factor)


def _blend(x: Tensor, base: Tensor, factor: np.ndarray) -> Tensor:
    # In two steps, because the CPU's vector code takes at most one operand that is constant over an image.
    weight = _per_image(factor, x)
    return x.mul_(weight).add_(base.mul_(1 - weight)).clamp_(0, 1)


def adjust_hue(x: Tensor, turns: np.ndarray) -> Tensor:
    """Rotate the hue by `turns` (N,) of the colour circle, at constant HSV saturation and value. x is changed.

    Around the circle a channel is at the pixel's highest value for a third of a turn, falls for a sixth, is at the
    lowest value for a third and rises for a sixth. The middle one of the pixel's three values is that of the channel
    that falls or rises. So a rotation by up to a sixth of a turn needs neither the hue nor a division: where green is
    above blue, red becomes 2 red - middle - 6 chroma turns, limited to the pixel's lowest and highest value, else
    2 red - middle + 6 chroma turns; the same for green (blue, red) and for blue (red, green). For the middle channel
    2 red - middle is its own value. For the others it exceeds the limits by the distance that the middle channel moves
    before they do. Wider rotations are done in several steps.
    """
    steps = max(math.ceil(6 * float(np.abs(turns).max())), 1)
    sixths = _per_image(6 * turns / steps, x)
    for _ in range(steps):
        red, green, blue = x.split(1, dim=1)
        high, low = torch.maximum(red, green), torch.minimum(red, green)
        middle = torch.minimum(high, blue)
        torch.maximum(middle, low, out=middle)
        torch.maximum(high, blue, out=high)
        torch.minimum(low, blue, out=low)
        distance = (high - low).mul_(sixths)
        rest = torch.sub(distance, middle, out=middle)
        distance.mul_(2)
        # 0 or 1, without the conversion from booleans
        falls = [torch.ge(*pair, out=torch.empty_like(high)) for pair in ((green, blue), (blue, red), (red, green))]
        for channel, fall in zip((red, green, blue), falls, strict=True):
            torch.add(rest, channel, alpha=2, out=channel)
            channel.addcmul_(fall, distance, value=-1).clamp_(low, high)
    return x


def solarize(x: Tensor) -> Tensor:
    """Invert the values in [0, 1] at or above the threshold, in a tensor of any shape."""
    over = x.clone().ge_(SOLARIZE_THRESHOLD)  # 0 or 1
    return over.mul_(torch.sub(1, x, alpha=2)).add_(x)


def _blur(x: Tensor, sigma: np.ndarray) -> Tensor:
    """Blur the images with sigma (N,) > 0, on a CPU some of similar sigma at a time: the widest takes the most time."""
    ranked = np.argsort(sigma)[np.count_nonzero(sigma == 0) :]
    parts = math.ceil(4 * x[0].numel() * len(ranked) / BLUR_BYTES) if x.device.type == "cpu" else 1
    for some in np.array_split(ranked, max(parts, 1)):
        x = _apply(x, np.sort(some), lambda part, where: gaussian_blur(part, sigma[where]))
    return x


def gaussian_blur(x: Tensor, sigma: np.ndarray) -> Tensor:
    """Blur with reflected borders. x: (N, C, H, W); sigma: (N,) pixels."""
    radius = min(BLUR_RADIUS, math.ceil(BLUR_REACH * float(sigma.max())) - 1)
    if radius == 0:
        return x
    weights = np.exp(-0.5 * np.square(np.arange(-radius, radius + 1, dtype=np.float32) / sigma[:, None]))
    down = _blur_axis(x.permute(1, 2, 0, 3), weights)  # (C, H, N, W)
    across = _blur_axis(down.transpose(1, 3), weights)  # (C, W, N, H)
    return across.permute(2, 0, 3, 1)


def _blur_axis(x: Tensor, weights: np.ndarray) -> Tensor:
    """Weighted means of the pixels along an axis.

    Args:
        x: (C, L, N, B). The axis is L.
        weights: (N, 2 radius + 1), not normalised.

    Returns:
        As x.
    """
    channels, length, count, breadth = x.shape
    cut = max(weights.shape[1] // 2 - (length - 1), 0)  # of the radius: images are reflected once
    weights = weights[:, cut : weights.shape[1] - cut]
    radius, last = weights.shape[1] // 2, length - 1
    kernel = send(torch.from_numpy(weights / weights.sum(axis=1, keepdims=True)), x.device)
    kernel = kernel.repeat_interleave(breadth, dim=0)  # for each line along the axis
    reflected = send(torch.from_numpy(last - np.abs(last - np.abs(np.arange(-radius, length + radius)))), x.device)
    lines = x.reshape(channels, length, count * breadth).index_select(1, reflected)
    if x.device.type == "cpu" and not torch.backends.mkldnn.is_available():
        result = torch.zeros(channels, length, count * breadth)
        for offset, weight in enumerate(kernel.T):
            result.addcmul_(lines[:, offset : offset + length], weight)
        return result.reshape(x.shape)
    # The lines are the channels of a convolution, of which oneDNN computes many at once.
    lines = lines.mT.unsqueeze(2)  # in channels-last memory
    if x.device.type != "cpu":
        lines = lines.contiguous()  # else it would be computed by cuDNN, which may round to TF32
    result = conv2d(lines, kernel[:, None, None], groups=count * breadth).squeeze(2).mT
    return result.reshape(x.shape)
