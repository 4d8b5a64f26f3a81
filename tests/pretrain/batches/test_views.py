"""Crops and random numbers: what a view depends on, and what it does not."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from foundation.images import REDUCTIONS, OpenImage, UnreadableImage, open_file, read_rgb
from pretrain.batches.draws import Augmentation, draw_crop, random_stream
from pretrain.batches.loader import build_loader
from pretrain.batches.resizing import INTERPOLATIONS, resize
from pretrain.batches.sampler import SequentialBatches
from pretrain.batches.views import ViewDataset, center_crop, reduced, reduction_for
from pretrain.images.sources import ArraySource, FileSource, build_source

RECIPES = [Augmentation(flip=0.5, jitter=0.8, brightness=0.4, blur=1.0), Augmentation(flip=0.5, solarize=0.2)]


def batches(root: Path, workers: int) -> list[torch.Tensor]:
    dataset = ViewDataset(build_source("folder", str(root), "train"), 24, RECIPES, seed=3)
    loader = build_loader(dataset, SequentialBatches(np.arange(24), 8, epoch=2), workers, torch.device("cpu"))
    return [part for batch in loader for part in (batch.images, batch.params, batch.labels, batch.indices)]


def test_views_do_not_depend_on_the_workers(photos: Path) -> None:
    alone, two = batches(photos, 0), batches(photos, 2)
    assert len(alone) == 12
    assert all(torch.equal(a, b) for a, b in zip(alone, two, strict=True))


def test_views_are_the_resized_boxes_whatever_the_file(tmp_path: Path) -> None:
    # JPEGs of several sizes, which are decoded into one memory; a turned one and a PNG, which are not; a damaged one.
    rng = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("a.jpg", "turned.jpg", "c.png", "damaged.jpg", "e.jpg", "size.jpg")]
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, path in enumerate(paths):
        blobs = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        image = blobs.resize((16, 16) if path.stem == "size" else (40 + 9 * number, 60 - 7 * number))
        image.save(path, **{"exif": exif} if path.stem == "turned" else {})
    paths[3].write_bytes(paths[3].read_bytes()[:200])
    whole = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))  # of a square, a crop of the size of the view
    dataset = ViewDataset(FileSource(paths, range(6), ["any"]), 16, [Augmentation(), whole], seed=1)
    batch = dataset.read([(epoch, index) for epoch in range(3) for index in range(6)])
    assert batch.labels.tolist() == [0, 1, 2, 4, 4, 5] * 3
    for place, (epoch, index) in enumerate(itertools.product(range(3), range(6))):
        pixels = torch.from_numpy(read_rgb(paths[index if index != 3 else 4])).permute(2, 0, 1)
        for view, augmentation in enumerate(dataset.augmentations):
            top, left, h, w = draw_crop(augmentation, random_stream(1, epoch, index, view), *pixels.shape[1:])
            expected = resize(pixels[:, top : top + h, left : left + w], 16, 16)
            assert torch.equal(batch.images[view, place], expected)


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
        def open(self, index: int) -> OpenImage:
            if index in (1, 2):
                raise UnreadableImage(f"image {index}: broken")
            return super().open(index)

    images = np.arange(4, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    dataset = ViewDataset(Damaged(images, [0, 1, 2, 3], list("abcd")), 8, [])
    batch = dataset.read([(0, 1), (0, 0)])
    assert (batch.labels.tolist(), batch.indices.tolist()) == ([3, 0], [1, 0])
    assert batch.images.float().mean((0, 2, 3, 4)).tolist() == [3, 0]
    assert batch.unreadable == ["image 1: broken", "image 2: broken"]


def cut_off(path: Path) -> None:
    """Leave of a JPEG what can be opened, but not decoded."""
    path.write_bytes(path.read_bytes()[:-8])
    assert open_file(path).fills_buffer


@pytest.mark.parametrize("views", [[], RECIPES])
def test_images_that_are_cut_off_behind_their_header_are_replaced_too(
    views: list[Augmentation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{number}.jpg" for number in range(5)]
    for number, path in enumerate(paths):
        Image.new("RGB", (40, 30), (50 * number,) * 3).save(path)
    for number in (1, 3):
        cut_off(paths[number])
    monkeypatch.setattr("pretrain.batches.views.AHEAD", 3)
    began: list[int] = []
    dataset = ViewDataset(FileSource(paths, range(5), []), 8, views)
    batch = dataset.read([(0, index) for index in range(5)], began.append)
    assert batch.labels.tolist() == [0, 2, 2, 4, 4]
    assert batch.images.float().mean((0, 2, 3, 4)).round().tolist() == [0, 100, 100, 200, 200]
    assert [message.split(":")[0] for message in batch.unreadable] == [str(paths[1]), str(paths[3])]
    assert began == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4]


def test_an_image_that_cannot_be_opened_is_replaced_by_one_that_cannot_be_decoded(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.jpg" for number in range(3)]
    for number, path in enumerate(paths):
        Image.new("RGB", (40, 30), (50 * number,) * 3).save(path)
    paths[0].write_bytes(b"")
    cut_off(paths[1])
    batch = ViewDataset(FileSource(paths, range(3), []), 8, RECIPES).read([(0, 0)])
    assert batch.labels.tolist() == [2]
    assert [message.split(":")[0] for message in batch.unreadable] == [str(paths[0]), str(paths[1])]


@pytest.mark.parametrize("damage", [cut_off, lambda path: path.write_bytes(b"")])
def test_too_many_damaged_images_in_a_row_are_an_error_that_names_the_last(
    damage: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{number}.jpg" for number in range(8)]
    for path in paths:
        Image.new("RGB", (40, 30)).save(path)
    for number in (0, 1, 4, 5, 6):
        damage(paths[number])
    monkeypatch.setattr("pretrain.batches.views.MAX_REPLACEMENTS", 3)
    with pytest.raises(UnreadableImage, match=r"^3 images in a row cannot be read, the last: .*/6\.jpg"):
        ViewDataset(FileSource(paths, range(8), []), 8, RECIPES).read([(0, index) for index in range(8)])


def test_large_images_are_opened_one_by_one_and_their_memory_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{number}.jpg" for number in range(3)]
    for number, path in enumerate(paths):
        Image.effect_noise((60 + number, 50), 99).convert("RGB").save(path)
    keys = [(0, index) for index in range(3)]
    expected = ViewDataset(FileSource(paths, range(3), []), 8, RECIPES).read(keys)
    monkeypatch.setattr("pretrain.batches.views.KEPT_MEMORY", 100)
    began: list[int] = []
    dataset = ViewDataset(FileSource(paths, range(3), []), 8, RECIPES)
    batch = dataset.read(keys, began.append)
    assert torch.equal(batch.images, expected.images)
    assert batch.unreadable == []
    assert began == [0, 0, 1, 1, 2, 2]
    assert len(dataset._memory) == 0


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
        samples = dataset.read([(3, index) for index in range(40)]).images.float()
        places[region] = samples[:, :, :2].mean((3, 4)).transpose(0, 1)  # (40, view, row and column)
        assert all(torch.equal(dataset.read([(3, i)]).images.float(), samples[:, i : i + 1]) for i in (0, 7))
    apart = {region: (found[:, 0] - found[:, 1]).norm(dim=1).max() for region, found in places.items()}
    # A region of a tenth has sides of up to 0.32 x (4/3)^(1/2) of the image's, and its views' centres lie within it.
    assert apart[0.05, 0.1] < 0.5 * side * 0.37 * 2**0.5 < apart[1.0, 1.0]
    assert places[0.05, 0.1].std(dim=0).min() > 30  # the regions themselves lie anywhere


@pytest.mark.parametrize("orientation", [1, 6])
def test_scaled_decoding_leaves_the_draws_and_nearly_the_pixels(orientation: int, tmp_path: Path) -> None:
    blobs = np.random.default_rng(0).integers(90, 160, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(blobs).resize((397, 301), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", quality=92, exif=exif)
    image.save(tmp_path / "b.png", exif=exif)
    files = FileSource([tmp_path / "a.jpg", tmp_path / "b.png"], [0, 0], ["any"])
    keys = [(epoch, index) for epoch in range(8) for index in (0, 1)]
    crops = [Augmentation(crop_scale=(0.02, 1.0), flip=0.5)] * 2
    exact, scaled = (ViewDataset(files, 16, crops, scaled=scaled).read(keys) for scaled in (False, True))
    assert torch.equal(exact.params, scaled.params)
    assert torch.equal(exact.images[:, 1::2], scaled.images[:, 1::2])  # of the PNG
    apart = (exact.images.int() - scaled.images.int()).abs().float().mean((0, 2, 3, 4))[::2]
    assert 0 < apart.max() < 4
    assert apart.mean() < 2.5  # the borders of the boxes are rounded to decoded pixels
    large, exactly = (ViewDataset(files, 200, crops, scaled=scaled).read(keys[:2]) for scaled in (False, True))
    assert torch.equal(large.images, exactly.images)  # all crops are smaller than twice the views


def test_a_reduced_box_lies_in_the_image_and_is_never_smaller_than_the_view() -> None:
    rng = np.random.default_rng(0)
    chosen = set()
    for _ in range(3000):
        size = int(rng.integers(1, 40))
        sides = rng.integers(1, 900, 2)
        ends = [np.sort(rng.integers(0, side + 1, 2)) for side in sides]
        (top, bottom), (left, right) = ((int(a), max(int(b), int(a) + 1)) for a, b in ends)
        box = top, left, bottom - top, right - left
        reduction = reduction_for([box, (0, 0, 900, 900)], size)
        chosen.add(reduction)
        assert reduction == 1 or min(box[2:]) >= reduction * size
        assert reduction == 8 or min(box[2:]) < 2 * reduction * size
        y, x, height, width = reduced(box, reduction)
        assert min(height, width) >= (size if reduction > 1 else 1)
        assert y + height <= -(-max(bottom, sides[0]) // reduction)
        assert x + width <= -(-max(right, sides[1]) // reduction)
    assert chosen == set(REDUCTIONS)
