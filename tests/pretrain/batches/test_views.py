"""Crops and random numbers: what a view depends on, and what it does not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from foundation.images import UnreadableImage
from pretrain.batches.loader import build_loader
from pretrain.batches.sampler import SequentialBatches
from pretrain.batches.views import (
    INTERPOLATIONS,
    Augmentation,
    ViewDataset,
    center_crop,
    draw_crop,
    random_stream,
    resize,
)
from pretrain.images.sources import ArraySource, build_source

RECIPES = [Augmentation(flip=0.5, jitter=0.8, brightness=0.4, blur=1.0), Augmentation(flip=0.5, solarize=0.2)]


def batches(root: Path, workers: int) -> list[torch.Tensor]:
    dataset = ViewDataset(build_source("folder", str(root), "train"), 24, RECIPES, seed=3)
    loader = build_loader(dataset, SequentialBatches(np.arange(24), 8, epoch=2), workers, torch.device("cpu"))
    return [part for batch in loader for part in (batch.images, batch.params, batch.labels, batch.indices)]


def test_views_do_not_depend_on_the_workers(photos: Path) -> None:
    alone, two = batches(photos, 0), batches(photos, 2)
    assert len(alone) == 12
    assert all(torch.equal(a, b) for a, b in zip(alone, two, strict=True))


def test_views_differ_by_seed_epoch_index_and_view() -> None:
    draws = {
        random_stream(*key).random() for key in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    }
    assert len(draws) == 5
    assert random_stream(5, 6, 7, 1).random() == random_stream(5, 6, 7, 1).random()


def test_crops_are_distributed_as_torchvisions() -> None:
    augmentation = Augmentation(crop_scale=(0.08, 1.0))
    ours = np.array([draw_crop(augmentation, random_stream(0, 0, i, 0), 90, 120) for i in range(4000)])
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(32, scale=(0.08, 1.0))
    params = [reference.make_params([torch.empty(3, 90, 120)]) for _ in range(4000)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params])
    assert (ours[:, 0] + ours[:, 2]).max() <= 90
    assert (ours[:, 1] + ours[:, 3]).max() <= 120
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=1.5)
    np.testing.assert_allclose(ours.std(0), theirs.std(0), atol=1.5)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_any_image_has_a_crop(height: int, width: int) -> None:
    for i in range(50):
        top, left, h, w = draw_crop(Augmentation(crop_scale=(0.08, 0.1)), random_stream(0, 0, i, 0), height, width)
        assert h >= 1
        assert w >= 1
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
    assert center_crop(torch.zeros(3, height, width, dtype=torch.uint8), 8).shape == (3, 8, 8)


def test_resize_equals_pillow_to_two_levels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(pixels).resize((24, 20), Image.Resampling.BICUBIC)).astype(int)
    ours = resize(torch.from_numpy(pixels).permute(2, 0, 1), 20, 24).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - theirs).max() <= 2


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (37, 90), (91, 38), (500, 375)])
@pytest.mark.parametrize("size", [32, 64, 224])
def test_center_crop_is_torchvisions(size: int, height: int, width: int, interpolation: str) -> None:
    """Resize and CenterCrop with the sizes of thesis B.1.2; of 32 pixels, int(32 x 8 / 7) = 36 (HaoChen et al.)."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))
    resized = {32: 36, 64: 73, 224: 256}[size]
    theirs = v2.Compose([v2.Resize(resized, v2.InterpolationMode(interpolation)), v2.CenterCrop(size)])(image)
    assert torch.equal(center_crop(image, size, interpolation), theirs)


def test_unreadable_images_are_replaced_by_the_next_and_named() -> None:
    class Damaged(ArraySource):
        def read(self, index: int) -> np.ndarray:
            if index in (1, 2):
                raise UnreadableImage(f"image {index}: broken")
            return super().read(index)

    images = np.arange(4, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    dataset = ViewDataset(Damaged(images, [0, 1, 2, 3], list("abcd")), 8, [])
    sample = dataset[0, 1]
    assert (sample.label, sample.index, int(sample.images.float().mean())) == (3, 1, 3)
    assert sample.unreadable == ["image 1: broken", "image 2: broken"]


def test_views_of_one_region_show_the_same_place() -> None:
    """Each pixel holds its place, so that a view tells where it was cropped."""
    side = 240
    rows, columns = np.mgrid[:side, :side].astype(np.uint8)
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=2)
    source = ArraySource(image[None].repeat(40, 0), [0] * 40, ["a"])
    views = [Augmentation(crop_scale=(0.2, 0.4))] * 2
    places = {}
    for region in ((1.0, 1.0), (0.05, 0.1)):
        dataset = ViewDataset(source, 16, views, region=region)
        samples = [dataset[3, index].images.float() for index in range(40)]
        places[region] = torch.stack([sample[:, :2].mean((2, 3)) for sample in samples])  # (40, view, row and column)
        assert all(torch.equal(dataset[3, index].images.float(), samples[index]) for index in (0, 7))
    apart = {region: (found[:, 0] - found[:, 1]).norm(dim=1).max() for region, found in places.items()}
    # A region of a tenth has sides of up to 0.32 x (4/3)^(1/2) of the image's, and its views' centres lie within it.
    assert apart[0.05, 0.1] < 0.5 * side * 0.37 * 2**0.5 < apart[1.0, 1.0]
    assert places[0.05, 0.1].std(dim=0).min() > 30  # the regions themselves lie anywhere
