"""Run folders that earlier versions have written go on."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain import train
from pretrain.runs import checkpoint
from pretrain.runs.weights import read_weights
from tests.pretrain.tiny_encoder import use_tiny_encoder

# A run of six steps of which four are done, without events and log, as written by commit 9936aea (before PROJECTOR.NORM
# and PROJECTOR.LAST_BIAS): the tiny encoder of these tests on the photos of `tests/conftest.py`.
ARCHIVE = Path(__file__).parent / "earlier_run.tar.xz"
CHOSEN = ["TRAIN.MAX_STEPS", "0"]


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_tiny_encoder(monkeypatch)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "earlier_run"


def test_an_earlier_run_resumes_to_what_it_would_have_been(earlier: Path, photos: Path, tmp_path: Path) -> None:
    settings = ["--config", str(earlier / "config.yaml"), *CHOSEN, "DATA.ROOT", str(photos)]
    train.main([*settings, "--output", str(earlier), "--resume"])
    train.main([*settings, "--output", str(tmp_path / "whole")])
    resumed, whole = (checkpoint.load(run / "checkpoints" / "last.pt") for run in (earlier, tmp_path / "whole"))
    assert resumed["position"] == whole["position"] == {"epoch": 2, "step": 6, "skipped": 0}
    for part in ("model", "objective"):
        for name, tensor in whole[part].items():
            # Versions round differently: 1.5e-4 in four steps. Without the momentum of the earlier run it would be 0.2.
            torch.testing.assert_close(resumed[part][name], tensor, rtol=5e-4, atol=5e-5)
    lines = [json.loads(line) for line in (earlier / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(6))


def test_its_encoder_can_be_read(earlier: Path) -> None:
    (earlier / "encoder.safetensors").unlink()
    weights = read_weights(str(earlier))
    assert (weights.init, weights.name, weights.stem) == ("corinfomax", "resnet18", "imagenet")
    assert weights.tensors


def test_a_changed_recipe_is_refused_with_the_way_on(earlier: Path, photos: Path, error_of: Callable) -> None:
    settings = ["--config", str(earlier / "config.yaml"), *CHOSEN, "DATA.ROOT", str(photos)]
    message = error_of(train.main, [*settings, "--output", str(earlier), "--resume", "PROJECTOR.NORM", "False"])
    assert "PROJECTOR.NORM: True then, False now" in message
    assert f"--config {earlier}/config.yaml keeps" in message


def test_a_run_is_the_one_whose_own_config_is_given(
    earlier: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: Callable
) -> None:
    """As the refusal advises; and without --resume nothing begins beside the run, either."""
    monkeypatch.chdir(tmp_path)
    settings = ["--config", "earlier_run/config.yaml", *CHOSEN, "DATA.ROOT", str(photos)]
    assert "earlier_run holds the checkpoints of a run; add --resume" in error_of(train.main, settings)
    train.main([*settings, "--resume"])
    assert checkpoint.load(earlier / "checkpoints" / "last.pt")["position"]["step"] == 6
    assert not (tmp_path / "output").exists()
