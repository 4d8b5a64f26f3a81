"""Each defect is put into a good dataset, must be found there and nothing else, and must do to the loader and the
mapper what the list says that training does with it."""

import dataclasses
import json

import numpy
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

pytest.importorskip("detectron2")

from detection.checks import audit
from detection.checks import findings as defects
from detection.checks.findings import Findings
from detection.data import datasets, masks
from detection.data.annotations import read_annotations
from detection.data.requirements import Requirements
from detection.data.training_data import ImageMapper
from detection.evaluation import scores
from foundation.errors import UserError
from foundation.images import ORIENTATION

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.data.transforms import NoOpTransform, ResizeShortestEdge

WIDTH, HEIGHT = 40, 30
TRAINING = Requirements(masks=True, polygons=True, classes=2)


def polygon(x, y, width, height):
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def annotation(identity, image, category, box=(5, 5, 10, 8)):
    return {
        **{"id": identity, "image_id": image, "category_id": category, "iscrowd": 0, "bbox": list(box)},
        **{"area": box[2] * box[3], "segmentation": [polygon(*box)]},
    }


@pytest.fixture
def content(tmp_path):
    """Three images with two objects each, one of either class; ids from 1."""
    for index in (1, 2, 3):
        Image.new("RGB", (WIDTH, HEIGHT), (index, 9, 9)).save(tmp_path / f"{index}.jpg")
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in (1, 2, 3)],
        "annotations": [annotation(2 * i + j - 2, i, j) for i in (1, 2, 3) for j in (1, 2)],
        "categories": [{"id": 1, "name": "first"}, {"id": 2, "name": "second"}],
    }


@pytest.fixture
def register(tmp_path):
    """Writes contents as a registered dataset; its name."""
    names = []

    def call(content, name="broken", **metadata):
        path = tmp_path / f"{name}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        register_coco_instances(name, metadata, str(path), str(tmp_path))
        datasets.register([name])
        names.append(name)
        return name

    yield call
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def found(name, use=TRAINING, training=True):
    findings = Findings(training, decode=True)
    audit.check_dataset(name, [], use, findings)
    return {each.defect: (each.count, each.examples) for each in findings}


def trained_on(name, use=TRAINING):
    """The instances that are handed to the model, by image; or the error that it ends with."""
    mapper = ImageMapper(
        **{"is_train": True, "augmentations": [NoOpTransform()], "image_format": "RGB", "use_instance_mask": use.masks},
        **{"use_keypoint": bool(use.keypoints), "instance_mask_format": "polygon" if use.polygons else "bitmask"},
    )
    try:
        least = use.least_keypoints * bool(use.keypoints)
        records = get_detection_dataset_dicts([name], min_keypoints=least, check_consistency=False)
        return {record["image_id"]: mapper(record)["instances"] for record in records}
    except Exception as error:
        return type(error)


def counts(name, use=TRAINING):
    instances = trained_on(name, use)
    return {key: len(value) for key, value in instances.items()} if isinstance(instances, dict) else instances


def code(height=HEIGHT, width=WIDTH):
    mask = numpy.zeros((height, width), dtype=numpy.uint8, order="F")
    mask[5:13, 5:15] = 1
    encoded = coco_mask.encode(mask)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def edit(**fields):
    """A change of annotation 3, the first of image 2."""
    return lambda content, folder: content["annotations"][2].update(fields)


def rotated(content, folder):
    """A picture that its camera held upright: the file has other sides than what is seen."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "2.jpg", exif=exif)


WHERE = ("annotation 3 in 2.jpg",)
WITHOUT = {1: 2, 2: 1, 3: 2}  # instances by image, where that one is left out
CASES = {
    "missing": (lambda c, f: (f / "2.jpg").unlink(), defects.MISSING_FILES, ("{folder}/2.jpg",), UserError),
    "no image": (
        *(lambda c, f: (f / "2.jpg").write_text("<html>"), defects.UNREADABLE_FILES),
        *(("2.jpg (not an image)",), UserError),
    ),
    "size": (
        *(lambda c, f: c["images"][1].update(width=41), defects.WRONG_SIZES),
        *((f"2.jpg ({WIDTH}x{HEIGHT}, annotated 41x{HEIGHT})",), UserError),
    ),
    "rotated": (rotated, defects.WRONG_SIZES, ("2.jpg (30x40, annotated 40x30)",), UserError),
    "annotation id": (
        edit(id=4),
        defects.DUPLICATE_ANNOTATIONS,
        ("annotations[3].id is 4, which another annotation has",),
        UserError,
    ),
    "category": (
        *(edit(category_id=7), defects.UNKNOWN_CATEGORIES),
        *(("annotations[2].category_id is 7, which no category has",), UserError),
    ),
    "ignore": (edit(ignore=1), defects.IGNORED, ("annotations[2].ignore is 1",), UserError),
    "empty box": (edit(bbox=[5, 5, 0, 8]), defects.EMPTY_BOXES, WHERE, WITHOUT),
    "negative box": (edit(bbox=[5, 5, 4, -8]), defects.EMPTY_BOXES, WHERE, WITHOUT),
    "outside": (edit(bbox=[41, 5, 10, 8]), defects.OUTSIDE_BOXES, WHERE, WITHOUT),
    "short": (edit(segmentation=[[1, 2, 3, 4]]), defects.SHORT_POLYGONS, WHERE, WITHOUT),
    "odd": (edit(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), defects.SHORT_POLYGONS, WHERE, WITHOUT),
    "crowd": (edit(iscrowd=1, segmentation=code()), defects.CROWDS, WHERE, WITHOUT),
    "coded": (edit(segmentation=code()), defects.CODED_MASKS, WHERE, ValueError),
    "no mask": (
        *(lambda c, f: c["annotations"][3].update(segmentation=[]), defects.NO_MASKS),
        *(("annotation 4 in 2.jpg",), KeyError),
    ),
    "no objects": (
        *(lambda c, f: c.update(annotations=c["annotations"][:4]), defects.EMPTY_IMAGES),
        *(("3.jpg",), {1: 2, 2: 2}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_defect_is_found_alone_and_does_what_is_said(case, content, register, tmp_path):
    change, defect, examples, outcome = CASES[case]
    change(content, tmp_path)
    name = register(content)
    assert found(name) == {defect: (1, tuple(each.format(folder=tmp_path) for each in examples))}
    assert counts(name) == outcome
    ends = not isinstance(outcome, dict)
    assert (defect.training.level == "error") == ends


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"bbox": [41, 5, 10, 8]}, {1: 0, 2: 0, 3: 0}),
        ({"bbox": [5, 5, -4, -8]}, AssertionError),
        ({"segmentation": [[1, 2, 3, 4]]}, AssertionError),
        ({"iscrowd": 1}, AssertionError),
    ],
)
def test_a_dataset_of_which_nothing_is_left_to_learn_is_refused(fields, outcome, content, register):
    for each in content["annotations"]:
        each.update(fields)
    name = register(content)
    assert found(name)[defects.NOTHING_LEFT] == (1, ("all images",))
    assert counts(name) == outcome  # which a run would train on, or end with
    assert defects.NOTHING_LEFT not in found(name, training=False)


def test_many_crowds_are_a_warning(content, register):
    for each in content["annotations"][::3]:
        each.update(iscrowd=1, segmentation=code())
    name = register(content)
    assert found(name) == {defects.MANY_CROWDS: (2, ("annotation 1 in 1.jpg", "annotation 4 in 2.jpg"))}
    assert counts(name) == {1: 1, 2: 1, 3: 2}


def test_a_good_dataset_has_no_finding(content, register):
    name = register(content)
    assert found(name) == {}
    assert counts(name) == {1: 2, 2: 2, 3: 2}


def test_a_box_that_reaches_out_is_clipped(content, register, tmp_path):
    edit(bbox=[30, 5, 15, 8])(content, tmp_path)
    name = register(content)
    assert found(name) == {defects.PROTRUDING_BOXES: (1, WHERE)}
    assert trained_on(name)[2].gt_boxes.tensor[0].tolist() == [30, 5, WIDTH, 13]


@pytest.mark.parametrize(
    ("defect", "fields", "task"),
    [
        (None, {}, "segm"),
        (defects.EMPTY_BOXES, {"bbox": [5, 5, 0, 8]}, "bbox"),
        (defects.OUTSIDE_BOXES, {"bbox": [41, 5, 10, 8]}, "bbox"),
        (defects.SHORT_POLYGONS, {"segmentation": [[1, 2, 3, 4]]}, "segm"),
        (defects.SOME_SHORT_POLYGONS, {"segmentation": [[1, 2], polygon(5, 5, 10, 8)]}, "segm"),
        (defects.FLAT_POLYGONS, {"segmentation": [[5, 5, 10, 9, 15, 13]]}, "segm"),
    ],
)
def test_the_evaluation_does_what_is_said(defect, fields, task, content, tmp_path):
    """One object, and one detection that is right for what it should be."""
    edit(**fields)(content, tmp_path)
    content["annotations"] = content["annotations"][2:3]
    content["categories"].pop()
    found = {"image_id": 2, "category_id": 1, "score": 0.9, "bbox": [5, 5, 10, 8], "segmentation": code()}
    unmatched = defect is not None and defect.evaluation.text.endswith("can match")
    assert scores.score(content, [found], task).stats[0] == (0 if unmatched else 1)


@pytest.mark.parametrize(("length", "found_strips"), [(2665, 0), (2667, 1)])
def test_a_strip_that_resizing_would_reduce_to_nothing(length, found_strips, content, register, tmp_path):
    Image.new("RGB", (length, 1)).save(tmp_path / "2.jpg")
    content["images"][1].update(width=length, height=1)
    for one in content["annotations"][2:4]:
        one.update(bbox=[5, 0, 10, 1], segmentation=[polygon(5, 0, 10, 1)])
    assert found(register(content)) == ({defects.STRIPS: (1, (f"2.jpg ({length}x1)",))} if found_strips else {})
    height, _ = ResizeShortestEdge.get_output_shape(1, length, 800, TRAINING.max_size_train)
    assert height == 1 - found_strips


def test_a_box_may_reach_out_by_rounding(content, register, tmp_path):
    edit(bbox=[30, 5, 10.9, 8])(content, tmp_path)
    assert found(register(content)) == {}


def test_a_short_polygon_beside_a_good_one_is_left_out(content, register, tmp_path):
    edit(segmentation=[[1, 2, 3, 4], polygon(5, 5, 10, 8)])(content, tmp_path)
    name = register(content)
    assert found(name) == {defects.SOME_SHORT_POLYGONS: (1, WHERE)}
    assert [len(each) for each in trained_on(name)[2].gt_masks.polygons] == [1, 1]


def test_a_polygon_without_area_trains_an_empty_mask(content, register, tmp_path):
    edit(segmentation=[[5, 5, 10, 9, 15, 13]])(content, tmp_path)
    name = register(content)
    assert found(name) == {defects.FLAT_POLYGONS: (1, WHERE)}
    instances = trained_on(name)[2]
    targets = instances.gt_masks.crop_and_resize(instances.gt_boxes.tensor, 28)
    assert targets[0].sum() <= 28  # at most a line of pixels
    assert targets[1].sum() > 700  # its box, filled


def test_codes_are_fine_for_bitmaps_but_for_their_size(content, register, tmp_path):
    use = dataclasses.replace(TRAINING, polygons=False)
    edit(segmentation=code())(content, tmp_path)
    name = register(content)
    assert found(name, use) == {}
    assert counts(name, use) == {1: 2, 2: 2, 3: 2}
    edit(segmentation=code(HEIGHT + 2))(content, tmp_path)
    name = register(content, "other")
    text = f"annotations[2].segmentation has the size {HEIGHT + 2} x {WIDTH}, its image {HEIGHT} x {WIDTH}"
    assert found(name, use) == {defects.CODE_SIZES: (1, (text,))}


def test_masks_do_not_matter_to_a_model_of_boxes(content, register, tmp_path):
    edit(segmentation=code(HEIGHT + 2))(content, tmp_path)
    content["annotations"][3].pop("segmentation")
    name = register(content)
    use = dataclasses.replace(TRAINING, masks=False)
    assert found(name, use) == {}
    assert counts(name, use) == {1: 2, 2: 2, 3: 2}


def test_keypoints(content, register, tmp_path):
    use = dataclasses.replace(TRAINING, keypoints=2, masks=False)
    for record in content["annotations"]:
        record["keypoints"] = [6, 6, 2, 0, 0, 0]
    content["annotations"][4]["keypoints"] = content["annotations"][5]["keypoints"] = [0] * 6
    points = {"keypoint_names": ["a", "b"], "keypoint_flip_map": []}
    name = register(content, **points)
    assert found(name, use) == {defects.FEW_KEYPOINTS: (1, ("3.jpg",))}
    assert counts(name, use) == {1: 2, 2: 2}
    demanding = dataclasses.replace(use, least_keypoints=3)  # each object has one, an image two objects
    assert [*found(name, demanding)] == [defects.FEW_KEYPOINTS, defects.NO_KEYPOINTS]
    assert counts(name, demanding) is AssertionError  # Detectron2's "No valid data found"
    assert [*found(name, use, training=False)] == [defects.TOLERANCES]
    edit(keypoints=[6, 6, 2, 0])(content, tmp_path)
    name = register(content, "other", **points)
    text = "annotations[2].keypoints must be x, y and visibility of each point"
    assert found(name, use)[defects.WRONG_KEYPOINTS] == (1, (text,))
    edit(keypoints=[6, 6, 2])(content, tmp_path)
    assert found(register(content, "few", **points), use)[defects.WRONG_KEYPOINTS] == (1, WHERE)


def test_many_defects_at_once_are_all_listed_with_their_counts(content, register):
    content["annotations"] += [annotation(7, 9, 1), annotation(8, 1, 1, (5, 5, 0, 0)), {"id": 9}]
    content["annotations"] += [annotation(8, 2, 3), annotation(10, 3, 1) | {"bbox": [1, 2, 3, "x"]}]
    content["images"] += [content["images"][0] | {"id": 3}, content["images"][1] | {"id": 4}]
    content["categories"].append({"id": 5, "name": "third"})
    got = found(register(content))
    assert {defect: count for defect, (count, _) in got.items()} == {
        **{defects.MALFORMED: 2, defects.DUPLICATE_IMAGES: 1, defects.DUPLICATE_ANNOTATIONS: 1},
        **{defects.UNKNOWN_IMAGES: 1, defects.CLASS_COUNT: 1, defects.CONVERTED: 1, defects.FLAT_POLYGONS: 1},
        **{defects.EMPTY_BOXES: 1, defects.ABSENT_CLASSES: 1, defects.EMPTY_IMAGES: 1, defects.REPEATED_FILES: 1},
    }
    assert got[defects.MALFORMED][1] == (
        "annotations[8].image_id is missing or null: must be a whole number or text",
        "annotations[10].bbox is [1, 2, 3, 'x']: must be x, y, width and height",
    )
    assert got[defects.ABSENT_CLASSES][1] == ("third",)


@pytest.mark.parametrize("text", ["", "[]", '{"images": []}', '{"images": 1, "annotations": [], "categories": []}'])
def test_a_file_that_holds_something_else(text, register):
    ((defect, (count, (example,))),) = found(register(text)).items()
    assert defect is defects.UNREADABLE
    assert count == 1
    assert "broken.json is damaged" in example or "broken.json is not in COCO's format" in example


def test_a_polygon_that_is_no_list_of_numbers(content, register, tmp_path):
    edit(segmentation=[[1, 2, 3, 4, None, 6]])(content, tmp_path)
    content["annotations"][0]["segmentation"] = [5, 5, 10, 8]
    examples = (
        "annotations[0].segmentation is a list of 4 numbers: must be a list of polygons of three or more points",
        "annotations[2].segmentation must be finite numbers",
    )
    assert found(register(content)) == {defects.MALFORMED: (2, examples)}


def test_areas_by_hand():
    triangle, bow_tie = [0, 0, 4, 0, 0, 3], [0, 0, 2, 2, 2, 0, 0, 2]
    numpy.testing.assert_allclose(
        masks.polygon_areas([triangle, polygon(1, 2, 3, 4), triangle[::-1], bow_tie]), [6, 12, 6, 0], atol=1e-12
    )


def test_the_file_names_of_lvis(content, tmp_path):
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
        image.update(neg_category_ids=[], not_exhaustive_category_ids=[])
    for category in content["categories"]:
        category["frequency"] = "f"
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    read = read_annotations(tmp_path / "lvis.json", lvis=True)
    assert not read.problems
    assert read.images[0]["file_name"] == "train2017/1.jpg"


@pytest.fixture
def voc(tmp_path):
    """Writes a VOC folder; voc({name: [(class, box)]}) gives it."""

    def call(objects, size=(WIDTH, HEIGHT)):
        folder = tmp_path / "VOC2007"
        for part in ("ImageSets/Main", "Annotations", "JPEGImages"):
            (folder / part).mkdir(parents=True)
        (folder / "ImageSets/Main/trainval.txt").write_text("".join(f"{name}\n" for name in objects))
        for name, inside in objects.items():
            Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "JPEGImages" / f"{name}.jpg")
            nodes = "".join(
                f"<object><name>{kind}</name><difficult>{hard}</difficult><bndbox><xmin>{box[0]}</xmin>"
                f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
                for kind, hard, box in inside
            )
            sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
            (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{sides}{nodes}</annotation>")
        return folder

    return call


def test_voc(voc):
    whole = (1, 1, WIDTH, HEIGHT)
    folder = voc({
        **{"a": [("cat", 0, whole), ("dog", 1, (5, 5, 9, 9))], "b": [("cow", 0, whole), ("cat", 0, (9, 5, 8, 9))]},
        **{"c": [], "d": [], "e": [], "f": []},
    })  # fmt: skip
    (folder / "JPEGImages/a.jpg").unlink()
    (folder / "Annotations/d.xml").unlink()
    (folder / "Annotations/e.xml").write_text("<annotation>")
    (folder / "Annotations/f.xml").write_text("<annotation><size><width>40</width></size></annotation>")
    register_pascal_voc("tiny_voc", str(folder), "trainval", 2007, ("cat", "dog", "emu"))
    MetadataCatalog.get("tiny_voc").evaluator_type = "pascal_voc"
    try:
        got = found("tiny_voc", Requirements(classes=3))
    finally:
        DatasetCatalog.remove("tiny_voc")
        MetadataCatalog.remove("tiny_voc")
    assert {defect: count for defect, (count, _) in got.items()} == {
        **{defects.MISSING_PARTS: 1, defects.MALFORMED: 2, defects.UNKNOWN_CATEGORIES: 1, defects.DIFFICULT: 1},
        **{defects.EMPTY_BOXES: 1, defects.ABSENT_CLASSES: 1, defects.EMPTY_IMAGES: 1, defects.MISSING_FILES: 1},
    }
    assert got[defects.UNKNOWN_CATEGORIES][1] == ("cow in b.jpg",)
    assert got[defects.MALFORMED][1][1] == "f.xml (there is no size/height)"
    assert got[defects.EMPTY_IMAGES][1] == ("c.jpg",)


def test_voc_without_its_split(voc):
    folder = voc({"a": []})
    (folder / "ImageSets/Main/trainval.txt").unlink()
    register_pascal_voc("tiny_voc", str(folder), "trainval", 2007, ("cat", "dog"))
    MetadataCatalog.get("tiny_voc").evaluator_type = "pascal_voc"
    try:
        ((defect, (_, (example,))),) = found("tiny_voc", Requirements(classes=2)).items()
    finally:
        DatasetCatalog.remove("tiny_voc")
        MetadataCatalog.remove("tiny_voc")
    assert defect is defects.MISSING_PARTS
    assert example.startswith(f"{folder}/ImageSets/Main/trainval.txt (expected are ")


def test_labels_of_segmentation(tmp_path):
    """Labels of another size, with a value that is no class, and none."""
    for name, size, value in (("a", (WIDTH, HEIGHT), 1), ("b", (WIDTH, HEIGHT - 1), 0), ("c", (WIDTH, HEIGHT), 7)):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / f"{name}.jpg")
        Image.new("L", size, value).save(tmp_path / f"{name}.png")
    (tmp_path / "list.txt").write_text("a\nb\n\nc\nd\n")
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "d.jpg")
    DatasetCatalog.register("tiny_labels", list)
    MetadataCatalog.get("tiny_labels").set(
        evaluator_type="sem_seg", stuff_classes=["x", "y"], ignore_label=255, image_root=str(tmp_path)
    )
    MetadataCatalog.get("tiny_labels").set(sem_seg_root=str(tmp_path), image_list=str(tmp_path / "list.txt"))
    try:
        got = found("tiny_labels", Requirements(classes=2, semantic=True))
    finally:
        DatasetCatalog.remove("tiny_labels")
        MetadataCatalog.remove("tiny_labels")
    assert {defect: count for defect, (count, _) in got.items()} == {
        **{defects.MISSING_LABELS: 1, defects.LABEL_SIZES: 1, defects.WRONG_LABELS: 1}
    }
    assert got[defects.LABEL_SIZES][1] == (f"{tmp_path}/b.png ((40, 29), the image (40, 30))",)


def test_the_list_that_is_printed(content, register, tmp_path, capsys):
    from detection import config as configs

    good = register(content, "good")
    content["annotations"][0]["bbox"] = [5, 5, 0, 8]
    content["categories"][1]["name"] = "other"
    (tmp_path / "2.jpg").unlink()
    broken = register(content, "broken")
    overrides = ["DATASETS.TRAIN", f"('{good}',)", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    bad = configs.load("shapes_R18_FPN", [*overrides, "DATASETS.TEST", f"('{broken}',)"])
    assert audit.run(bad) == 2
    printed = capsys.readouterr().out
    assert "good (training): 3 images, 6 objects, 2 classes\n  error" in printed  # the same file is missing
    broken_part = printed[printed.index("broken (evaluation)") :]
    lines = [line.strip() for line in broken_part.splitlines()]
    assert lines[1].startswith("error         1  classes that differ from those of the training set: 'other' -> name")
    assert "1  boxes without width or height: annotation 1 in 1.jpg -> an object" in broken_part
    assert "3  images that are in training and in evaluation" in broken_part
    assert "1  classes that differ from those of the training set: 'other' -> name the classes alike" in broken_part
    assert printed.endswith("3 of these findings would stop a run.\n")
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "2.jpg")
    good_only = configs.load("shapes_R18_FPN", [*overrides, "DATASETS.TEST", f"('{good}',)"])
    assert audit.run(good_only) == 0
    assert capsys.readouterr().out.endswith("Nothing here would stop a run.\n")
