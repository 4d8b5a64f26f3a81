"""COCO's numbers beside pycocotools' on random scenes with everything that COCO has; and the files for a report."""

import contextlib
import copy
import io
import json
import logging

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.evaluation import errors, scores
from detection.evaluation.coco import FastCOCOEvaluator, analyse
from foundation.errors import UserError
from tests.detection.coco_scenes import CATEGORIES, HEIGHT, WIDTH, add_detection, scenes

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.structures import Boxes, Instances


def reference(dataset, results, task, limits=(1, 10, 100), images=None, library=COCOeval):
    """pycocotools as its own demo uses it, and as Detectron2 does for masks: without boxes, for the masks' areas."""
    dataset, results = copy.deepcopy((dataset, results))
    if task == "segm":
        results = [{key: value for key, value in entry.items() if key != "bbox"} for entry in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = dataset
        truth.createIndex()
        found.dataset = {**dataset, "annotations": []}
        found.createIndex()
        evaluation = library(truth, truth.loadRes(results) if results else found, task)
        if task != "keypoints":
            evaluation.params.maxDets = list(limits)
        evaluation.params.imgIds = images or evaluation.params.imgIds
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def equal(evaluation, expected):
    """To the last bits of a sum: 1e-12 of numbers up to 1."""
    assert len(evaluation.stats) == len(expected.stats) == (10 if expected.params.iouType == "keypoints" else 12)
    assert np.allclose(evaluation.stats, expected.stats, rtol=0, atol=1e-12)
    assert np.allclose(evaluation.eval["precision"], expected.eval["precision"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
@pytest.mark.parametrize("seed", range(4))
def test_all_numbers_are_those_of_pycocotools(task, seed):
    dataset, results = scenes(seed)
    before = copy.deepcopy((dataset, results))
    expected = reference(dataset, results, task)
    assert all(0 < value < 1 for value in expected.stats)  # sizes, too, are all there
    assert any(entry["iscrowd"] for entry in dataset["annotations"])
    equal(scores.score(dataset, results, task), expected)
    assert (dataset, results) == before


@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
def test_nothing_detected_is_zero_where_there_are_objects(task):
    dataset, _ = scenes(0)
    expected = reference(dataset, [], task)
    assert set(expected.stats) == {0.0}
    equal(scores.score(dataset, [], task), expected)
    dataset["annotations"] = [entry for entry in dataset["annotations"] if entry["area"] > 96**2]
    evaluation = scores.score(dataset, [], task)
    equal(evaluation, reference(dataset, [], task))
    assert (evaluation.stats[0], evaluation.stats[3]) == (0, -1)


def test_an_image_set_without_objects_has_no_scores():
    dataset, results = scenes(0)
    dataset["annotations"] = []
    evaluation = scores.score(dataset, results, "bbox")
    equal(evaluation, reference(dataset, results, "bbox"))
    assert set(evaluation.stats) == {-1.0}
    entry = analyse(evaluation)
    assert set(entry["summary"].values()) == {None}
    assert entry["errors"] is None
    assert entry["counts"]["background"] == len(results)
    assert entry["precision_recall"]["mean"] == []


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("limits", [(1, 10, 100), (1, 10, 230), (1, 2, 3)])
def test_more_detections_than_count(limits, task):
    dataset, results = scenes(5, images=4)
    rng = np.random.default_rng(0)
    entry = next(entry for entry in dataset["annotations"] if not entry["iscrowd"])
    for _ in range(300):  # of one class in one image, mostly off the object, some on it
        add_detection(rng, results, entry, np.array(entry["bbox"]) + rng.normal(0, 20, 4))
    expected = reference(dataset, results, task, limits, library=COCOevalMaxDets)
    evaluation = scores.score(dataset, results, task, limits)
    equal(evaluation, expected)
    if limits[-1] == 100:
        equal(evaluation, reference(dataset, results, task))
    joined = errors.join(errors.classify(*image) for image in evaluation.compared.values())
    assert len(joined.outcomes) < len(results)
    assert errors.corrected_ap50(joined, 4, ()) == pytest.approx(expected.stats[1], abs=1e-12)


def test_some_of_the_images():
    dataset, results = scenes(1)
    chosen = [image["id"] for image in dataset["images"][2:7]]
    evaluation = scores.score(dataset, results, "bbox", image_ids=chosen)
    equal(evaluation, reference(dataset, results, "bbox", images=chosen))
    assert evaluation.stats[0] != reference(dataset, results, "bbox").stats[0]
    entry = analyse(evaluation)
    mine = [entry for entry in dataset["annotations"] if entry["image_id"] in chosen and not entry["iscrowd"]]
    assert sum(line["objects"] for line in entry["classes"]) == entry["counts"]["objects"] == len(mine)


def test_without_the_library_pycocotools_and_one_line(monkeypatch, caplog):
    dataset, results = scenes(2)
    fast = {task: scores.score(dataset, results, task) for task in ("bbox", "segm", "keypoints")}
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None)
    scores.libraries.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "detection"):
            for task, evaluation in fast.items():
                slow = scores.score(dataset, results, task)
                assert isinstance(slow, COCOeval)
                equal(slow, evaluation)
                assert analyse(slow)["counts"] == analyse(evaluation)["counts"]
            equal(scores.score(dataset, [], "bbox"), reference(dataset, [], "bbox"))
    finally:
        scores.libraries.cache_clear()
    (record,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert "faster-coco-eval is not installed" in record.message


def test_custom_annotations_may_start_at_0_and_lack_what_follows_from_the_box():
    dataset, results = scenes(3)
    dataset["annotations"] = [entry for entry in dataset["annotations"] if not entry["iscrowd"]]
    expected = reference(dataset, results, "bbox")
    for number, entry in enumerate(dataset["annotations"]):
        del entry["iscrowd"], entry["area"]
        entry["id"] = number
    equal(scores.score(dataset, results, "bbox"), expected)


def test_masks_of_objects_are_encoded_as_pycocotools_encodes_them():
    triangle, square, beside = [10, 10, 40, 12, 20, 50], [20, 20, 50, 20, 50, 50, 20, 50], [60, 5, 70, 5, 70, 60]
    outside, runs = [-20, -20, 30, -20, 30, 200, -20, 200], [100, 20, HEIGHT * WIDTH - 120]
    regions = [[triangle], [triangle, square], [triangle, square, beside], [outside], [[200, 200, 210, 200, 210, 210]]]
    coded = {"size": [HEIGHT, WIDTH], "counts": runs}
    regions += [coded, masks.frPyObjects(coded, HEIGHT, WIDTH)]
    short = [[[1, 2, 30, 40]], [[1, 2]], [], [square, [1, 2], [1, 2, 30, 40]]]
    like = [[[200, 200, 210, 200, 210, 210]]] * 3 + [[square]]  # nothing, and what is left
    size = {"id": 1, "height": HEIGHT, "width": WIDTH}
    entries = [{"image_id": 1, "segmentation": copy.deepcopy(region)} for region in [*regions, *short]]
    scores.encode_masks(entries, [size])
    api = COCO()
    api.imgs = {1: size}
    for entry, region in zip(entries, [*regions, *like], strict=True):
        expected = api.annToRLE({"image_id": 1, "segmentation": region})
        assert entry["segmentation"]["counts"] == expected["counts"]
        assert list(entry["segmentation"]["size"]) == expected["size"]


def test_sigmas_have_to_be_as_many_as_the_keypoints():
    dataset, results = scenes(0)
    with pytest.raises(UserError, match=r"17 keypoints, but TEST\.KEYPOINT_OKS_SIGMAS is for 2"):
        scores.score(dataset, results, "keypoints", sigmas=(0.1, 0.1))
    lax = scores.score(dataset, results, "keypoints", sigmas=[0.5] * 17)
    assert lax.stats[0] > scores.score(dataset, results, "keypoints").stats[0]


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_the_analysis_agrees_with_the_scores(task, seed):
    evaluation = scores.score(*scenes(seed), task)
    entry = analyse(evaluation)
    assert list(entry["summary"].values()) == pytest.approx(100 * evaluation.stats)
    curves, classes = entry["precision_recall"], entry["classes"]
    assert [line["name"] for line in classes] == ["cat", "dog", "cow", "never"]
    assert classes[3] == {"name": "never", "objects": 0, "AP": None, "AP50": None}
    for name, curve in (("AP", "mean"), ("AP50", "0.5")):
        assert np.mean([line[name] for line in classes[:3]]) == pytest.approx(entry["summary"][name])
        assert 100 * np.mean(curves[curve]) == pytest.approx(entry["summary"][name])
    assert 100 * np.mean(curves["0.75"]) == pytest.approx(entry["summary"]["AP75"])
    assert {len(curve) for curve in curves.values()} == {101}
    joined = errors.join(errors.classify(*image) for image in evaluation.compared.values())
    assert errors.corrected_ap50(joined, 4, ()) == pytest.approx(evaluation.stats[1], abs=1e-12)
    assert errors.corrected_ap50(joined, 4, errors.ERRORS) == 1
    assert entry["counts"]["ignored"] > 0
    assert min(entry["errors"].values()) >= 0
    best, matrix = entry["thresholds"]["best"], np.array(entry["confusion"]["counts"])
    assert matrix[:-1].sum(axis=1).tolist() == [line["objects"] for line in classes]
    assert np.trace(matrix) / matrix[:, :-1].sum() == pytest.approx(best["precision"], abs=1e-6)
    assert np.trace(matrix) / matrix[:-1].sum() == pytest.approx(best["recall"], abs=1e-6)


@pytest.fixture
def registered(tmp_path):
    """A dataset of Detectron2's, and its detections."""
    dataset, results = scenes(6)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(dataset))
    register_coco_instances("scenes", {}, str(path), str(tmp_path))
    DatasetCatalog.get("scenes")
    yield results
    DatasetCatalog.remove("scenes")
    MetadataCatalog.remove("scenes")


def show(evaluator, results):
    """Give the detections to an evaluator, as a model gives them."""
    evaluator.reset()
    classes = {category["id"]: place for place, category in enumerate(CATEGORIES)}
    for image in range(12):
        mine = [entry for entry in results if entry["image_id"] == 5 * image + 3]
        boxes = torch.tensor([entry["bbox"] for entry in mine]).reshape(-1, 4)
        found = Instances((HEIGHT, WIDTH))
        found.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        found.scores = torch.tensor([entry["score"] for entry in mine])
        found.pred_classes = torch.tensor([classes[entry["category_id"]] for entry in mine], dtype=torch.int64)
        if mine:
            regions = [masks.decode(entry["segmentation"]) for entry in mine]
            found.pred_masks = torch.from_numpy(np.stack(regions)).bool()
        evaluator.process([{"image_id": 5 * image + 3}], [{"instances": found}])
    return evaluator


def test_the_evaluator_gives_what_detectron2s_gives(registered, tmp_path):
    tasks = ("bbox", "segm")
    theirs = show(COCOEvaluator("scenes", tasks, use_fast_impl=False), registered).evaluate()
    evaluator = show(FastCOCOEvaluator("scenes", tasks, output_dir=str(tmp_path / "out")), registered)
    ours = evaluator.evaluate()
    assert list(ours) == list(theirs) == list(tasks)
    for task in tasks:
        shared = {name: ours[task][name] for name in theirs[task]}
        assert shared == pytest.approx(theirs[task], abs=1e-9, nan_ok=True)
        assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-cat", "AP-never"} <= ours[task].keys()
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {entry["category_id"] for entry in written} == {entry["category_id"] for entry in registered}
    analysis = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert list(analysis) == list(tasks)
    assert analysis["segm"]["summary"]["AP"] == pytest.approx(ours["segm"]["AP"])
    again = evaluator.evaluate()
    assert again["bbox"] == pytest.approx(ours["bbox"], nan_ok=True)


def test_the_evaluator_without_detections(registered, tmp_path):
    evaluator = show(FastCOCOEvaluator("scenes", ("bbox", "segm"), output_dir=str(tmp_path / "out")), [])
    results = evaluator.evaluate()
    for metrics in results.values():
        assert np.isnan(metrics.pop("AP-never"))
        assert set(metrics.values()) == {0.0}
    analysis = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert analysis["bbox"]["errors"] == {
        "classification": 0, "localisation": 0, "both": 0, "duplicate": 0, "background": 0, "missed": 100,
    }  # fmt: skip
