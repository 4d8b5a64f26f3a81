"""Each format's own evaluation, on predictions whose score is known."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from detection import config as configs
from detection.data import datasets
from detection.evaluation import errors, evaluators
from detection.evaluation.coco import FastCOCOEvaluator
from foundation.errors import UserError
from tests.detection import formats

# isort: split
from detectron2.data import DatasetCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, BoxMode, Instances, polygons_to_bitmask

ERRORS = [error.name.lower() for error in errors.ERRORS]


def evaluator_of(recipe, name, folder):
    datasets.register([name])
    evaluator = evaluators.build_evaluator(configs.load(recipe), name, folder / "predictions")
    evaluator.reset()
    return evaluator


def objects(record, keep=None, masks=True):
    """The annotated objects of a record as a sure model would give them; only the first `keep`."""
    annotations = record["annotations"][:keep]
    size = (record["height"], record["width"])
    found = Instances(size)
    boxes = [BoxMode.convert(list(one["bbox"]), one["bbox_mode"], BoxMode.XYXY_ABS) for one in annotations]
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.ones(len(annotations))
    found.pred_classes = torch.tensor([one["category_id"] for one in annotations], dtype=torch.int64)
    if masks:
        bits = [polygons_to_bitmask([numpy.asarray(p) for p in one["segmentation"]], *size) for one in annotations]
        found.pred_masks = torch.from_numpy(numpy.stack(bits)) if bits else torch.zeros((0, *size), dtype=torch.bool)
    return {"instances": found}


def labelled_instances(record):
    """The objects of a record of Cityscapes, pixel for pixel as in the labels that it is evaluated by."""
    path = record["file_name"].replace("leftImg8bit/", "gtFine/").replace("leftImg8bit.png", "gtFine_instanceIds.png")
    values = numpy.asarray(Image.open(path))
    numbers = [number for number in numpy.unique(values) if number >= 1000]
    things = [24, 25, 26, 27, 28, 31, 32, 33]  # the labels that are objects
    found = Instances(values.shape)
    found.pred_masks = torch.from_numpy(numpy.stack([values == number for number in numbers]))
    found.pred_classes = torch.tensor([things.index(number // 1000) for number in numbers])
    found.scores = torch.ones(len(numbers))
    return {"instances": found}


def labels_as_scores(path, classes):
    """(classes, H, W) with 1 where a pixel has the class; ignored pixels have the first."""
    labels = numpy.asarray(Image.open(path)).astype(numpy.int64)
    labels[labels == 255] = 0
    return {"sem_seg": torch.nn.functional.one_hot(torch.from_numpy(labels), classes).permute(2, 0, 1).float()}


def check_names(recipe, name, results):
    """That the metrics are those that a run may name, without the names of classes. A single class has no own."""
    found = {"".join(metric.partition("-")[:2]) for metric in flatten_results_dict(results)}
    known = evaluators.metrics_of(configs.load(recipe), name)
    assert found == {metric for metric in known if metric in found or not metric.endswith("-")}


def read_analysis(folder):
    return json.loads((folder / "predictions" / "analysis.json").read_text())


def test_voc_averages_over_its_twenty_classes(scenes, dataset_root, tmp_path):
    formats.write_voc(scenes, dataset_root)
    records = DatasetCatalog.get("voc_2007_test")
    present = {one["category_id"] for record in records for one in record["annotations"]}
    evaluator = evaluator_of("voc_R50_C4_24k", "voc_2007_test", tmp_path)
    evaluator.process(records, [objects(record, masks=False) for record in records])
    results = evaluator.evaluate()
    check_names("voc_R50_C4_24k", "voc_2007_test", results)
    whole = results["bbox"]
    assert whole == pytest.approx(dict.fromkeys(("AP", "AP50", "AP75"), 100 * len(present) / 20))
    evaluator.reset()
    evaluator.process(records, [objects(record, keep=0, masks=False) for record in records])
    assert evaluator.evaluate()["bbox"] == {"AP": 0, "AP50": 0, "AP75": 0}


def test_voc_2007_has_eleven_points(scenes, dataset_root, tmp_path):
    formats.write_voc(scenes, dataset_root)
    records = DatasetCatalog.get("voc_2007_test")
    for record in records:  # as if there were one class
        text = (dataset_root / "VOC2007" / "Annotations" / f"{record['image_id']}.xml").read_text()
        for name in ("bicycle", "bird", "boat", "bottle", "bus", "car", "cat"):
            text = text.replace(f"<name>{name}<", "<name>aeroplane<")
        (dataset_root / "VOC2007" / "Annotations" / f"{record['image_id']}.xml").write_text(text)
        for one in record["annotations"]:
            one["category_id"] = 0
    total, first = (len([one for record in some for one in record["annotations"]]) for some in (records, records[:1]))
    evaluator = evaluator_of("voc_R50_C4_24k", "voc_2007_test", tmp_path)
    evaluator.process(records[:1], [objects(records[0], masks=False)])
    points = sum(first / total >= i / 10 for i in range(11))  # recalls 0, 0.1 .. that are reached, at precision 1
    assert 1 < points < 11
    assert evaluator.evaluate()["bbox"]["AP50"] == pytest.approx(100 * points / 11 / 20)


def test_lvis_counts_all_objects_and_only_them(scenes, dataset_root, tmp_path):
    if importlib.util.find_spec("lvis") is None:  # to import it needs OpenCV, which the evaluator does without
        pytest.skip("lvis is not installed")
    formats.write_lvis(scenes, dataset_root)
    evaluator = evaluator_of("lvis_v1_R50_FPN", "lvis_v1_val", tmp_path)
    records = DatasetCatalog.get("lvis_v1_val")
    evaluator.process(records, [objects(record) for record in records])
    whole = evaluator.evaluate()
    check_names("lvis_v1_R50_FPN", "lvis_v1_val", whole)
    assert whole.keys() == {"bbox", "segm"}
    for metrics in whole.values():
        assert (metrics["AP"], metrics["AP50"], metrics["AP75"]) == pytest.approx((100, 100, 100))
        assert math.isnan(metrics["APl"])  # there are no large objects, for which Detectron2 gives -100
    analysis = read_analysis(tmp_path)
    assert analysis.keys() == whole.keys()
    assert analysis["segm"]["summary"]["AP"] == pytest.approx(100)
    assert analysis["segm"]["summary"]["APl"] is None
    present = [each for each in analysis["bbox"]["classes"] if each["objects"]]
    assert sum(each["objects"] for each in present) == sum(len(record["annotations"]) for record in records)
    assert [each["AP"] for each in present] == pytest.approx([100] * len(present))
    results = json.loads((tmp_path / "predictions" / "lvis_instances_results.json").read_text())
    assert {one["category_id"] for one in results} <= set(range(1, 9))  # as in the file: from 1 on
    for record in records:
        record["annotations"][0]["category_id"] = 40  # nothing is known of this class: no error
    evaluator.reset()
    evaluator.process(records, [objects(record) for record in records])
    assert evaluator.evaluate()["segm"]["AP"] < 100
    assert read_analysis(tmp_path)["segm"]["counts"]["detections"] < len(results)
    evaluator.reset()
    evaluator.process(records, [objects(record, keep=0) for record in records])
    assert evaluator.evaluate()["bbox"]["AP"] == 0
    analysis = read_analysis(tmp_path)["bbox"]
    assert analysis["errors"] == {**dict.fromkeys(ERRORS, 0), "missed": 100}
    assert {each["AP"] for each in analysis["classes"]} == {0, None}
    assert analysis["thresholds"]["best"] is None


def test_semantic_segmentation_is_intersection_over_union(scenes, dataset_root, tmp_path):
    formats.write_voc_segmentation(scenes, dataset_root)
    evaluator = evaluator_of("voc_semseg_R50_FCN", "voc_2012_sem_seg_val", tmp_path)
    records = DatasetCatalog.get("voc_2012_sem_seg_val")
    right = [labels_as_scores(record["sem_seg_file_name"], 21) for record in records]
    evaluator.process(records, right)
    results = evaluator.evaluate()
    check_names("voc_semseg_R50_FCN", "voc_2012_sem_seg_val", results)
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)
    evaluator.reset()
    background = torch.zeros(21, 1, 1)
    background[0] = 1
    evaluator.process(records, [{"sem_seg": background.expand_as(one["sem_seg"])} for one in right])
    metrics = evaluator.evaluate()["sem_seg"]
    labels = [numpy.asarray(Image.open(record["sem_seg_file_name"])) for record in records]
    counted = numpy.concatenate([one[one != 255] for one in labels])
    share = (counted == 0).mean()
    assert metrics["pACC"] == pytest.approx(100 * share)
    assert metrics["IoU-background"] == pytest.approx(100 * share)
    assert metrics["mIoU"] == pytest.approx(100 * share / len(numpy.unique(counted)))


def test_classes_that_only_predictions_have_do_not_lower_the_miou(scenes, dataset_root, tmp_path):
    formats.write_voc_segmentation(scenes, dataset_root)
    evaluator = evaluator_of("voc_semseg_R50_FCN", "voc_2012_sem_seg_val", tmp_path)
    records = DatasetCatalog.get("voc_2012_sem_seg_val")
    outputs = [labels_as_scores(record["sem_seg_file_name"], 21) for record in records]
    for output in outputs:
        output["sem_seg"][20, 0] = 2.0  # a row of class 20, which no label has
    evaluator.process(records, outputs)
    metrics = evaluator.evaluate()["sem_seg"]
    predicted, labels = [], []
    for record, output in zip(records, outputs, strict=True):
        values = numpy.asarray(Image.open(record["sem_seg_file_name"]))
        predicted.append(output["sem_seg"].argmax(dim=0).numpy()[values != 255])
        labels.append(values[values != 255])
    predicted, labels = numpy.concatenate(predicted), numpy.concatenate(labels)
    assert 20 in predicted
    pairs = [(predicted == index, labels == index) for index in numpy.unique(labels)]
    expected = [(one & two).sum() / (one | two).sum() for one, two in pairs]
    assert metrics["mIoU"] == pytest.approx(100 * numpy.mean(expected))


def test_cityscapes_instances_by_its_own_scripts(scenes, dataset_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for package in ("cityscapesscripts", "shapely"):
        pytest.importorskip(package)
    formats.write_cityscapes(scenes, dataset_root)
    evaluator = evaluator_of("cityscapes_R50_FPN", "cityscapes_fine_instance_seg_val", tmp_path)
    records = DatasetCatalog.get("cityscapes_fine_instance_seg_val")
    evaluator.process(records, [labelled_instances(record) for record in records])
    results = evaluator.evaluate()
    check_names("cityscapes_R50_FPN", "cityscapes_fine_instance_seg_val", results)
    metrics = results["segm"]
    assert (metrics["AP"], metrics["AP50"], metrics["AP-person"]) == pytest.approx((100, 100, 100))
    assert math.isnan(metrics["AP-car"])
    analysis = read_analysis(tmp_path)["segm"]
    assert analysis["summary"] == {"AP": pytest.approx(100), "AP50": pytest.approx(100)}
    assert analysis["errors"] == dict.fromkeys(ERRORS, 0)
    assert analysis["counts"]["objects"] == analysis["counts"]["correct"] > 0
    assert not Path("matches.json").exists()
    evaluator.reset()
    evaluator.process(records, [objects(record, keep=0) for record in records])
    assert evaluator.evaluate()["segm"]["AP"] == 0


def test_the_analysis_of_cityscapes_counts_what_its_scripts_count(scenes, dataset_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for package in ("cityscapesscripts", "shapely"):
        pytest.importorskip(package)
    formats.write_cityscapes(scenes, dataset_root)
    chance = numpy.random.default_rng(0)
    for path in sorted(dataset_root.glob("cityscapes/gtFine/val/*/*_instanceIds.png")):
        values = numpy.array(Image.open(path))
        values[:6] = 3  # outside of the region of interest: does not count
        values[6:12] = 26  # a group of cars
        values[12:16, :20] = 26_990  # a car that is too small to count
        Image.fromarray(values).save(path)
    evaluator = evaluator_of("cityscapes_R50_FPN", "cityscapes_fine_instance_seg_val", tmp_path)
    records = DatasetCatalog.get("cityscapes_fine_instance_seg_val")
    outputs = [jittered(labelled_instances(record)["instances"], chance) for record in records]
    evaluator.process(records, [{"instances": each} for each in outputs])
    metrics = evaluator.evaluate()["segm"]
    evaluation = evaluator._as_coco(evaluator._detections, 100)
    joined = errors.join(errors.classify(*image) for image in evaluation.compared.values())
    assert errors.counts(joined)["ignored"] > 3
    expected = {
        each["name"]: cityscapes_ap50(joined, place)
        for place, each in enumerate(read_analysis(tmp_path)["segm"]["classes"])
    }
    analysed = {each["name"]: each["AP50"] for each in read_analysis(tmp_path)["segm"]["classes"]}
    assert analysed == {name: None if value is None else pytest.approx(100 * value) for name, value in expected.items()}
    there = [value for value in expected.values() if value is not None]
    assert metrics["AP50"] == pytest.approx(100 * numpy.mean(there))
    assert 0 < min(there) < max(there)


def jittered(found, chance):
    """Several shifted copies of each object, with random scores, and detections where nothing counts."""
    shifts = [(0, 0), (0, 1), (2, 3), (9, 9)]
    masks = [torch.roll(mask, shift, (0, 1)) for mask in found.pred_masks for shift in shifts]
    classes = [number for number in found.pred_classes.tolist() for _ in shifts]
    for rows, number in ((slice(0, 6), 0), (slice(6, 12), 2), (slice(12, 16), 2), (slice(6, 12), 0)):
        masks.append(torch.zeros_like(masks[0]))
        masks[-1][rows, :20] = True
        classes.append(number)
    result = Instances(found.image_size)
    result.pred_masks, result.pred_classes = torch.stack(masks), torch.tensor(classes)
    result.scores = torch.from_numpy(chance.permutation(len(masks)) / len(masks)).float()
    return result


def cityscapes_ap50(joined, number):
    """AP as Cityscapes has it: the precision at each score times half of the change of recall around it."""
    own = (joined.classes == number) & (joined.outcomes != errors.Outcome.IGNORED)
    objects = (joined.object_classes == number).sum()
    if not objects:
        return None
    order = numpy.argsort(joined.scores[own])[::-1]
    correct = numpy.cumsum((joined.outcomes[own] == errors.Outcome.CORRECT)[order])
    precision = numpy.concatenate([[1], correct / numpy.arange(1, len(correct) + 1)])
    recall = numpy.concatenate([[0, 0], correct / objects, correct[-1:] / objects])
    return (precision * (recall[2:] - recall[:-2]) / 2).sum()


def test_cityscapes_pixels_by_its_own_scripts(scenes, dataset_root, tmp_path):
    for package in ("cityscapesscripts", "shapely"):
        pytest.importorskip(package)
    formats.write_cityscapes(scenes, dataset_root)
    evaluator = evaluator_of("cityscapes_semseg_R50_FCN", "cityscapes_fine_sem_seg_val", tmp_path)
    records = DatasetCatalog.get("cityscapes_fine_sem_seg_val")
    evaluator.process(records, [labels_as_scores(record["sem_seg_file_name"], 19) for record in records])
    results = evaluator.evaluate()
    check_names("cityscapes_semseg_R50_FCN", "cityscapes_fine_sem_seg_val", results)
    assert results["sem_seg"]["IoU"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("recipe", "name", "tasks"),
    [
        ("coco_R50_C4", "coco_2017_val", ("bbox", "segm")),
        ("coco_R50_RetinaNet_1x", "coco_2017_val", ("bbox",)),
        ("coco_keypoints_R50_FPN", "keypoints_coco_2017_val", ("bbox", "keypoints")),
    ],
)
def test_coco_gets_the_fast_evaluator_for_what_the_model_predicts(recipe, name, tasks, scenes, dataset_root, tmp_path):
    formats.write_coco(scenes, dataset_root)
    evaluator = evaluator_of(recipe, name, tmp_path)
    assert isinstance(evaluator, FastCOCOEvaluator)
    assert evaluator._tasks == evaluators.predicted_tasks(configs.load(recipe)) == tasks
    records = DatasetCatalog.get(name)
    found = [objects(record) for record in records] if "segm" in tasks else [objects(r, masks=False) for r in records]
    if "keypoints" in tasks:
        for record, output in zip(records, found, strict=True):
            points = [numpy.reshape(one["keypoints"], (17, 3)) for one in record["annotations"]]
            output["instances"].pred_keypoints = torch.tensor(numpy.reshape(points, (-1, 17, 3)), dtype=torch.float32)
    evaluator.process(records, found)
    check_names(recipe, name, evaluator.evaluate())


@pytest.mark.parametrize(
    ("recipe", "metric", "there_is"),
    [
        ("coco_R50_C4", "box/AP", "bbox/AP, bbox/AP50, bbox/AP75, bbox/APs, .*bbox/APl, bbox/AP-CLASS, segm/AP,"),
        ("coco_R50_C4", "bbox/AP51", "bbox/AP, bbox/AP50"),
        ("coco_R50_C4", "AP", "bbox/AP, bbox/AP50"),
        ("coco_R50_RetinaNet_1x", "segm/AP", "bbox/AP, .*bbox/AP-CLASS$"),
    ],
)
def test_a_metric_that_nothing_measures_is_refused(recipe, metric, there_is, dataset_root):
    config = configs.load(recipe, ["TEST.BEST_METRIC", metric])
    datasets.register(config.DATASETS.TEST)
    with pytest.raises(
        UserError, match=rf"TEST.BEST_METRIC '{metric}' is not measured on dataset \w+ \(.+\); choose one of {there_is}"
    ):
        evaluators.check_metric(config)


def test_a_metric_that_nothing_measures_on_vocs_boxes_is_refused(dataset_root):
    config = configs.load("voc_R50_C4_24k", ["TEST.BEST_METRIC", "bbox/APs"])
    datasets.register(config.DATASETS.TEST)
    with pytest.raises(UserError, match=r"on dataset voc_2007_test; choose one of bbox/AP, bbox/AP50, bbox/AP75$"):
        evaluators.check_metric(config)


@pytest.mark.parametrize("metric", ["", "bbox/AP50", "segm/AP-person", "coco_2017_train/segm/APl"])
def test_a_metric_may_be_of_a_class_or_of_another_set(metric, dataset_root):
    config = configs.load("coco_R50_C4", ["TEST.BEST_METRIC", metric])
    config.DATASETS.TEST = ("coco_2017_val", "coco_2017_train")
    evaluators.check_metric(config)


def test_the_class_of_a_metric_is_one_of_the_datasets(dataset_root):
    config = configs.load("coco_R50_C4", ["TEST.BEST_METRIC", "bbox/AP-persn"])
    with pytest.raises(UserError, match=r"of a class that dataset coco_2017_val \(.*\) does not have; nearest: person"):
        evaluators.check_metric(config)
    config = configs.load("coco_keypoints_R50_FPN", ["TEST.BEST_METRIC", "bbox/AP-person"])
    with pytest.raises(UserError, match="is not measured on dataset keypoints_coco_2017_val"):  # the only class
        evaluators.check_metric(config)


def test_what_has_no_evaluation_is_named(dataset_root, tmp_path):
    with pytest.raises(UserError, match="has evaluator_type 'coco_panoptic_seg'; there is an evaluation for coco, pas"):
        evaluator_of("coco_R50_C4", "coco_2017_val_panoptic", tmp_path)


@pytest.mark.parametrize(
    ("recipe", "name", "module"),
    [
        ("lvis_v1_R50_FPN", "lvis_v1_val", "lvis"),
        ("cityscapes_R50_FPN", "cityscapes_fine_instance_seg_val", "cityscapesscripts.helpers.csHelpers"),
        ("cityscapes_semseg_R50_FPN", "cityscapes_fine_sem_seg_val", "cityscapesscripts.helpers.csHelpers"),
    ],
)
def test_a_missing_package_is_an_error_with_the_command(recipe, name, module, dataset_root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"dataset {name} needs `pip install {module.partition('.')[0]}"):
        evaluator_of(recipe, name, tmp_path)
