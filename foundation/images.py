"""Reading one image file: whatever the format, out comes uint8 RGB, or an error that names the file."""

import io
import warnings
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 100_000_000  # a photograph of 100 megapixels; more is taken for a decompression bomb

Image.MAX_IMAGE_PIXELS = None  # replaced by the check below, which every path goes through


class UnreadableImage(Exception):
    """A file that is no image, or is damaged. The message names it and says why."""


def read_rgb(path: Path) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 RGB, turned upright as its EXIF orientation says.

    Raises:
        UnreadableImage: missing, empty, truncated, not an image, or larger than `MAX_PIXELS`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path}: {error}") from error
    return decode_rgb(data, str(path))


def decode_rgb(data: bytes, name: str) -> np.ndarray:
    """Decode the content of an image file; see `read_rgb`. `name` is for the message of an error."""
    try:
        if data[:2] == b"\xff\xd8" and _is_plain_jpeg(data):
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
        return _decode_with_pillow(data)
    except UnidentifiedImageError as error:  # its message is the address of a buffer
        raise UnreadableImage(f"{name}: {'not an image' if data else 'empty file'}") from error
    except (
        Exception
    ) as error:  # Pillow raises whatever its parsers trip over: struct.error, IndexError, zlib.error, ...
        raise UnreadableImage(f"{name}: {str(error) or type(error).__name__}") from error


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether the fast decoder gives the right picture: RGB or grey, no EXIF orientation, a sane size."""
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS} allowed")
    return colorspace in ("YCbCr", "Gray", "RGB") and b"Exif\0\0" not in data[:4096]


def _decode_with_pillow(data: bytes) -> np.ndarray:
    with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
        warnings.simplefilter("ignore")  # remarks on metadata, one per file and epoch
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS} allowed")
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith(("I", "F")):  # 16-bit grey: `convert` would clip it to white, so scale it
            deep = np.asarray(upright).astype(np.float64)
            grey = (deep / (65535 if deep.max() > 255 else 255) * 255).round().clip(0, 255).astype(np.uint8)
            upright = Image.fromarray(grey)
        return np.array(upright.convert("RGB"))
