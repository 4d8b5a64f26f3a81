"""Operations on the device against torchvision's, each image with its own parameters."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from pretrain.batches import augment
from pretrain.batches.draws import Augmentation, Param, draw_photometric, random_stream

IMAGES = (torch.rand(6, 3, 33, 40, generator=torch.Generator().manual_seed(0)) * 255).round().to(torch.uint8)
IMAGES[5] = 77  # one without contrast, where hue and saturation are undefined
FACTORS = np.array([0.6, 0.8, 1.0, 1.2, 1.4, 0.9], np.float32)
TURNS = np.array([-0.1, -0.03, 0.0, 0.05, 0.1, 0.07], np.float32)
SIGMAS = np.array([0.1, 0.5, 1.0, 1.5, 2.0, 0.3], np.float32)
JITTERS = [[1, 0, 2, 3], [0, 1, 3, 2], [3, 2, 1, 0], [2, 3, 0, 1]]  # the contrast, 1, first to last
OPERATIONS: dict[str, tuple[Callable, np.ndarray, Callable]] = {
    "brightness": (augment.adjust_brightness, FACTORS, tv.adjust_brightness),
    "contrast": (augment.adjust_contrast, FACTORS, tv.adjust_contrast),
    "saturation": (augment.adjust_saturation, FACTORS, tv.adjust_saturation),
    "hue": (augment.adjust_hue, TURNS, tv.adjust_hue),
    "hue, far": (augment.adjust_hue, 5 * TURNS, tv.adjust_hue),
    "blur": (augment.gaussian_blur, SIGMAS, lambda x, sigma: tv.gaussian_blur(x, [13, 13], [sigma, sigma])),
    "grayscale": (
        lambda x, _: augment.grayscale(x).expand_as(x),
        FACTORS,
        lambda x, _: tv.rgb_to_grayscale(x, 3),
    ),
    "solarize": (
        lambda x, _: augment.solarize(x),
        FACTORS,
        lambda x, _: tv.solarize(x, 128 if x.dtype == torch.uint8 else 128 / 255),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_torchvision(name: str) -> None:
    ours, parameters, reference = OPERATIONS[name]
    result = ours(IMAGES / 255, parameters)
    for image, parameter, out in zip(IMAGES, parameters.tolist(), result, strict=True):
        exact = reference(image[None] / 255, parameter)[0]
        rounded = reference(image[None], parameter)[0]
        torch.testing.assert_close(out, exact, rtol=0, atol=2e-6)
        assert (out * 255 - rounded).abs().max() <= 2


def test_whole_chain_equals_torchvision_image_by_image() -> None:
    augmentation = Augmentation(
        flip=0.5,
        jitter=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        gray=0.2,
        blur=0.5,
        solarize=0.3,
    )
    images = IMAGES.repeat(6, 1, 1, 1)
    table = np.array(
        [draw_photometric(augmentation, random_stream(0, 0, i, 0)) for i in range(len(images))], np.float32
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    result = augment.augment(images, torch.from_numpy(table), mean, std)
    assert result.is_contiguous(memory_format=torch.channels_last)
    orders = list(permutations(range(4)))
    for image, row, out in zip(images, table, result, strict=True):
        x = image[None] / 255
        if row[Param.FLIP]:
            x = tv.horizontal_flip(x)
        steps = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
        for number in orders[int(row[Param.JITTER_ORDER])] if row[Param.JITTER_ORDER] >= 0 else ():
            x = steps[number](x, float(row[Param.BRIGHTNESS + number]))
        if row[Param.GRAY]:
            x = tv.rgb_to_grayscale(x, 3)
        if row[Param.BLUR_SIGMA]:
            x = tv.gaussian_blur(x, [13, 13], [float(row[Param.BLUR_SIGMA])] * 2)
        if row[Param.SOLARIZE]:
            x = tv.solarize(x, 128 / 255)
        expected = tv.normalize(x, mean.tolist(), std.tolist())[0]
        # Near the threshold of solarize a rounding error of 1e-7 decides; all else agrees closely.
        close = ((out - expected).abs() < 1e-3).float().mean()
        assert close > (0.995 if row[Param.SOLARIZE] else 0.99999)


@pytest.mark.parametrize(("height", "width"), [(33, 40), (5, 4), (1, 9)])
def test_blur_without_onednn_is_the_same(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = IMAGES[..., :height, :width] / 255
    expected = augment.gaussian_blur(images, SIGMAS)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.testing.assert_close(augment.gaussian_blur(images, SIGMAS), expected, rtol=0, atol=1e-6)


def test_probabilities_and_ranges_of_the_parameters() -> None:
    augmentation = Augmentation(
        flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray=0.2, blur=0.1
    )
    table = np.array([draw_photometric(augmentation, random_stream(1, 0, i, 0)) for i in range(4000)], np.float32)
    share = lambda column: (table[:, column] > 0).mean()  # noqa: E731
    assert share(Param.FLIP) == pytest.approx(0.5, abs=0.03)
    assert (table[:, Param.JITTER_ORDER] >= 0).mean() == pytest.approx(0.8, abs=0.03)
    assert share(Param.GRAY) == pytest.approx(0.2, abs=0.03)
    assert share(Param.BLUR_SIGMA) == pytest.approx(0.1, abs=0.03)
    assert share(Param.SOLARIZE) == 0
    assert set(np.unique(table[:, Param.JITTER_ORDER])) == set(range(-1, 24))
    for column, low, high in (
        (Param.BRIGHTNESS, 0.6, 1.4),
        (Param.SATURATION, 0.8, 1.2),
        (Param.HUE, -0.1, 0.1),
    ):
        assert low <= table[:, column].min() < low + 0.01
        assert high - 0.01 < table[:, column].max() <= high


def test_images_taken_a_few_at_a_time_come_out_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    augmentation = Augmentation(
        flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray=0.2, blur=0.5
    )
    table = torch.from_numpy(
        np.array([draw_photometric(augmentation, random_stream(0, 0, i, 0)) for i in range(len(IMAGES))], np.float32)
    )
    mean, std = torch.zeros(3), torch.ones(3)
    whole = augment.augment(IMAGES, table, mean, std)
    monkeypatch.setattr(augment, "CACHE_BYTES", 4 * 4 * IMAGES[0].numel() // torch.get_num_threads())  # 4 and 2
    torch.testing.assert_close(augment.augment(IMAGES, table, mean, std), whole, rtol=0, atol=1e-6)


def compare_kernels(height: int, width: int) -> None:
    """The GPU's kernels on the CPU, by Triton's interpreter, beside the reference."""
    from pretrain.batches import augment_kernels

    augment_kernels.PIXELS = 64  # so that an image takes several programs
    # One image for each place of the contrast, one that is only blurred, one only solarized, one as it is.
    params = np.zeros((7, len(Param)), np.float32)
    params[:, Param.JITTER_ORDER] = -1
    params[:4, Param.JITTER_ORDER] = [augment.ORDERS.tolist().index(order) for order in JITTERS]
    params[:4, Param.BRIGHTNESS : Param.HUE + 1] = [[1.3, 0.7, 1.2, 0.1], [0.8, 1.4, 0.5, -0.1]] * 2
    params[[0, 5], Param.FLIP] = params[1, Param.GRAY] = params[[2, 5], Param.SOLARIZE] = 1
    params[[2, 3, 4], Param.BLUR_SIGMA] = 0.1, 2.0, 1.0
    images = IMAGES[0, :, :height, :width].repeat(7, 1, 1, 1)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    expected = augment.augment(images, torch.from_numpy(params), mean, std)
    result = torch.full_like(expected, torch.nan)
    table = torch.from_numpy(augment.table_of(params))
    augment_kernels.augment(images, table, mean, std, result, augment.BLUR_RADIUS)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_kernels_compute_the_same() -> None:
    pytest.importorskip("triton")
    program = f"from {__name__} import compare_kernels as c; c(12, 20); c(5, 4)"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # must be set before Triton is imported
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[3], env=environment, check=True)
