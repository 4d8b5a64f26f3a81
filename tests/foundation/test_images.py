"""Image files of every kind that users have: the right pixels, or an error that names the file."""

import os
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from foundation import images
from foundation.images import UnreadableImage, read_file, read_rgb, read_size

RAMP = np.linspace(0, 255, 48).astype(np.uint8)[None, :].repeat(32, 0)  # dark left, bright right
COLOUR = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 60)], axis=2)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    "name", ["a.png", "b.jpg", "progressive.jpg", "c.webp", "d.gif", "e.bmp", "f.tiff", "ünï cödé.jpg"]
)
def test_common_formats(name: str, tmp_path: Path) -> None:
    options = {"progressive": True} if name.startswith("progressive") else {}
    pixels = read_rgb(saved(tmp_path / name, Image.fromarray(COLOUR), **options))
    assert pixels.shape == (32, 48, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - COLOUR).mean() < 12  # GIF has 256 colours, JPEG halves the chroma


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_other_colour_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    name = "x.jpg" if mode in ("L", "CMYK") else "x.png"
    pixels = read_rgb(saved(tmp_path / name, Image.fromarray(RAMP).convert("RGB").convert(mode)))
    assert pixels.shape == (32, 48, 3)
    assert pixels[:, :8].mean() < 60 < 190 < pixels[:, -8:].mean()


def test_a_jpeg_whose_subsampling_only_pillow_knows(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.jpg", Image.fromarray(COLOUR).convert("CMYK"), subsampling="4:2:0")
    with Image.open(path) as image:
        assert np.array_equal(read_rgb(path), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", ["deep.png", "deep.tiff", "deep.pgm"])
@pytest.mark.parametrize("brightest", [65535, 2570])
def test_16_bits_are_scaled_by_their_type_and_not_by_their_values(name: str, brightest: int, tmp_path: Path) -> None:
    deep = np.linspace(0, brightest, 48).astype(np.uint16)[None, :].repeat(32, 0)
    path = tmp_path / name
    if name.endswith("pgm"):
        path.write_bytes(b"P5 48 32 65535\n" + deep.astype(">u2").tobytes())
    else:
        saved(path, Image.fromarray(deep))
    assert np.array_equal(read_rgb(path)[..., 0], np.rint(deep / 257).astype(np.uint8))


def test_floats_are_scaled_from_0_to_1_and_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 0.5, 1, 2, -1, np.nan]], np.float32)
    assert read_rgb(saved(tmp_path / "f.tiff", Image.fromarray(values)))[0, :, 1].tolist() == [0, 128, 255, 255, 0, 0]


def test_pixel_types_without_a_range_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "i.tiff", Image.fromarray(np.array([[0, 70000]], np.int32)))
    with pytest.raises(UnreadableImage, match=r"i\.tiff: pixels of 32-bit or signed integers"):
        read_rgb(path)


def turned(folder: Path, orientation: object, image: Image.Image, order: str = "<") -> Path:
    exif = Image.Exif()
    exif.endian = order
    exif[0x0112] = orientation
    return saved(folder / "turned.jpg", image, exif=exif, quality=95)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_pixels_of_a_camera_jpeg_equal_those_of_pillow(orientation: int, order: str, tmp_path: Path) -> None:
    path = turned(tmp_path, orientation, Image.fromarray(COLOUR), order)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(read_rgb(path), upright)
    assert read_size(path) == upright.shape[1::-1]


def test_camera_jpegs_take_the_fast_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_decode_with_pillow", None)
    assert read_rgb(turned(tmp_path, 6, Image.fromarray(COLOUR))).shape == (48, 32, 3)


@pytest.mark.parametrize("length", [6, 10, 14, 18, 25])
def test_damaged_exif_is_no_orientation(length: int, tmp_path: Path) -> None:
    data = turned(tmp_path, 6, Image.fromarray(COLOUR)).read_bytes()
    start = data.index(b"Exif\0\0")
    size = int.from_bytes(data[start - 2 : start], "big")
    cut = data[: start - 2] + (length + 2).to_bytes(2, "big") + data[start : start + length] + data[start + size - 2 :]
    (tmp_path / "cut.jpg").write_bytes(cut)
    assert read_rgb(tmp_path / "cut.jpg").shape == (32, 48, 3)


def test_damaged_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved(tmp_path / "whole.jpg", Image.fromarray(COLOUR)).read_bytes()
    contents = {
        "empty.jpg": b"",
        "page.jpg": b"<html>404</html>",
        "half.jpg": whole[: len(whole) // 2],
        "half.png": saved(tmp_path / "whole.png", Image.fromarray(COLOUR)).read_bytes()[:80],
        "header.jpg": whole[:20],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableImage, match=name):
            read_rgb(tmp_path / name)
    with pytest.raises(UnreadableImage, match="gone"):
        read_rgb(tmp_path / "gone.jpg")
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    for name in ("whole.jpg", "whole.png"):
        with pytest.raises(UnreadableImage, match="48 x 32 pixels"):
            read_rgb(tmp_path / name)


@pytest.mark.parametrize("read", [read_rgb, read_size])
def test_what_is_not_a_regular_file_or_too_large_is_not_opened(read: Callable[[Path], object], tmp_path: Path) -> None:
    """Opening a named pipe would block for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, Path("/dev/zero")):
        with pytest.raises(UnreadableImage, match=f"{path}: not a file"):
            read(path)
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(UnreadableImage, match="bytes are more than"):
        read(tmp_path / "huge.png")


def test_files_are_read_whole_however_little_comes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 9
    (tmp_path / "a.jpg").write_bytes(content)
    read = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, count: read(descriptor, min(count, 1000)))
    assert read_file(tmp_path / "a.jpg") == content


def test_one_pixel(tmp_path: Path) -> None:
    assert read_rgb(saved(tmp_path / "dot.png", Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize("name", ["turned.jpg", "cmyk.jpg", "turned.png", "turned.webp", "turned.tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
def test_strips_are_turned_as_the_whole(
    name: str, orientation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "STRIP", 48 * 5)  # 32 rows: six strips of five and one of two
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(COLOUR).convert("CMYK" if name == "cmyk.jpg" else "RGB")
    path = saved(tmp_path / name, image, exif=exif)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(read_rgb(path), upright)
    assert read_size(path) == upright.shape[1::-1]


@pytest.mark.parametrize(("name", "mode"), [("deep.png", "I;16"), ("float.tiff", "F"), ("turned.jpg", "RGB")])
def test_little_more_than_the_result_is_held(
    name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy's memory. Pillow's own, 2 to 4 bytes for each pixel, is not seen by tracemalloc."""
    monkeypatch.setattr(images, "STRIP", 2**14)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / name, Image.new(mode, (1000, 800)), **({"exif": exif} if mode == "RGB" else {}))
    content = path.read_bytes()
    tracemalloc.start()
    try:
        pixels = images.decode_rgb(content, name)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    stored = pixels.nbytes if mode == "RGB" else 0  # before it is turned
    assert peak - stored < 1.3 * pixels.nbytes


@pytest.mark.parametrize("orientation", [1, 6])
def test_jpegs_are_decoded_to_fewer_pixels(orientation: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = blobs.resize((144, 96), Image.Resampling.BICUBIC).crop((0, 0, 141, 95))
    opened = images.open_file(turned(tmp_path, orientation, smooth))
    whole = opened.decode()
    assert whole.shape == (opened.height, opened.width, 3) == ((95, 141, 3) if orientation == 1 else (141, 95, 3))
    memory = np.empty(whole.size + 5, np.uint8)
    for reduction in images.REDUCTIONS:
        pixels = opened.decode(reduction, memory)
        height, width = -(-opened.height // reduction), -(-opened.width // reduction)
        assert pixels.shape == (height, width, 3)
        assert np.shares_memory(pixels, memory) == (orientation == 1)
        # A pixel is the mean of a square of `reduction` pixels, counted from the stored image's corner.
        squares = whole[: opened.height // reduction * reduction]
        columns = opened.width // reduction * reduction
        squares = squares[:, -columns:] if orientation == 6 else squares[:, :columns]
        means = squares.reshape(squares.shape[0] // reduction, reduction, -1, reduction, 3).mean((1, 3))
        inner = pixels[: len(means), -means.shape[1] :] if orientation == 6 else pixels[: len(means), : means.shape[1]]
        assert np.abs(inner - means).mean() < 1.5
    png = images.open_file(saved(tmp_path / "a.png", smooth))
    assert np.array_equal(png.decode(8), np.asarray(smooth))
    with pytest.raises(UnreadableImage, match=r"half\.jpg"):
        images.open_image((tmp_path / "turned.jpg").read_bytes()[:900], "half.jpg").decode(2)


def test_sizes_are_read_in_threads_without_warnings(tmp_path: Path) -> None:
    """`warnings.catch_warnings` in several threads leaves the filters of another thread behind."""
    path = saved(tmp_path / "a.png", Image.fromarray(COLOUR))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read_size, [path] * 200)) == {(48, 32)}
        assert len(list(pool.map(read_rgb, [path] * 50))) == 50
    assert warnings.filters == before
