"""The last line of a run."""

import json
import math

import pytest

pytest.importorskip("detectron2")

from detection import config as configs
from detection.training import outcome
from detection.training.summary import describe


def test_the_main_metric_of_each_task():
    results = {"bbox": {"AP": 2.6, "AP50": 9.0}, "segm": {"AP": 1.53}}
    assert describe(results, 120) == "box AP 2.6, mask AP 1.5 (120 images)"
    assert describe({"sem_seg": {"mIoU": 34.56}}, 1449) == "semantic mIoU 34.6 (1,449 images)"
    more = {"bbox": {"AP": 30.0}, "bbox_TTA": {"AP": 31.0}, "bbox_EMA": {"AP": 30.5}}
    assert describe(more, 1) == (
        "box AP 30.0, box AP with test-time augmentation 31.0, box AP of averaged weights 30.5 (1 image)"
    )


def test_weights_that_were_replaced_during_the_training_cost_no_results(tmp_path, monkeypatch):
    weights = tmp_path / "last.pt"
    weights.write_bytes(b"half written")
    config = configs.load("voc_R50_C4_24k", ["OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(weights)])
    monkeypatch.setattr(outcome, "conclude", lambda config, results: None)
    outcome.record(config, "tiny", {"bbox": {"AP": 5.0}}, iterations=3, train_images=2)
    written = json.loads((tmp_path / "results.json").read_text())
    assert (written["init"], written["results"]) == ("last", {"bbox": {"AP": 5.0}})


def test_a_low_ap_is_called_too_low_to_compare():
    line = describe({"bbox": {"AP": 1.9}, "segm": {"AP": 0.4}}, 100)
    assert line.startswith("box AP 1.9, mask AP 0.4 (100 images). This is too low to compare")
    assert "SOLVER.MAX_ITER" in line


@pytest.mark.parametrize("value", [None, math.nan])
def test_nothing_to_evaluate_is_said(value):
    assert describe({"bbox": {"AP": value}}, 3) == "box AP not evaluated (3 images)"
