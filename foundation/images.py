"""The one image decoder of the project: a file becomes upright (H, W, 3) uint8 RGB, or an error that names the file.

Pretraining, the detector's training and evaluation, prediction and reports all read images through this module, so that
a file has the same pixels everywhere. The conversion depends on the type of the pixels and never on their values:

====================================  ==============================================================
pixels in the file                    conversion
====================================  ==============================================================
8-bit grey, palette, 1-bit            grey is repeated over the three channels, palettes are looked up
8-bit RGB, CMYK, YCbCr, Lab, HSV      converted to RGB by Pillow
2 or 4 channels with alpha            alpha is dropped, without blending
16-bit unsigned grey                  divided by 257, rounded
16-bit RGB                            the high byte
32-bit float                          0..1 is multiplied by 255; values outside are clipped; NaN is 0
32-bit or signed integers             refused
more than four channels               refused
====================================  ==============================================================

Of files with several frames the first is taken. PyTorch is not imported here.
"""

import io
import stat
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 100_000_000  # a photograph of 100 megapixels; a larger image is taken for a decompression bomb
MAX_BYTES = 1024**3  # of a file: `MAX_PIXELS` of the widest type, not compressed, are 800 MB

Image.MAX_IMAGE_PIXELS = None  # replaced by the check of MAX_PIXELS, which every path goes through

ORIENTATION = 0x0112  # the tag in EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(Exception):
    """A file that is not an image, is damaged, or has pixels of an unsupported type. The message names the file."""


def read_rgb(path: Path) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 RGB, turned upright as its EXIF orientation says.

    Raises:
        UnreadableImage: missing, empty, truncated, not an image, not a regular file, of an unsupported pixel type, or
            larger than `MAX_PIXELS` or `MAX_BYTES`.
    """
    try:
        _check_file(path)
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror or error}") from error
    return decode_rgb(data, str(path))


def decode_rgb(data: bytes, name: str) -> np.ndarray:
    """Decode the content of an image file; see `read_rgb`. `name` is for the message of an error."""
    try:
        if data[:2] == b"\xff\xd8":
            orientation = _fast_orientation(data)
            if orientation is not None:
                return _turn(simplejpeg.decode_jpeg(data, colorspace="RGB"), orientation)
        return _decode_with_pillow(data)
    except Exception as error:  # Pillow raises whatever its parsers meet: struct.error, IndexError, zlib.error, ...
        raise UnreadableImage(f"{name}: {_reason(error, data)}") from error


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image in pixels, from the header alone: damage behind the header is not seen.

    Raises:
        UnreadableImage: missing, empty, not an image, not a regular file, or larger than `MAX_PIXELS` or `MAX_BYTES`.
    """
    try:
        _check_file(path)
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            _check_size(*image.size)
            exchanged = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
            return image.size[::-1] if exchanged else image.size
    except OSError as error:
        if not isinstance(error, UnidentifiedImageError):
            raise UnreadableImage(f"{path}: {error.strerror or error}") from error
        raise UnreadableImage(f"{path}: {'not an image' if path.stat().st_size else 'empty file'}") from error
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(f"{path}: {str(error) or type(error).__name__}") from error


def _reason(error: Exception, data: bytes) -> str:
    if not isinstance(error, UnidentifiedImageError):
        return str(error) or type(error).__name__
    if not data:
        return "empty file"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "a TIFF whose pixels are of an unsupported layout; 1 to 4 channels of 8 bits and 16-bit grey are read"
    return "not an image"


def _check_file(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a named pipe would block, a device may never end
        raise UnreadableImage(f"{path}: not a file")
    if status.st_size > MAX_BYTES:
        raise UnreadableImage(f"{path}: {status.st_size:,} bytes are more than the {MAX_BYTES:,} allowed")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS} allowed")


def _fast_orientation(data: bytes) -> int | None:
    """The EXIF orientation of a JPEG that simplejpeg decodes to the same pixels as Pillow; None for all others."""
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    if colorspace not in ("YCbCr", "Gray", "RGB"):
        return None
    for segment in _application_segments(data):
        if segment.startswith(b"Exif\0\0"):
            return _exif_orientation(segment[6:])
        if b"tiff:Orientation" in segment:  # XMP, which Pillow reads where there is no EXIF
            return None
    return 1


def _application_segments(data: bytes) -> Iterator[bytes]:
    """The contents of the APP1 segments of a JPEG, in order."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == 0xDA:  # start of scan: pixels follow
            return
        if marker == 0xE1:
            yield data[position + 4 : position + 2 + length]
        position += 2 + length


def _exif_orientation(tiff: bytes) -> int | None:
    """The orientation in the first directory of EXIF data. None where it is not what the standard says."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", tiff, entry)
            if tag == ORIENTATION:
                return struct.unpack_from(order + "H", tiff, entry + 8)[0] if (kind, count) == (3, 1) else None
    except struct.error:
        return None
    return None  # no orientation in EXIF: XMP may have one


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels as stored -> upright, by Pillow: NumPy's copy of a transpose is several times slower."""
    turn = TURNS.get(orientation)
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


def _decode_with_pillow(data: bytes) -> np.ndarray:
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
        _check_size(*image.size)
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "F":
            upright = _from_float(np.asarray(upright))
        elif upright.mode.startswith("I"):
            # PNG and PGM have at most 16 bits; `I` is how Pillow holds them where it has no 16-bit mode.
            if not upright.mode.startswith("I;16") and image.format not in ("PNG", "PPM"):
                raise ValueError("pixels of 32-bit or signed integers have no defined range; convert it to 8 bits")
            upright = _from_16_bits(np.asarray(upright))
        return np.array(upright.convert("RGB"))


def _from_16_bits(grey: np.ndarray) -> Image.Image:
    """`Image.convert` would clip at 255, that is, to white."""
    return Image.fromarray(((grey.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _from_float(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(np.nan_to_num(grey.astype(np.float64), nan=0.0).clip(0, 1) * 255).astype(np.uint8))
