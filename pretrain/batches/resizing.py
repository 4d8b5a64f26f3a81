"""Antialiased resizing of uint8 images, as `torch.nn.functional.interpolate` does it, bit for bit.

`resizing.c` is used where it was compiled (`setup.py` does so if there is a C compiler) and the processor has AVX-512
with VBMI and VNNI (Intel's servers from Ice Lake, AMD from Zen 4). It takes a third of the time for usual crops.
PyTorch's operation is used otherwise, and where an image becomes more than about seven times narrower.
"""

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache, partial
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

INTERFACE = 3  # of the functions in resizing.c; another library is not used
LIBRARIES = [Path(__file__).with_name(f"_resizing{suffix}") for suffix in EXTENSION_SUFFIXES]
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "bicubic": torch._C._nn._upsample_bicubic2d_aa,
    "bilinear": torch._C._nn._upsample_bilinear2d_aa,
}
INTERPOLATIONS = tuple(OPERATIONS)
REACH = {"bicubic": 2, "bilinear": 1}  # pixels of a filter to each side
BLOCK = 16  # values of a row that are computed together; a value is one channel of a pixel
WINDOW = 128  # bytes, from which those of a block are taken for a pair of taps
KEPT_SIZES = 1024  # each needs up to 60 KB at 224 pixels, 15 KB where an image becomes a little smaller


def resize(image: Tensor, height: int, width: int, interpolation: str = "bicubic", out: Tensor | None = None) -> Tensor:
    """Resize with antialiasing, uint8 (3, H, W) or (1, 3, H, W) -> as many dimensions, in channels-last memory.

    Args:
        interpolation: one of `INTERPOLATIONS`; bicubic in the article (thesis B.1.3).
        out: (1, 3, height, width) memory for the result of an image with four dimensions, channels last.
    """
    if image.dim() == 3:
        return resize(image.permute(1, 2, 0)[None].permute(0, 3, 1, 2), height, width, interpolation)[0]
    if out is None:
        out = torch.empty(1, height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    if image.stride(1) != 1:
        # Where input and result differ in layout, PyTorch 2.14 gives wrong pixels or an internal error.
        image = image.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    prepare_resize(image, out, interpolation)()
    return out


def prepare_resize(image: Tensor, out: Tensor, interpolation: str) -> Callable[[], object]:
    """A function that resizes `image` into `out`, whatever pixels are in the memory by then.

    Args:
        image: uint8 (1, 3, H, W) with the channels of a pixel side by side, such as a crop of a decoded image.
        out: uint8 (1, 3, height, width), channels last.
        interpolation: one of `INTERPOLATIONS`.
    """
    size = out.shape[2:]
    if image.shape[2:] == size:
        return partial(out.copy_, image)
    library = load_library()
    pixels_together = image.stride()[1::2] == (1, 3) and out.is_contiguous(memory_format=torch.channels_last)
    across = _across(image.shape[3], size[1], interpolation) if library and pixels_together else None
    if library and across:
        down = _down(image.shape[2], size[0], interpolation)
        return partial(_resize_rgb, library, image, out, across, down)
    return partial(OPERATIONS[interpolation], image, list(size), False, None, None, out=out)


@cache
def load_library() -> ctypes.CDLL | None:
    """The functions of resizing.c, where they were compiled and this processor can execute them."""
    path = next((path for path in LIBRARIES if path.exists()), None)
    try:
        library = ctypes.CDLL(str(path)) if path else None
    except OSError:  # of another machine
        return None
    if not library or library.resizing_interface() != INTERFACE:
        return None
    pointer = ctypes.POINTER(_Direction)
    library.resize_rgb.argtypes = (ctypes.c_void_p, ctypes.c_int64, pointer, pointer, ctypes.c_void_p)
    return library


def _resize_rgb(library: ctypes.CDLL, image: Tensor, out: Tensor, across: "_Direction", down: "_Direction") -> None:
    if library.resize_rgb(image.data_ptr(), image.stride(2), across, down, out.data_ptr()):
        raise MemoryError("not enough memory to resize an image")


class _Direction(ctypes.Structure):
    """`direction` in resizing.c, which explains the fields. It holds the arrays that it points to."""

    _fields_ = (
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("pairs", ctypes.c_int32),
        ("precision", ctypes.c_int32),
        ("reach", ctypes.c_int32),
        ("first", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
    )

    def __init__(
        self,
        sizes: tuple[int, int],
        precision: int,
        first: np.ndarray,
        weights: np.ndarray,
        places: np.ndarray | None = None,
        reach: int = 0,
    ) -> None:
        # PyTorch's memory begins at a multiple of 64 bytes, so that no vector lies in two lines of the cache.
        self.arrays = [torch.from_numpy(np.ascontiguousarray(each)).clone() for each in (first, weights)]
        if places is not None:
            self.arrays.append(torch.from_numpy(places).clone())
        pointers = [each.data_ptr() for each in self.arrays]
        super().__init__(*sizes, weights.shape[1], precision, reach, *pointers)


def compute_weights(inputs: int, outputs: int, interpolation: str) -> tuple[np.ndarray, np.ndarray, int]:
    """The weights with which PyTorch resizes a row or column of uint8, rounded as PyTorch rounds them.

    Args:
        inputs: pixels before.
        outputs: pixels after.
        interpolation: one of `INTERPOLATIONS`.

    Returns:
        The first input of each output, (outputs,) int32; the weights from there on, (outputs, taps) int16, `taps` even;
        and the precision: weights are multiples of 2^-precision.
    """
    scale = inputs / outputs
    wider = max(scale, 1.0)  # antialiasing: where the image becomes smaller, the filter becomes wider
    reach = REACH[interpolation] * wider
    center = scale * (np.arange(outputs) + 0.5)
    first = np.maximum((center - reach + 0.5).astype(np.int64), 0)
    count = np.minimum((center + reach + 0.5).astype(np.int64), inputs) - first
    tap = np.arange(count.max() + count.max() % 2)
    distance = np.abs((tap + first[:, None] - center[:, None] + 0.5) * (1 / wider))
    weights = np.where(tap < count[:, None], FILTERS[interpolation](distance), 0)
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # the sum from left to right; `sum` has another order
    precision = 0
    while precision < 22 and int(0.5 + weights.max() * 2 ** (precision + 1)) < 2**15:
        precision += 1
    scaled = weights * 2**precision
    return first.astype(np.int32), np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int16), precision


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5, which PyTorch uses for antialiased resizing, as Pillow does."""
    a = -0.5
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance < 1, near, np.where(distance < 2, far, 0))


def _triangle(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - distance, 0)


FILTERS = {"bicubic": _cubic, "bilinear": _triangle}


@lru_cache(KEPT_SIZES)
def _down(inputs: int, outputs: int, interpolation: str) -> _Direction:
    first, weights, precision = compute_weights(inputs, outputs, interpolation)
    return _Direction((inputs, outputs), precision, first, weights.view(np.int32))


@lru_cache(KEPT_SIZES)
def _across(inputs: int, outputs: int, interpolation: str) -> _Direction | None:
    """None where the bytes that a block of values needs for a pair of taps do not fit a window."""
    if 3 * (BLOCK // 3) * inputs > WINDOW * outputs:  # its first and last pixel alone are too far apart
        return None
    first, weights, precision = compute_weights(inputs, outputs, interpolation)
    pairs = weights.view(np.int32)
    pixel, channel = np.divmod(np.arange(-(-3 * outputs // BLOCK) * BLOCK), 3)
    inside = pixel < outputs
    pixel[~inside], channel[~inside] = outputs - 1, 0
    begin = 3 * first[pixel[::BLOCK]]
    place = (3 * first[pixel] + channel).reshape(-1, BLOCK) - begin[:, None]
    last = place.max() + 3
    if last >= WINDOW:
        return None
    reach = 1 + (WINDOW - 1 - last) // 6  # a pair of taps is six bytes from the next
    places = np.zeros((*place.shape, 4), np.uint8)
    places[..., 0], places[..., 2] = place, place + 3
    blocks = np.where(inside[:, None], pairs[pixel], 0).reshape(-1, BLOCK, pairs.shape[1]).transpose(0, 2, 1)
    return _Direction((inputs, outputs), precision, begin, blocks, places, reach)
