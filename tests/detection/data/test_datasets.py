import json

import pytest

pytest.importorskip("detectron2")

from detection import config as configs
from detection.checks import preflight
from detection.data import datasets
from detection.data.requirements import Requirements, requirements_of, set_classes
from foundation.errors import UserError
from tests.detection import formats

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog

TWO = ["MODEL.ROI_HEADS.NUM_CLASSES", "2"]
RETINANET = ["MODEL.META_ARCHITECTURE", "RetinaNet"]


@pytest.fixture
def annotations(coco_root):
    return coco_root / "coco" / "annotations" / "instances_train2017.json"


def spoil(path, change):
    """Change the content of a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def check(name, recipe, *pairs, training=True):
    """What the command checks of a recipe's dataset."""
    pairs = ["DATASETS.TRAIN", f"({name!r},)", *pairs] if training else pairs
    config = configs.load(recipe, ["DATASETS.TEST", f"({name!r},)", *pairs])
    preflight.check(config, (name,) if training else (), () if training else (name,))


def test_the_dataset_that_a_metric_is_of():
    names = ["/a/val.json@/b", "coco_2017_val"]
    assert [datasets.measured_on(names, each) for each in ("bbox/AP", "coco_2017_val/bbox/AP")] == names


def test_evaluation_sets_have_short_unlike_labels():
    assert datasets.labels(["/a/val.json@/b", "coco_2017_val"]) == ["val", "coco_2017_val"]
    assert datasets.labels(["/me@home/lab.v1.json@/b", "coco_2017_val"]) == ["lab-v1", "coco_2017_val"]
    assert datasets.labels(["/a/val.json@/b", "/c/val.json@/d"]) == ["1-val", "2-val"]
    assert datasets.labels(["x y.json@/b", "TTA.json@/b"]) == ["1-x-y", "2-TTA"]  # predictions_TTA is another folder


def test_a_whole_dataset_passes(tiny):
    for name in tiny:
        check(name, "coco_R50_C4", *TWO)


@pytest.mark.parametrize(
    ("pairs", "key"),
    [
        ([], r"MODEL\.ROI_HEADS\.NUM_CLASSES is 80"),
        (RETINANET, r"MODEL\.RETINANET\.NUM_CLASSES is 80"),
    ],
)
def test_the_number_of_classes_is_compared_with_that_of_the_architecture(pairs, key, tiny):
    with pytest.raises(UserError, match=rf"instances_train2017\.json\): number of classes .*: 2, but {key}"):
        check("tiny_train", "coco_R50_C4", *pairs)


def test_missing_files_are_named_with_the_layout(tiny, annotations, coco_root, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(coco_root))
    (coco_root / "coco" / "train2017").rename(coco_root / "elsewhere")
    with pytest.raises(UserError, match=r"missing files or folders: .*/train2017 \(expected are .*DETECTRON2_DATASETS"):
        check("tiny_train", "coco_R50_C4", *TWO)
    annotations.unlink()
    with pytest.raises(UserError, match=r"missing files or folders: .*instances_train2017\.json"):
        check("tiny_train", "coco_R50_C4", *TWO)


def test_images_that_are_not_on_the_disk_are_counted(tiny, coco_root):
    for name in ("001.jpg", "003.jpg"):
        (coco_root / "coco" / "train2017" / name).unlink()
    with pytest.raises(UserError, match=r"2 images whose file is missing: .*001\.jpg, .*003\.jpg"):
        check("tiny_train", "coco_R50_C4", *TWO)


def test_text_that_is_no_json_is_named(tiny, annotations):
    annotations.write_text(annotations.read_text()[:-20])
    with pytest.raises(UserError, match=r"instances_train2017\.json is damaged: not valid JSON"):
        check("tiny_train", "coco_R50_C4", *TWO)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.clear(), "there is no list 'images'"),
        (lambda c: c.pop("annotations"), "datasets without annotations: .*name annotated images for training"),
        (lambda c: c.update(images={}), "there is no list 'images'"),
        (lambda c: c["images"].clear(), "datasets without an image"),
        (
            lambda c: c["images"][1].pop("height"),
            r"images\[1\]\.height is missing or null: must be a whole number of pixels",
        ),
        (
            lambda c: c["annotations"][3].pop("bbox"),
            r"annotations\[3\]\.bbox is missing or null: must be x, y, wid",
        ),
        (lambda c: c["annotations"][2].update(id=1), r"annotations\[2\]\.id is 1, which another annotation has"),
        (
            lambda c: c["annotations"][2].update(category_id=9),
            r"annotations\[2\]\.category_id is 9, which no",
        ),
        (lambda c: c["annotations"][2].update(image_id=9), r"annotations\[2\]\.image_id is 9, which no image has"),
    ],
)
def test_what_the_format_asks_for_is_checked(change, message, tiny, annotations):
    spoil(annotations, change)
    with pytest.raises(UserError, match=message):
        check("tiny_train", "coco_R50_C4", *TWO)


def test_masks_must_be_there_if_they_are_learned_and_as_they_are_read(tiny, annotations):
    runs = {"size": [64, 64], "counts": [640, 64, 3392]}
    spoil(annotations, lambda c: c["annotations"][0].update(iscrowd=1, segmentation=runs))
    check("tiny_train", "coco_R50_C4", *TWO)
    spoil(annotations, lambda c: c["annotations"][3].update(segmentation=runs))
    with pytest.raises(UserError, match=r"run-length code: annotation 4 in .*; set INPUT\.MASK_FORMAT bitmask"):
        check("tiny_train", "coco_R50_C4", *TWO)
    check("tiny_train", "coco_R50_C4", *TWO, "INPUT.MASK_FORMAT", "bitmask")
    spoil(annotations, lambda c: [one.pop("segmentation") for one in c["annotations"][1:3]])
    with pytest.raises(UserError, match=r"2 objects without a mask: annotation 2 in .* only, or add polygons"):
        check("tiny_train", "coco_R50_C4", *TWO)
    with pytest.raises(UserError, match=r"without a mask: .*; set MODEL\.MASK_ON False to evaluate boxes only"):
        check("tiny_train", "coco_R50_C4", *TWO, training=False)
    check("tiny_train", "coco_R50_C4", *TWO, "MODEL.MASK_ON", "False")


def test_backslashes_in_the_name_of_a_missing_file_are_named(tiny, annotations):
    spoil(annotations, lambda c: c["images"][1].update(file_name="a\\001.jpg"))
    with pytest.raises(UserError, match=r"a\\001\.jpg \(its file_name has a backslash: write / between folders\)"):
        check("tiny_train", "coco_R50_C4", *TWO)


def test_keypoints_must_be_there_if_they_are_learned(scenes, dataset_root, tiny):
    formats.write_coco(scenes, dataset_root)
    check("keypoints_coco_2017_train", "coco_keypoints_R50_FPN")
    with pytest.raises(UserError, match=r"no names of keypoints, .* set MODEL\.KEYPOINT_ON False"):
        check("coco_2017_train", "coco_keypoints_R50_FPN", "MODEL.ROI_HEADS.NUM_CLASSES", "80")
    with pytest.raises(UserError, match=r"17, but MODEL\.ROI_KEYPOINT_HEAD\.NUM_KEYPOINTS is 5"):
        check("keypoints_coco_2017_train", "coco_keypoints_R50_FPN", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "5")
    file = dataset_root / "coco" / "annotations" / "person_keypoints_train2017.json"
    spoil(file, lambda c: c["annotations"][2]["keypoints"].pop())
    with pytest.raises(UserError, match=r"annotations\[2\]\.keypoints must be x, y and visibility of each point"):
        check("keypoints_coco_2017_train", "coco_keypoints_R50_FPN")


def test_a_model_of_pixels_wants_labels_and_one_of_objects_does_not(scenes, dataset_root):
    with pytest.raises(UserError, match="coco_2017_train holds objects, which the model does not learn"):
        check("coco_2017_train", "voc_semseg_R50_FCN")
    with pytest.raises(UserError, match="voc_2012_sem_seg_val holds a class for each pixel, which"):
        check("voc_2012_sem_seg_val", "coco_R50_C4")


def test_a_format_without_evaluation_is_refused(dataset_root):
    with pytest.raises(UserError, match="has evaluator_type 'coco_panoptic_seg', not one of coco, lvis"):
        check("coco_2017_val_panoptic", "coco_R50_C4")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"there is no dataset 'coco_2017_trian'; nearest: coco_2017_train"):
        datasets.register(["coco_2017_trian"])
    with pytest.raises(UserError, match="nearest: voc_2012_sem_seg_val"):
        datasets.register(["voc_2012_semseg_val"])


def test_data_of_ones_own_is_named_by_its_paths(coco_root, annotations, dataset_root):
    images = coco_root / "coco" / "train2017"
    name = datasets.custom_name(annotations, images)
    assert name == f"{annotations}@{images}"
    datasets.register([name, name])  # of several processes each registers, and so does each command of one
    assert datasets.known_classes(name) == ["rectangle", "triangle"]
    assert datasets.sources(name) == {"image_root": str(images), "annotations": str(annotations)}
    check(name, "coco_R50_C4", *TWO)
    assert len(DatasetCatalog.get(name)) == 4
    annotations.unlink()
    with pytest.raises(UserError, match=rf"missing files or folders: {annotations} \(expected are .* {images}/\)"):
        check(name, "coco_R50_C4", *TWO)
    with pytest.raises(UserError, match=r"correct --train-json and --train-images; .* put a link at the old place"):
        check(name, "coco_R50_C4", *TWO)
    with pytest.raises(
        UserError, match="name the file with --test-json and the folder of its images with --test-images"
    ):
        preflight.check(configs.load("coco_R50_C4", TWO), (), [name])
    MetadataCatalog.remove(name)
    DatasetCatalog.remove(name)
    datasets.register([name])
    with pytest.raises(UserError, match=r"instances_train2017\.json cannot be read: No such file"):
        datasets.known_classes(name)


def test_a_folder_that_looks_like_a_name_of_a_dataset_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no folder above it may have '\.json@' in its name"):
        datasets.custom_name(tmp_path / "a.json@b" / "a.json", tmp_path)


def test_any_folder_can_hold_data_of_ones_own(tmp_path, dataset_root):
    name = datasets.custom_name(tmp_path / "me@work" / "a.json", tmp_path / "me@work")
    datasets.register([name])
    folder = str(tmp_path / "me@work")
    assert datasets.sources(name) == {"image_root": folder, "annotations": f"{folder}/a.json"}
    with pytest.raises(UserError, match=r"a\.txt: annotations must be a file .* whose name ends in \.json"):
        datasets.custom_name(tmp_path / "a.txt", tmp_path)


def test_the_classes_of_a_test_set_are_found_by_name(coco_root, dataset_root):
    names = []
    for split in ("train", "val"):
        file = coco_root / "coco" / "annotations" / f"instances_{split}2017.json"
        names.append(datasets.custom_name(file, coco_root / "coco" / f"{split}2017"))
    pairs = ["DATASETS.TRAIN", f"({names[0]!r},)", "DATASETS.TEST", f"({names[1]!r},)", *TWO]
    config = configs.load("coco_R50_C4", pairs)
    preflight.check(config, (), names[1:])
    assert datasets.model_classes(config) == ["rectangle", "triangle"]
    assert datasets.category_ids(config, names[1]) == [1, 2]
    spoil(file, lambda c: [one.update(id=3 - one["id"]) for one in c["categories"]])
    preflight.check(config, (), names[1:])
    assert datasets.category_ids(config, names[1]) == [2, 1]

    def keep_triangles(content):
        content["categories"] = [one for one in content["categories"] if one["name"] == "triangle"]
        content["annotations"] = [one for one in content["annotations"] if one["category_id"] == 1]

    spoil(file, keep_triangles)
    preflight.check(config, (), names[1:])
    assert datasets.category_ids(config, names[1]) == [None, 1]
    spoil(file, lambda c: c["categories"][0].update(name="Triangle"))
    with pytest.raises(UserError, match="classes that differ from those of the training set: 'Triangle'"):
        preflight.check(config, (), names[1:])


def test_training_sets_of_one_run_number_their_classes_alike(coco_root, dataset_root):
    names = []
    for split in ("train", "val"):
        file = coco_root / "coco" / "annotations" / f"instances_{split}2017.json"
        names.append(datasets.custom_name(file, coco_root / "coco" / f"{split}2017"))
    config = configs.load("coco_R50_C4", ["DATASETS.TRAIN", f"{tuple(names)!r}", *TWO])
    spoil(file, lambda c: c["categories"].reverse())  # their order in the file does not count
    preflight.check(config, names, ())
    spoil(file, lambda c: [one.update(id=3 - one["id"]) for one in c["categories"]])
    with pytest.raises(UserError, match=r"2 classes that differ .*: 'triangle' for 'rectangle', 'rectangle' for 'tri"):
        preflight.check(config, names, ())


def test_requirements_follow_the_config():
    assert requirements_of(configs.load("coco_R50_C4")) == Requirements(80, masks=True, polygons=True)
    assert requirements_of(configs.load("voc_R50_C4_24k")) == Requirements(20)
    keypoints = requirements_of(configs.load("coco_keypoints_R50_FPN"))
    assert keypoints == Requirements(1, keypoints=17)
    # MASK_ON and KEYPOINT_ON mean nothing to an architecture without regions.
    pairs = ["MODEL.MASK_ON", "True", "MODEL.KEYPOINT_ON", "True"]
    assert requirements_of(configs.load("coco_R50_RetinaNet_1x", pairs)) == Requirements(
        80, "MODEL.RETINANET.NUM_CLASSES"
    )
    pixels = requirements_of(configs.load("voc_semseg_R50_FPN"))
    assert pixels == Requirements(21, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", semantic=True)
    config = configs.load("coco_R50_RetinaNet_1x")
    set_classes(config, 7)
    assert (config.MODEL.RETINANET.NUM_CLASSES, config.MODEL.ROI_HEADS.NUM_CLASSES) == (7, 80)
    with pytest.raises(UserError, match=r"MODEL\.META_ARCHITECTURE must be one of GeneralizedRCNN, RetinaNet, Sem"):
        requirements_of(configs.load("coco_R50_C4", ["MODEL.META_ARCHITECTURE", "PanopticFPN"]))


def test_sources_of_the_built_in_datasets(dataset_root):
    datasets.register(["voc_2012_sem_seg_val"])
    expected = {
        "voc_2007_test": ("VOC2007/JPEGImages", "VOC2007/Annotations"),
        "voc_2012_sem_seg_val": ("VOC2012/JPEGImages", "VOC2012/SegmentationClass"),
        "cityscapes_fine_sem_seg_val": ("cityscapes/leftImg8bit/val", "cityscapes/gtFine/val"),
        "lvis_v1_val": ("coco", "lvis/lvis_v1_val.json"),
        "coco_2017_val": ("coco/val2017", "coco/annotations/instances_val2017.json"),
    }
    for name, (images, annotations) in expected.items():
        assert datasets.sources(name) == {
            "image_root": str(dataset_root / images),
            "annotations": str(dataset_root / annotations),
        }


def test_the_embedded_scenes_are_registered_from_where_they_are_rendered(tmp_path, monkeypatch, dataset_root):
    monkeypatch.setattr("shapes.ensure_rendered", lambda: tmp_path)
    datasets.register(["shapes_train", "shapes_val"])
    metadata = MetadataCatalog.get("shapes_val")
    assert metadata.image_root == str(tmp_path / "scenes" / "val")
    assert metadata.json_file == str(tmp_path / "scenes" / "annotations" / "instances_val.json")


def test_class_names(dataset_root):
    from shapes import CLASSES

    def names(recipe, *pairs):
        return datasets.class_names(configs.load(recipe, pairs))

    assert names("shapes_R18_FPN") == list(CLASSES)
    assert names("coco_R50_C4")[0] == "person"
    assert names("voc_semseg_R50_FCN") == list(datasets.VOC_SEGMENTATION_CLASSES)
    assert names("cityscapes_semseg_R50_FCN")[0] == "road"
    assert names("cityscapes_R50_FPN")[0] == "person"
    elsewhere = ["DATASETS.TRAIN", "('elsewhere',)"]
    assert names("coco_R50_C4", *elsewhere)[0] == "person"  # as in the test set
    assert names("coco_R50_C4", *elsewhere, *TWO) == ["class 0", "class 1"]
    noted = [*elsewhere, *TWO, "DATASETS.CLASSES", "('cat', 'dog')"]
    assert names("coco_R50_C4", *noted) == ["cat", "dog"]
    assert datasets.model_classes(configs.load("coco_R50_C4", noted)) == ["cat", "dog"]
    assert names("coco_R50_C4", *elsewhere, "DATASETS.CLASSES", "('cat', 'dog')")[0] == "person"  # not those of 80


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["nose", "left_eye", "right_eye"], [("left_eye", "right_eye")]),
        (["r_hand", "l_hand", "tail"], [("l_hand", "r_hand")]),
        (["hand.l", "hand.r", "heel_low"], [("hand.l", "hand.r")]),
        (["LeftKnee", "RightKnee", "LEFT", "RIGHT"], [("LEFT", "RIGHT"), ("LeftKnee", "RightKnee")]),
        (["left_ear", "tip", "1", "2"], []),
    ],
)
def test_keypoints_that_a_flip_swaps(names, pairs, coco_root, annotations, dataset_root):
    spoil(
        annotations, lambda c: [one.update(keypoints=names, skeleton=[[1, 2], [1, 99], "x"]) for one in c["categories"]]
    )
    name = datasets.custom_name(annotations, coco_root / "coco" / "train2017")
    datasets.register([name])
    metadata = MetadataCatalog.get(name)
    assert (metadata.keypoint_names, metadata.keypoint_flip_map) == (names, pairs)
    assert [rule[:2] for rule in metadata.keypoint_connection_rules] == [(names[0], names[1])]


def test_a_subset_is_seeded_and_nested():
    tenth, half = datasets.subset(200, 0.1, seed=0), datasets.subset(200, 0.5, seed=0)
    assert len(tenth) == 20
    assert len(half) == 100
    assert set(tenth) < set(half) < set(range(200))
    assert tenth == sorted(tenth) == datasets.subset(200, 0.1, seed=0) != datasets.subset(200, 0.1, seed=1)
    assert len(datasets.subset(200, 0.0001, seed=0)) == 1
