"""Image files of every kind that users have: the right pixels, or an error that names the file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foundation import images
from foundation.images import UnreadableImage, read_rgb

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


def test_sixteen_bits_are_scaled_and_not_clipped_to_white(tmp_path: Path) -> None:
    deep = (RAMP.astype(np.uint16) * 257).astype(np.uint16)
    assert np.array_equal(read_rgb(saved(tmp_path / "deep.png", Image.fromarray(deep)))[..., 0], RAMP)


@pytest.mark.parametrize(("orientation", "bright"), [(1, "right"), (3, "left"), (6, "bottom"), (8, "top")])
def test_exif_orientation_is_applied(orientation: int, bright: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = read_rgb(saved(tmp_path / "turned.jpg", Image.fromarray(RAMP).convert("RGB"), exif=exif)).mean(2)
    halves = {"top": pixels[:8], "bottom": pixels[-8:], "left": pixels[:, :8], "right": pixels[:, -8:]}
    assert max(halves, key=lambda side: halves[side].mean()) == bright


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


def test_one_pixel(tmp_path: Path) -> None:
    assert read_rgb(saved(tmp_path / "dot.png", Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]
