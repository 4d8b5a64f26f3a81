"""The record of a pretraining run stays JSON whatever the covariance is."""

import json
from pathlib import Path

import pytest
import torch

from pretrain.corinfomax import CorInfoMaxLoss
from pretrain.training.recorder import Recorder


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    criterion = CorInfoMaxLoss(dim=2, attraction=1.0, forgetting=0.0, eps=0.0)
    criterion.covariance.copy_(torch.diag(torch.tensor([1.0, 0.0])))  # without eps LDMI is inf - inf
    recorder = Recorder(tmp_path, 0, criterion, watch_from=10)
    recorder.record(0, {"epoch": 1.0}, ends_epoch=False)
    recorder.close()
    found = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert found.keys() == {"iteration", "epoch", "effective_rank", "min_eigenvalue"}
