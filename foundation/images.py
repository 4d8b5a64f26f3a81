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
import os
import stat
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Pictures of these kinds are not read, and where a folder has any a message says so.
UNREAD_EXTENSIONS = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw")
MAX_PIXELS = 100_000_000  # a photograph of 100 megapixels; a larger image is taken for a decompression bomb
MAX_BYTES = 1024**3  # of a file: `MAX_PIXELS` of the widest type, not compressed, are 800 MB

REDUCTIONS = (8, 4, 2, 1)  # of JPEGs. The decoder has no fast code for those between, which take longer than 1
STRIP = 2**20  # pixels that are converted at a time

Image.MAX_IMAGE_PIXELS = None  # replaced by the check of MAX_PIXELS, which every path goes through
# Of metadata, mostly. Not by `catch_warnings`, which is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

ORIENTATION = 0x0112  # the tag in EXIF
EXCHANGED = (5, 6, 7, 8)  # orientations that exchange height and width
REVERSED = (3, 4, 6, 7)  # orientations that put the stored top at the bottom or at the right
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


@dataclass(frozen=True)
class OpenImage:
    """An image whose size is known, and whose pixels are decoded when they are asked for.

    Only JPEGs wait to be decoded: of all other files the pixels are there already.

    Attributes:
        name: for the message of an error.
        height: pixels of the upright image.
        width: likewise.
    """

    name: str
    height: int
    width: int
    _jpeg: bytes = b""
    _orientation: int = 1
    _pixels: np.ndarray | None = None

    @classmethod
    def of(cls, pixels: np.ndarray, name: str = "") -> "OpenImage":
        """An image that is decoded: (H, W, 3) uint8 RGB."""
        height, width, _ = pixels.shape
        return cls(name, height, width, _pixels=pixels)

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return len(self._jpeg) if self._pixels is None else self._pixels.nbytes

    @property
    def fills_buffer(self) -> bool:
        """Whether `decode` returns the buffer that it is given: of upright JPEGs."""
        return self._pixels is None and self._orientation == 1

    def decode(self, reduction: int = 1, buffer: np.ndarray | None = None) -> np.ndarray:
        """The pixels, upright (H, W, 3) uint8 RGB.

        Args:
            reduction: one of `REDUCTIONS`. The sides of a JPEG are divided by it and rounded up: whole blocks of the
                cosine transform are decoded to fewer pixels. Other images keep their size.
            buffer: memory for the result, `height * width * 3` bytes or more, if there is any to be used again. New
                memory costs as much time as a fifth of the decoding, or more.

        Raises:
            UnreadableImage: the content is damaged.
        """
        if self._pixels is not None:
            return self._pixels
        height, width = (self.width, self.height) if self._orientation in EXCHANGED else (self.height, self.width)
        try:
            stored = simplejpeg.decode_jpeg(
                self._jpeg,
                colorspace="RGB",
                min_height=-(-height // reduction),
                min_width=-(-width // reduction),
                min_factor=reduction,
                buffer=buffer,
            )
            return _upright(_strips_of(stored), stored.shape, self._orientation) if self._orientation != 1 else stored
        except Exception as error:
            raise UnreadableImage(f"{self.name}: {_reason(error, self._jpeg)}") from error


def read_rgb(path: Path) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 RGB, turned upright as its EXIF orientation says.

    Raises:
        UnreadableImage: missing, empty, truncated, not an image, not a regular file, of an unsupported pixel type, or
            larger than `MAX_PIXELS` or `MAX_BYTES`.
    """
    return open_file(path).decode()


def decode_rgb(data: bytes, name: str) -> np.ndarray:
    """Decode the content of an image file to (H, W, 3) uint8 RGB; see `read_rgb`. `name` is named in errors."""
    return open_image(data, name).decode()


def open_file(path: Path) -> OpenImage:
    """Read an image file, without decoding it if it is a JPEG. Raises `UnreadableImage` as `read_rgb`."""
    return open_image(read_file(path), str(path))


def open_image(data: bytes, name: str) -> OpenImage:
    """Open the content of an image file; see `open_file`. Raises `UnreadableImage`."""
    try:
        if data[:2] == b"\xff\xd8" and (header := _jpeg_header(data)):
            height, width, colorspace = header
            _check_size(width, height)
            orientation = _fast_orientation(data, colorspace)
            if orientation is not None:
                if orientation in EXCHANGED:
                    height, width = width, height
                return OpenImage(name, height, width, data, orientation)
        return OpenImage.of(_decode_with_pillow(data), name)
    except Exception as error:  # Pillow raises whatever its parsers meet: struct.error, IndexError, zlib.error, ...
        raise UnreadableImage(f"{name}: {_reason(error, data)}") from error


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image in pixels, from the header alone: damage behind the header is not seen.

    Raises:
        UnreadableImage: missing, empty, not an image, not a regular file, or larger than `MAX_PIXELS` or `MAX_BYTES`.
    """
    try:
        with os.fdopen(_open_file(path)[0], "rb") as file, Image.open(file) as image:
            _check_size(*image.size)
            # Of a TIFF, Pillow's size is that of the upright image.
            exchanged = image.format != "TIFF" and image.getexif().get(ORIENTATION) in EXCHANGED
            return image.size[::-1] if exchanged else image.size
    except OSError as error:
        if not isinstance(error, UnidentifiedImageError):
            raise UnreadableImage(f"{path}: {error.strerror or error}") from error
        raise UnreadableImage(f"{path}: {'not an image' if path.stat().st_size else 'empty file'}") from error
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(f"{path}: {str(error) or type(error).__name__}") from error


def _open_file(path: Path) -> tuple[int, int]:
    """The descriptor and the size of a regular file that is not too large. A named pipe does not block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES:
        return descriptor, status.st_size
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):  # a device may never end
        raise UnreadableImage(f"{path}: not a file")
    raise UnreadableImage(f"{path}: {status.st_size:,} bytes are more than the {MAX_BYTES:,} allowed")


def read_file(path: Path) -> bytes:
    """The content of an image file, not decoded.

    Raises:
        UnreadableImage: missing, not a regular file, or larger than `MAX_BYTES`.
    """
    try:
        descriptor, size = _open_file(path)
        try:
            content = os.read(descriptor, size or 4096)  # a file object would take twice as many system calls
            while len(content) != size and (part := os.read(descriptor, 2**20)):
                content += part
            return content
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror or error}") from error


def _reason(error: Exception, data: bytes) -> str:
    if not isinstance(error, UnidentifiedImageError):
        return str(error) or type(error).__name__
    if not data:
        return "empty file"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "a TIFF whose pixels are of an unsupported layout; 1 to 4 channels of 8 bits and 16-bit grey are read"
    return "not an image"


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS} allowed")


def _jpeg_header(data: bytes) -> tuple[int, int, str] | None:
    """(height, width, colour space). None where simplejpeg cannot tell: Pillow knows more kinds of subsampling."""
    try:
        return simplejpeg.decode_jpeg_header(data)[:3]
    except ValueError:
        return None


def _fast_orientation(data: bytes, colorspace: str) -> int | None:
    """The EXIF orientation of a JPEG that simplejpeg decodes to the same pixels as Pillow; None for all others."""
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


def _decode_with_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        _check_size(*image.size)
        # PNG and PGM have at most 16 bits; `I` is how Pillow holds them where it has no 16-bit mode.
        if image.mode.startswith("I") and not image.mode.startswith("I;16") and image.format not in ("PNG", "PPM"):
            raise ValueError("pixels of 32-bit or signed integers have no defined range; convert it to 8 bits")
        image.load()
        parts = (np.asarray(_to_rgb(image.crop((0, *rows)))) for rows in _row_boxes(*image.size))
        return _upright(parts, (image.height, image.width, 3), image.getexif().get(ORIENTATION, 1))


def _row_boxes(width: int, height: int) -> Iterator[tuple[int, int, int]]:
    """(top, right, bottom) of strips of about `STRIP` pixels, from the top of an image to its bottom."""
    rows = max(STRIP // width, 1)
    return ((top, width, min(top + rows, height)) for top in range(0, height, rows))


def _strips_of(pixels: np.ndarray) -> Iterator[np.ndarray]:
    return (pixels[top:bottom] for top, _, bottom in _row_boxes(pixels.shape[1], pixels.shape[0]))


def _upright(strips: Iterable[np.ndarray], shape: Sequence[int], orientation: int) -> np.ndarray:
    """Pixels as stored -> upright. Strip by strip, so that hardly more than the result is held in memory.

    Pillow turns the strips, because NumPy's copy of a transpose is several times slower.

    Args:
        strips: (rows, W, 3), from the top to the bottom of the image as stored.
        shape: (H, W, 3) of the image as stored.
        orientation: of EXIF.
    """
    height, width = shape[:2]
    turn = TURNS.get(orientation)
    exchanged = orientation in EXCHANGED
    result = np.empty((width, height, 3) if exchanged else (height, width, 3), np.uint8)
    top = 0
    for strip in strips:
        bottom = top + len(strip)
        place = slice(height - bottom, height - top) if orientation in REVERSED else slice(top, bottom)
        part = strip if turn is None else np.asarray(Image.fromarray(strip).transpose(turn))
        result[(slice(None), place) if exchanged else place] = part
        top = bottom
    return result


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        image = _from_float(np.asarray(image))
    elif image.mode.startswith("I"):
        image = _from_16_bits(np.asarray(image))
    return image.convert("RGB")


def _from_16_bits(grey: np.ndarray) -> Image.Image:
    """`Image.convert` would clip at 255, that is, to white."""
    return Image.fromarray(((grey.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _from_float(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(np.nan_to_num(grey.astype(np.float64), nan=0.0).clip(0, 1) * 255).astype(np.uint8))
