"""What is checked of VOC's, LVIS's and Cityscapes' folders, and of labels of pixels."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("detectron2")

from detection import config as configs
from detection.checks import preflight
from detection.data import optional_packages
from foundation.errors import UserError
from tests.detection import formats

# isort: split
from detectron2.data import DatasetCatalog


def check(name, recipe, *pairs):
    """What the command checks of a recipe's dataset."""
    config = configs.load(recipe, pairs)
    evaluated = name in config.DATASETS.TEST
    preflight.check(config, () if evaluated else (name,), (name,) if evaluated else ())


@pytest.mark.parametrize("name", ["voc_2007_trainval", "voc_2007_test", "voc_2012_trainval"])
def test_voc_passes(name, scenes, dataset_root):
    formats.write_voc(scenes, dataset_root)
    check(name, "voc_R50_C4_24k")


def test_what_vocs_layout_asks_for_is_checked(scenes, dataset_root):
    recipe, name, folder = "voc_R50_C4_24k", "voc_2007_test", dataset_root / "VOC2007"
    with pytest.raises(
        UserError,
        match=r"missing.*: .*Main/test\.txt.* \(expected are .*JPEGImages.*DETECTRON2",
    ):
        check(name, recipe)
    formats.write_voc(scenes, dataset_root)
    with pytest.raises(UserError, match=r"boxes only: voc_2007_test; set MODEL\.MASK_ON False"):
        check(name, recipe, "MODEL.MASK_ON", "True")
    with pytest.raises(UserError, match=r"without keypoints: voc_2007_test; set MODEL\.KEYPOINT_ON False"):
        check(name, recipe, "MODEL.KEYPOINT_ON", "True")
    with pytest.raises(
        UserError,
        match=r"model's: 20, but MODEL\.ROI_HEADS\.NUM_CLASSES is 80",
    ):
        check(name, recipe, "MODEL.ROI_HEADS.NUM_CLASSES", "80")
    first, second = sorted((folder / "Annotations").glob("test_*.xml"))
    text = first.read_text()
    for old, new, message in (
        ("<name>", "<name></name><name>", r"test_000000\.xml \(object 0: there is no name\)"),
        ("<xmin>", "<left>", "not valid XML"),
        ("<height>", "<high>", "not valid XML"),
        ("<object><name>", "<object><name>un", "of a class that is not listed: un.* in test_000000"),
    ):
        first.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            check(name, recipe)
    first.write_text(text)
    second.unlink()
    with pytest.raises(UserError, match=r"missing files or folders: .*Annotations/test_000001\.xml"):
        check(name, recipe)
    second.write_text(text)
    (folder / "JPEGImages" / "test_000000.jpg").unlink()
    with pytest.raises(UserError, match=r"images whose file is missing: .*JPEGImages/test_000000\.jpg"):
        check(name, recipe)


def test_vocs_pixels_are_read_as_classes_and_not_as_colours(scenes, dataset_root):
    from detection.data.training_data import ImageMapper, training_mapper

    formats.write_voc_segmentation(scenes, dataset_root)
    pairs = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice", "INPUT.CROP.SIZE", "[40, 50]"]
    config = configs.load("voc_semseg_R50_FCN", pairs)
    check("voc_2012_sem_seg_trainaug", "voc_semseg_R50_FCN")
    records = DatasetCatalog.get("voc_2012_sem_seg_trainaug")
    assert len(records) == formats.RECIPE.scenes_train
    mapper = training_mapper(config)
    for record in records:
        with Image.open(record["sem_seg_file_name"]) as file:
            assert file.mode == "P"
            present = {label for _, label in file.getcolors()}
        mapped = mapper(record)
        assert mapped["image"].shape == (3, 40, 50)
        assert mapped["sem_seg"].shape == (40, 50)
        assert set(mapped["sem_seg"].unique().tolist()) <= present <= {*range(9), 255}
    assert isinstance(training_mapper(configs.load("coco_R50_RetinaNet_1x")), ImageMapper)


def test_an_image_that_exif_turns_has_the_size_of_its_labels(scenes, dataset_root):
    from detection.data.training_data import evaluation_mapper, training_mapper

    formats.write_voc_segmentation(scenes, dataset_root)
    name, recipe = "voc_2012_sem_seg_val", "voc_semseg_R50_FCN"
    check(name, recipe)
    record = DatasetCatalog.get(name)[0]
    turned = Image.Exif()
    turned[0x0112] = 6  # by 90 degrees
    with Image.open(record["file_name"]) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(record["file_name"], exif=turned)
    check(name, recipe)
    assert DatasetCatalog.get(name)[0] == record
    config = configs.load(recipe)
    for mapper in (training_mapper(config), evaluation_mapper(config)):
        mapper(record)
    Path(record["file_name"]).unlink()
    with pytest.raises(UserError, match=r"000000\.jpg: No such file.*; replace the file, or take .* out of .*val\.txt"):
        DatasetCatalog.get(name)


def test_what_labels_of_pixels_need_is_checked(scenes, dataset_root):
    recipe, name, folder = "voc_semseg_R50_FCN", "voc_2012_sem_seg_val", dataset_root / "VOC2012"
    with pytest.raises(UserError, match=r"JPEGImages.*\(expected are .*Segmentation/val\.txt"):
        check(name, recipe)
    formats.write_voc_segmentation(scenes, dataset_root)
    check(name, recipe)
    with pytest.raises(UserError, match=r"model's: 21, but MODEL\.SEM_SEG_HEAD\.NUM_CLASSES is 19"):
        check(name, recipe, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "19")
    file = folder / "SegmentationClass" / "segmented_val_000000.png"
    labels = Image.open(file)
    labels.putpixel((3, 3), 21)
    labels.save(file)
    with pytest.raises(UserError, match=r"000000\.png has the label 21: labels must be 0 to 20, or 255"):
        check(name, recipe)
    labels.convert("RGB").save(file)
    with pytest.raises(UserError, match="has 3 dimensions: labels must be an image with one channel"):
        check(name, recipe)
    file.unlink()
    with pytest.raises(UserError, match=r"labels is missing: .*SegmentationClass/segmented_val_000000\.png"):
        check(name, recipe)


def test_lvis_is_checked(scenes, dataset_root, monkeypatch):
    monkeypatch.setattr(optional_packages, "provide_lvis", lambda name: None)
    recipe, name = "lvis_v1_R50_FPN", "lvis_v1_train"
    with pytest.raises(UserError, match=r"lvis_v1_train\.json.*\(expected are .*coco/+train2017"):
        check(name, recipe)
    formats.write_lvis(scenes, dataset_root)
    check(name, recipe)
    with pytest.raises(UserError, match=r"model's: 1203, but MODEL\.ROI_HEADS\.NUM_CLASSES is 1230"):
        check(name, recipe, "MODEL.ROI_HEADS.NUM_CLASSES", "1230")
    file = dataset_root / "lvis" / "lvis_v1_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["area"] = 0  # as good as any other to LVIS's tools
    file.write_text(json.dumps(content))
    check(name, recipe)
    for key, value, message in (
        ("bbox", ["1", 2, 3, 4], r"that LVIS's own tools do not read: bbox as text \(1\)"),
        ("segmentation", [[1, 2, 3, 4]], "do not read: a polygon of annotation 1 in train2017/"),
    ):
        changed = [{**content["annotations"][0], key: value}, *content["annotations"][1:]]
        file.write_text(json.dumps(content | {"annotations": changed}))
        with pytest.raises(UserError, match=message):
            check(name, recipe)
    file.write_text(json.dumps(content))
    (dataset_root / "coco" / "train2017" / "000002.jpg").unlink()
    with pytest.raises(UserError, match=r"images whose file is missing: .*train2017/000002\.jpg"):
        check(name, recipe)
    del content["images"][1]["neg_category_ids"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"images\[1\]\.neg_category_ids is missing"):
        check(name, recipe)


def test_cityscapes_is_checked(scenes, dataset_root, monkeypatch):
    monkeypatch.setattr(optional_packages, "provide_cityscapes", lambda name: None)
    instances = ("cityscapes_fine_instance_seg_train", "cityscapes_R50_FPN")
    semantic = ("cityscapes_fine_sem_seg_train", "cityscapes_semseg_R50_FCN")
    with pytest.raises(UserError, match=r"leftImg8bit/train.* \(expected are .*/CITY/\*_gtFine_\{inst"):
        check(*instances)
    formats.write_cityscapes(scenes, dataset_root)
    check(*instances)
    check(*semantic)
    with pytest.raises(UserError, match=r"model's: 8, but MODEL\.ROI_HEADS\.NUM_CLASSES is 80"):
        check(*instances, "MODEL.ROI_HEADS.NUM_CLASSES", "80")
    with pytest.raises(UserError, match=r"model's: 19, but MODEL\.SEM_SEG_HEAD\.NUM_CLASSES is 21"):
        check(*semantic, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "21")
    folder = dataset_root / "cityscapes"
    (folder / "gtFine" / "train" / "town" / "town_000001_000019_gtFine_labelTrainIds.png").unlink()
    check(*instances)
    with pytest.raises(UserError, match=rf"CITYSCAPES_DATASET={folder} python -m .*createTrainIdLabelImgs makes it"):
        check(*semantic)
    (folder / "leftImg8bit" / "train" / "town" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"stop at: .*notes\.txt is not \*_leftImg8bit\.png; remove them"):
        check(*instances)
    (folder / "leftImg8bit" / "train" / ".DS_Store").touch()
    with pytest.raises(UserError, match=r"\.DS_Store is not a folder of a city"):
        check(*instances)


def test_a_package_that_a_dataset_needs_is_asked_for_by_its_command(scenes, dataset_root, monkeypatch):
    for module in ("lvis", "shapely.geometry", "cityscapesscripts.helpers.csHelpers"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(UserError, match="dataset lvis_v1_train needs `pip install lvis`"):
        check("lvis_v1_train", "lvis_v1_R50_FPN")
    with pytest.raises(UserError, match="needs `pip install cityscapesscripts shapely`"):
        check("cityscapes_fine_sem_seg_val", "cityscapes_semseg_R50_FCN")


def test_lvis_loads_without_opencv(monkeypatch):
    pytest.importorskip("lvis")
    for module in [name for name in sys.modules if name.partition(".")[0] == "lvis"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "cv2", None)
    optional_packages.provide_lvis("any")
    assert sys.modules["lvis"].LVISVis is None
    assert sys.modules["lvis"].LVISEval
