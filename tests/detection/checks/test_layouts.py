"""What is checked of VOC's, LVIS's and Cityscapes' folders, and of labels of pixels."""

import json
import sys

import pytest
from PIL import Image

pytest.importorskip("detectron2")

from detection import config as configs
from detection.data import datasets, optional_packages
from foundation.errors import UserError
from tests.detection import formats

# isort: split
from detectron2.data import DatasetCatalog


def check(name, recipe, *pairs):
    """What the command checks of a recipe's dataset."""
    datasets.register([name])
    datasets.check_dataset(name, configs.load(recipe, pairs))


@pytest.mark.parametrize("name", ["voc_2007_trainval", "voc_2007_test", "voc_2012_trainval"])
def test_voc_passes(name, scenes, dataset_root):
    formats.write_voc(scenes, dataset_root)
    check(name, "voc_R50_C4_24k")


def test_what_vocs_layout_asks_for_is_checked(scenes, dataset_root):
    recipe, name, folder = "voc_R50_C4_24k", "voc_2007_test", dataset_root / "VOC2007"
    with pytest.raises(UserError, match=r"ImageSets/Main/test\.txt does not exist; expected are .*JPEGImages.*now"):
        check(name, recipe)
    formats.write_voc(scenes, dataset_root)
    with pytest.raises(UserError, match=r"boxes only: set MODEL\.MASK_ON False"):
        check(name, recipe, "MODEL.MASK_ON", "True")
    with pytest.raises(UserError, match=r"has no keypoints: set MODEL\.KEYPOINT_ON False"):
        check(name, recipe, "MODEL.KEYPOINT_ON", "True")
    with pytest.raises(UserError, match=r"voc_2007_test has 20 classes, but MODEL\.ROI_HEADS\.NUM_CLASSES is 80"):
        check(name, recipe, "MODEL.ROI_HEADS.NUM_CLASSES", "80")
    first, second = sorted((folder / "Annotations").glob("test_*.xml"))
    text = first.read_text()
    for old, new, message in (
        ("<pose>Left</pose>", "", r"test_000000\.xml: object 0 has no pose"),
        ("<xmin>", "<left>", "not valid XML"),
        ("<height>", "<high>", "not valid XML"),
        ("<object><name>", "<object><name>un", "object 0 is a 'un.*', which is none of VOC's classes"),
    ):
        first.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            check(name, recipe)
    first.write_text(text)
    second.unlink()
    with pytest.raises(UserError, match=r"1 of 2 files are not in .*Annotations/, the first being test_000001\.xml"):
        check(name, recipe)
    (folder / "JPEGImages" / "test_000000.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 2 files are not in .*JPEGImages/, the first being test_000000\.jpg"):
        check(name, recipe)


def test_training_on_voc_needs_less_than_its_evaluation(scenes, dataset_root):
    formats.write_voc(scenes, dataset_root)
    file = sorted((dataset_root / "VOC2012" / "Annotations").glob("*.xml"))[0]
    file.write_text(file.read_text().replace("<pose>Left</pose>", ""))
    check("voc_2012_trainval", "voc_R50_C4_24k")
    with pytest.raises(UserError, match="has no pose"):
        check("voc_2012_trainval", "voc_R50_C4_24k", "DATASETS.TEST", "('voc_2012_trainval',)")


def test_vocs_pixels_are_read_as_classes_and_not_as_colours(scenes, dataset_root):
    from detection.training.semantic import training_mapper

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
    assert training_mapper(configs.load("coco_R50_C4")) is None


def test_what_labels_of_pixels_need_is_checked(scenes, dataset_root):
    recipe, name, folder = "voc_semseg_R50_FCN", "voc_2012_sem_seg_val", dataset_root / "VOC2012"
    with pytest.raises(UserError, match=r"JPEGImages does not exist; expected are .*Segmentation/val\.txt"):
        check(name, recipe)
    formats.write_voc_segmentation(scenes, dataset_root)
    check(name, recipe)
    with pytest.raises(UserError, match=r"has 21 classes, but MODEL\.SEM_SEG_HEAD\.NUM_CLASSES is 19"):
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
    with pytest.raises(UserError, match=r"1 of 2 files are not in .*SegmentationClass/, .*segmented_val_000000\.png"):
        check(name, recipe)


def test_lvis_is_checked(scenes, dataset_root, monkeypatch):
    monkeypatch.setattr(optional_packages, "provide_lvis", lambda name: None)
    recipe, name = "lvis_v1_R50_FPN", "lvis_v1_train"
    with pytest.raises(UserError, match=r"lvis_v1_train\.json does not exist; expected are .*coco/train2017"):
        check(name, recipe)
    formats.write_lvis(scenes, dataset_root)
    check(name, recipe)
    with pytest.raises(UserError, match=r"has 1203 categories, but MODEL\.ROI_HEADS\.NUM_CLASSES is 1230"):
        check(name, recipe, "MODEL.ROI_HEADS.NUM_CLASSES", "1230")
    (dataset_root / "coco" / "train2017" / "000002.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of the 4 images .* the first being train2017/000002\.jpg"):
        check(name, recipe)
    file = dataset_root / "lvis" / "lvis_v1_train.json"
    content = json.loads(file.read_text())
    del content["images"][1]["neg_category_ids"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"images\[1\] has no 'neg_category_ids'"):
        check(name, recipe)


def test_cityscapes_is_checked(scenes, dataset_root, monkeypatch):
    monkeypatch.setattr(optional_packages, "provide_cityscapes", lambda name: None)
    instances = ("cityscapes_fine_instance_seg_train", "cityscapes_R50_FPN")
    semantic = ("cityscapes_fine_sem_seg_train", "cityscapes_semseg_R50_FCN")
    with pytest.raises(UserError, match=r"leftImg8bit/train does not exist; expected are .*/CITY/\*_gtFine_\{inst"):
        check(*instances)
    formats.write_cityscapes(scenes, dataset_root)
    check(*instances)
    check(*semantic)
    with pytest.raises(UserError, match=r"has 8 classes, but MODEL\.ROI_HEADS\.NUM_CLASSES is 80"):
        check(*instances, "MODEL.ROI_HEADS.NUM_CLASSES", "80")
    with pytest.raises(UserError, match=r"has 19 classes, but MODEL\.SEM_SEG_HEAD\.NUM_CLASSES is 21"):
        check(*semantic, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "21")
    folder = dataset_root / "cityscapes"
    (folder / "gtFine" / "train" / "town" / "town_000001_000019_gtFine_labelTrainIds.png").unlink()
    check(*instances)
    with pytest.raises(UserError, match=rf"CITYSCAPES_DATASET={folder} python -m .*createTrainIdLabelImgs makes it"):
        check(*semantic)
    (folder / "leftImg8bit" / "train" / "town" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt is no \*_leftImg8bit\.png, and would stop the reader: remove it"):
        check(*instances)
    (folder / "leftImg8bit" / "train" / ".DS_Store").touch()
    with pytest.raises(UserError, match=r"\.DS_Store is no folder of a city"):
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
