"""The rendered folder: counts, determinism, and annotations that pycocotools reads."""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from shapes import CLASSES, ensure_rendered
from shapes.polygons import MAX_POINTS


def _bytes(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_every_part_has_its_count(rendered, small):
    assert len(list((rendered / "unlabeled").glob("*.jpg"))) == small.unlabeled
    for name in CLASSES:
        assert len(list((rendered / "objects/train" / name).glob("*.jpg"))) == small.objects_train
        assert len(list((rendered / "objects/val" / name).glob("*.jpg"))) == small.objects_val
    assert len(list((rendered / "scenes/train").glob("*.jpg"))) == small.scenes_train
    assert len(list((rendered / "scenes/val").glob("*.jpg"))) == small.scenes_val
    card = json.loads((rendered / "dataset.json").read_text())
    assert card["seed"] == 0
    assert card["classes"] == list(CLASSES)
    assert card["counts"]["objects/train"] == small.objects_train * len(CLASSES)


def test_pictures_are_rgb_jpegs_of_the_size_asked_for(rendered, small):
    picture = Image.open(rendered / "unlabeled" / "000000.jpg")
    assert (picture.format, picture.mode) == ("JPEG", "RGB")
    assert picture.size == (small.object_side, small.object_side)


def test_the_same_seed_gives_the_same_bytes_with_two_processes(rendered, small, tmp_path):
    again = ensure_rendered(tmp_path / "b", processes=2, progress=False, recipe=small)
    assert _bytes(again) == _bytes(rendered)


def test_a_picture_does_not_depend_on_how_many_there_are(rendered, small, tmp_path):
    more = ensure_rendered(
        tmp_path / "b", processes=1, progress=False, recipe=replace(small, unlabeled=8, scenes_train=1)
    )
    for name in ("unlabeled/000005.jpg", "scenes/train/000000.jpg"):
        assert (more / name).read_bytes() == (rendered / name).read_bytes()


def test_another_seed_gives_other_pictures(rendered, small, tmp_path):
    other = _bytes(ensure_rendered(tmp_path / "b", seed=1, processes=1, progress=False, recipe=small))
    one = _bytes(rendered)
    assert other.keys() == one.keys()
    pictures = [name for name in one if name.endswith(".jpg")]
    assert all(one[name] != other[name] for name in pictures)


def test_parts_do_not_share_pictures(rendered):
    pictures = [content for name, content in _bytes(rendered).items() if name.endswith(".jpg")]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("split", ["train", "val"])
def test_pycocotools_reads_the_annotations(rendered, small, split):
    coco_module = pytest.importorskip("pycocotools.coco")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_module.COCO(str(rendered / f"scenes/annotations/instances_{split}.json"))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert sorted(coco.getImgIds()) == list(range(1, getattr(small, f"scenes_{split}") + 1))
    assert sorted(coco.getAnnIds()) == list(range(1, len(coco.anns) + 1))
    for image in coco.loadImgs(coco.getImgIds()):
        with Image.open(rendered / "scenes" / split / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert 1 <= len(annotations) <= small.scene_objects
        for annotation in annotations:
            _check(annotation, coco.annToMask(annotation), image)


def _check(annotation, mask, image):
    assert annotation["iscrowd"] == 0
    assert annotation["segmentation"]
    assert all(6 <= len(part) <= 2 * MAX_POINTS and len(part) % 2 == 0 for part in annotation["segmentation"])
    points = np.concatenate([np.reshape(part, (-1, 2)) for part in annotation["segmentation"]])
    x, y, width, height = annotation["bbox"]
    assert points.min(axis=0) == pytest.approx([x, y])
    assert points.max(axis=0) == pytest.approx([x + width, y + height])
    assert min(x, y) >= 0
    assert x + width <= image["width"]
    assert y + height <= image["height"]
    assert mask.sum() == pytest.approx(annotation["area"], rel=0.06, abs=4)


def test_masks_of_one_scene_do_not_overlap(rendered):
    coco_module = pytest.importorskip("pycocotools.coco")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_module.COCO(str(rendered / "scenes/annotations/instances_train.json"))
    for image in coco.getImgIds():
        masks = [coco.annToMask(one).astype(int) for one in coco.loadAnns(coco.getAnnIds(image))]
        overlap = (sum(masks) > 1).sum()
        assert overlap <= 0.03 * sum(mask.sum() for mask in masks)
