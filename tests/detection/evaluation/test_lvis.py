"""The analysis of LVIS beside the numbers of its own package, on random scenes that are annotated in part."""

import importlib
import importlib.util
import json

import numpy as np
import pytest

pytest.importorskip("detectron2")

from detection.data.optional_packages import provide_lvis
from detection.evaluation import errors
from detection.evaluation.lvis import analyse, compare
from tests.detection.coco_scenes import scenes

if importlib.util.find_spec("lvis") is None:
    pytest.skip("lvis is not installed", allow_module_level=True)
provide_lvis("tests")  # before the first import, which fails without OpenCV
package = importlib.import_module("lvis")
CAT, DOG, COW, NEVER = 2, 3, 7, 9


def evaluate(tmp_path, dataset, results, task="bbox"):
    path = tmp_path / "lvis.json"
    categories = [{**each, "frequency": "f"} for each in dataset["categories"]]
    path.write_text(json.dumps({**dataset, "categories": categories}))
    ground_truth = package.LVIS(str(path))
    if task == "segm":
        results = [{key: value for key, value in each.items() if key != "bbox"} for each in results]
    evaluation = package.LVISEval(ground_truth, package.LVISResults(ground_truth, results), task)
    evaluation.run()
    return evaluation


def federated(seed):
    """Random scenes of which each image is annotated for some of the classes."""
    dataset, results = scenes(seed)
    rng = np.random.default_rng(100 + seed)
    crowds = {each["id"] for each in dataset["annotations"] if each["iscrowd"]}
    dataset["annotations"] = [each for each in dataset["annotations"] if each["id"] not in crowds]
    for image in dataset["images"]:
        absent = {CAT, DOG, COW, NEVER} - {
            each["category_id"] for each in dataset["annotations"] if each["image_id"] == image["id"]
        }
        image["neg_category_ids"] = [each for each in sorted(absent) if rng.random() < 0.5]
        image["not_exhaustive_category_ids"] = [each for each in (CAT, DOG, COW, NEVER) if rng.random() < 0.3]
    return dataset, results


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_the_analysis_agrees_with_the_package(task, seed, tmp_path):
    dataset, results = federated(seed)
    evaluation = evaluate(tmp_path, dataset, results, task)
    entry, official = analyse(evaluation), evaluation.get_results()
    assert entry["summary"] == {
        name: pytest.approx(100 * value) if value >= 0 else None for name, value in official.items()
    }
    classes = entry["classes"]
    assert [each["name"] for each in classes] == ["cat", "dog", "cow", "never"]
    assert classes[3] == {"name": "never", "objects": 0, "AP": None, "AP50": None}
    assert sum(each["objects"] for each in classes) == len(dataset["annotations"]) == entry["counts"]["objects"]
    for name, curve in (("AP", "mean"), ("AP50", "0.5")):
        assert np.mean([each[name] for each in classes[:3]]) == pytest.approx(100 * official[name])
        assert 100 * np.mean(entry["precision_recall"][curve]) == pytest.approx(100 * official[name])
    joined = errors.join(errors.classify(*image) for image in compare(evaluation))
    assert errors.corrected_ap50(joined, 4, ()) == pytest.approx(official["AP50"], abs=1e-9)
    assert errors.corrected_ap50(joined, 4, errors.ERRORS) == 1
    # Correct and false detections are those of the package, class by class.
    for place in range(3):
        found = evaluation.eval["dt_pointers"][place][0]
        own = joined.outcomes[joined.classes == place]
        assert (own == errors.Outcome.CORRECT).sum() == found["tps"][0].sum()
        wrong = ~np.isin(own, [errors.Outcome.CORRECT, errors.Outcome.IGNORED])
        assert wrong.sum() == found["fps"][0].sum()
    matrix, best = np.array(entry["confusion"]["counts"]), entry["thresholds"]["best"]
    assert np.trace(matrix) / matrix[:, :-1].sum() == pytest.approx(best["precision"], abs=1e-6)


def test_what_is_unknown_of_an_image_counts_as_no_error(tmp_path):
    """One image with a cat, without dogs, with some of its cows annotated; nothing is known of the fourth class."""
    dataset, _ = scenes(0, images=1)
    cat, cow = [10, 10, 40, 40], [100, 10, 40, 40]
    dataset["images"][0].update(neg_category_ids=[DOG], not_exhaustive_category_ids=[COW])
    dataset["annotations"] = [
        {"id": number, "image_id": 3, "category_id": category, "bbox": box, "area": 1600, "segmentation": []}
        for number, (category, box) in enumerate([(CAT, cat), (COW, cow)], 1)
    ]
    elsewhere = [170, 100, 40, 40]
    detections = [
        (NEVER, cat, "not counted: there may be one"),
        (COW, elsewhere, "ignored: there may be another"),
        (DOG, cat, "classification"),
        (DOG, elsewhere, "background"),
        (CAT, cat, "correct"),
        (CAT, cat, "duplicate"),
        (COW, cow, "correct"),
        (COW, cow, "ignored: a second match of a class that is annotated in part"),
    ]
    results = [
        {"image_id": 3, "category_id": category, "bbox": box, "score": 0.9 - number / 20}
        for number, (category, box, _) in enumerate(detections)
    ]
    entry = analyse(evaluate(tmp_path, dataset, results))
    assert entry["counts"] == {
        "detections": 7, "objects": 2, "correct": 2, "ignored": 2, "classification": 1, "localisation": 0, "both": 0,
        "duplicate": 1, "background": 1, "missed": 0,
    }  # fmt: skip
    assert [each["AP"] for each in entry["classes"]] == [pytest.approx(100), None, pytest.approx(100), None]
    # Rows: cat, dog, cow, never, no object. From the best threshold on, the score of the cow, one false cat counts.
    assert entry["confusion"]["counts"] == [
        [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 2, 0, 0, 0]
    ]  # fmt: skip
    assert entry["thresholds"]["best"]["precision"] == pytest.approx(2 / 5)
