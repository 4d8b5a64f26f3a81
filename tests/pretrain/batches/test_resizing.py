"""Resizing: equal to PyTorch's whichever way is used, and to the memory that belongs to the images."""

import ctypes
import itertools
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from pretrain.batches import resizing
from pretrain.batches.resizing import INTERPOLATIONS, compute_weights, prepare_resize, resize

LOAD = resizing.load_library.__wrapped__  # without its cache
LIBRARY = resizing.load_library()
NEEDS_LIBRARY = pytest.mark.skipif(not LIBRARY, reason="not compiled, or the processor does not have the instructions")


@pytest.fixture(params=[pytest.param(True, id="AVX-512", marks=NEEDS_LIBRARY), pytest.param(False, id="PyTorch")])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether resizing.c is used; otherwise PyTorch does the work."""
    monkeypatch.setattr(resizing, "load_library", lambda: LIBRARY if request.param else None)
    return request.param


def random_pixels(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """(1, 3, H, W) channels last; many values are 0 or 255, so that sums leave the range of uint8 on both sides."""
    values = np.random.default_rng(seed).integers(-255, 511, (1, height, width, 3)).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(values).permute(0, 3, 1, 2)


def interpolate(image: torch.Tensor, height: int, width: int, interpolation: str) -> torch.Tensor:
    return functional.interpolate(image.contiguous(), (height, width), mode=interpolation, antialias=True)


@pytest.mark.usefixtures("compiled")
def test_resize_equals_pillow_to_two_levels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(pixels).resize((24, 20), Image.Resampling.BICUBIC)).astype(int)
    ours = resize(torch.from_numpy(pixels).permute(2, 0, 1), 20, 24).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - theirs).max() <= 2


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("layout", ["channels last", "channels first"])
def test_resize_is_interpolate_whatever_the_layout_and_the_sides(layout: str, interpolation: str) -> None:
    whole = random_pixels(12, 14)[0]
    whole = whole.contiguous() if layout == "channels first" else whole
    for height, width, to_height, to_width in itertools.product((1, 2, 9), (1, 7), (2, 7, 9, 20), (1, 7, 9)):
        image = whole[:, 2 : 2 + height, 3 : 3 + width]
        theirs = interpolate(image[None], to_height, to_width, interpolation)
        batch = torch.empty(2, to_height, to_width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        assert torch.equal(resize(image[None], to_height, to_width, interpolation, out=batch[1:]), theirs)
        assert torch.equal(batch[1], theirs[0])
        assert torch.equal(resize(image, to_height, to_width, interpolation), theirs[0])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_resize_is_interpolate_for_random_sizes(interpolation: str) -> None:
    rng, whole = np.random.default_rng(1), random_pixels(400, 600)
    for _ in range(150):
        height, width, to_height, to_width = (int(rng.integers(1, most)) for most in (400, 600, 260, 260))
        top, left = int(rng.integers(400 - height)), int(rng.integers(600 - width))
        image = whole[..., top : top + height, left : left + width]
        theirs = interpolate(image, to_height, to_width, interpolation)
        assert torch.equal(resize(image, to_height, to_width, interpolation), theirs), (
            height,
            width,
            to_height,
            to_width,
        )


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_resize_is_interpolate_for_each_width(interpolation: str) -> None:
    """Each width has weights of its own, and some of them lie close to the middle between two integers."""
    whole = random_pixels(3, 800)
    for width in range(1, 800, 3):
        image = whole[..., :width]
        assert torch.equal(resize(image, 2, 96, interpolation), interpolate(image, 2, 96, interpolation)), width


@pytest.mark.parametrize(
    ("width", "to_width"), [(1, 5), (2, 9), (21, 22), (22, 21), (100, 64), (300, 64), (450, 64), (700, 64)]
)
def test_only_the_memory_of_both_images_is_touched(width: int, to_width: int) -> None:
    """The image ends where no page of memory follows: reading one byte further would end this process."""
    size = 3 * 9 * width
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    no_access = ctypes.c_int(0)
    assert not libc.mprotect(ctypes.c_void_p(address + pages * mmap.PAGESIZE), mmap.PAGESIZE, no_access)
    bytes_before = torch.frombuffer(memory, dtype=torch.uint8, count=pages * mmap.PAGESIZE)
    image = bytes_before[-size:].view(1, 9, width, 3).permute(0, 3, 1, 2)
    image.copy_(random_pixels(9, width))
    target = torch.full((64 + 3 * 7 * to_width + 64,), 7, dtype=torch.uint8)
    out = target[64:-64].view(1, 7, to_width, 3).permute(0, 3, 1, 2)
    prepare_resize(image, out, "bicubic")()
    assert torch.equal(out, interpolate(image, 7, to_width, "bicubic"))
    assert (target[:64] == 7).all()
    assert (target[-64:] == 7).all()


@pytest.mark.usefixtures("compiled")
def test_a_prepared_resize_reads_the_pixels_of_its_time() -> None:
    image, out = random_pixels(9, 9), torch.empty(1, 5, 5, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    work = prepare_resize(image, out, "bicubic")
    image.copy_(random_pixels(9, 9, seed=1))
    work()
    assert torch.equal(out, interpolate(image, 5, 5, "bicubic"))


def test_what_is_tested_is_used(compiled: bool) -> None:
    image, out = random_pixels(40, 30), torch.empty(1, 20, 20, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    assert (prepare_resize(image, out, "bicubic").func is resizing._resize_rgb) == compiled  # type: ignore[attr-defined]


def test_weights_by_hand() -> None:
    """Two pixels to one: the triangle is 2 pixels wide to each side, and 0.75 high at both pixels' middles."""
    first, weights, precision = compute_weights(2, 1, "bilinear")
    assert (first.tolist(), (weights / 2**precision).tolist()) == ([0], [[0.5, 0.5]])
    first, weights, precision = compute_weights(1, 3, "bicubic")
    assert (first.tolist(), (weights / 2**precision).tolist()) == ([0] * 3, [[1, 0]] * 3)
    first, weights, precision = compute_weights(4, 8, "bilinear")
    assert first.tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    assert (weights / 2**precision).tolist()[1:3] == [[0.75, 0.25], [0.25, 0.75]]
    assert np.abs(weights).max() >= 2**14  # as precise as int16 allows


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_library_that_cannot_be_loaded_is_left_out(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "library.so").write_bytes(content)
    monkeypatch.setattr(resizing, "LIBRARIES", [tmp_path / "library.so"])
    assert LOAD() is None


@NEEDS_LIBRARY
def test_a_library_of_another_version_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LOAD() is not None
    monkeypatch.setattr(resizing, "INTERFACE", resizing.INTERFACE + 1)
    assert LOAD() is None
