import json

import pytest

pytest.importorskip("detectron2")

from cli.errors import UserError
from detection import datasets

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def annotations(coco_root):
    return coco_root / "coco" / "annotations" / "instances_train2017.json"


def test_a_whole_dataset_passes(tiny):
    datasets.register(tiny)
    for name in tiny:
        datasets.check(name, classes=2)


def test_the_number_of_classes_is_compared(tiny):
    with pytest.raises(UserError, match=r"has 2 categories, but MODEL\.ROI_HEADS\.NUM_CLASSES is 80"):
        datasets.check("tiny_train", classes=80)


def test_missing_files_are_named_with_the_layout(tiny, annotations, coco_root):
    (coco_root / "coco" / "train2017").rename(coco_root / "elsewhere")
    with pytest.raises(UserError, match=r"train2017 does not exist; expected are .*DETECTRON2_DATASETS"):
        datasets.check("tiny_train", classes=2)
    annotations.unlink()
    with pytest.raises(UserError, match=r"instances_train2017\.json does not exist"):
        datasets.check("tiny_train", classes=2)


def test_images_that_are_not_on_the_disk_are_counted(tiny, coco_root):
    for name in ("001.jpg", "003.jpg"):
        (coco_root / "coco" / "train2017" / name).unlink()
    with pytest.raises(UserError, match=r"2 of the 4 images that .*, the first being 001\.jpg"):
        datasets.check("tiny_train", classes=2)


def test_text_that_is_no_json_is_named(tiny, annotations):
    annotations.write_text(annotations.read_text()[:-20])
    with pytest.raises(UserError, match=r"instances_train2017\.json: not valid JSON"):
        datasets.check("tiny_train", classes=2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.clear(), "there is no list 'images'"),
        (lambda c: c.pop("annotations"), "there is no list 'annotations'"),
        (lambda c: c.update(images={}), "there is no list 'images'"),
        (lambda c: c["images"].clear(), "the list 'images' is empty"),
        (lambda c: c["images"][1].pop("height"), r"images\[1\] has no 'height'"),
        (lambda c: c["annotations"][3].pop("bbox"), r"annotations\[3\] has no 'bbox'"),
        (lambda c: c["annotations"][2].update(id=1), "an id occurs twice in 'annotations'"),
        (lambda c: c["annotations"][2].update(category_id=9), r"annotations\[2\] has category_id 9, which 'cat"),
        (lambda c: c["annotations"][2].update(image_id=9), r"annotations\[2\] has image_id 9, which 'images'"),
    ],
)
def test_what_the_format_asks_for_is_checked(spoil, message, tiny, annotations):
    content = json.loads(annotations.read_text())
    spoil(content)
    annotations.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        datasets.check("tiny_train", classes=2)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"there is no dataset 'coco_2017_trian'; nearest: coco_2017_train"):
        datasets.register(["coco_2017_trian"])


def test_another_format_is_refused():
    with pytest.raises(UserError, match="'voc_2007_test' is not in COCO's format"):
        datasets.check("voc_2007_test", classes=20)


def test_the_embedded_scenes_are_registered_from_where_they_are_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr("shapes.ensure_rendered", lambda: tmp_path)
    for name in datasets.SHAPES:
        if name in DatasetCatalog.list():
            pytest.skip("registered by another test already")
    try:
        datasets.register(["shapes_train", "shapes_val"])
        metadata = MetadataCatalog.get("shapes_val")
        assert metadata.image_root == str(tmp_path / "scenes" / "val")
        assert metadata.json_file == str(tmp_path / "scenes" / "annotations" / "instances_val.json")
    finally:
        for name in datasets.SHAPES:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_class_names():
    from shapes import CLASSES

    assert datasets.class_names("shapes_val", len(CLASSES)) == list(CLASSES)
    assert datasets.class_names("coco_2017_val", 80)[0] == "person"
    assert datasets.class_names("elsewhere", 2) == ["class 0", "class 1"]


def test_a_subset_is_seeded_and_nested():
    tenth, half = datasets.subset(200, 0.1, seed=0), datasets.subset(200, 0.5, seed=0)
    assert len(tenth) == 20
    assert len(half) == 100
    assert set(tenth) < set(half) < set(range(200))
    assert tenth == sorted(tenth) == datasets.subset(200, 0.1, seed=0) != datasets.subset(200, 0.1, seed=1)
    assert len(datasets.subset(200, 0.0001, seed=0)) == 1
