"""`--dry-run` and `--check-data`: what they print, that they leave no run behind, and what they refuse."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from pretrain import train
from pretrain.config import get_defaults
from pretrain.training import estimate
from pretrain.training.estimate import activation_bytes
from pretrain.training.plan import build_without_memory, text_curve

SETTINGS = [
    *("DATA.NAME", "folder", "DATA.IMAGE_SIZE", "32", "TRAIN.BATCH_SIZE", "10", "PROJECTOR.DIMS", "[16, 8]"),
    *("TRAIN.EPOCHS", "10", "TRAIN.WARMUP_EPOCHS", "1", "TRAIN.WARMUP_LR", "0.003", "TRAIN.LR", "0.5"),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_dry_run_says_what_a_recipe_comes_to(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun would
    train.main(["--dry-run", *SETTINGS, "DATA.ROOT", str(photos), "TRAIN.MICRO_BATCH", "2", "DATA.WORKERS", "0"])
    printed = capsys.readouterr().out
    lines = {line[:18].strip(): line[18:] for line in printed.splitlines()}
    assert "  BATCH_SIZE: 10\n" in printed
    assert lines["batch"] == "10 = 2 process(es) x 5, each in 3 pass(es)"
    assert lines["epoch"] == "2 steps; 4 of 24 images are left out, others each time"
    assert lines["steps"] == "20 of 20 (10 epochs)"
    # Warm-up is one epoch, so two steps: from 0.003 half way to 0.5.
    assert lines["first"] == "0.003 (step 0)"
    assert lines["last of warm-up"] == "0.2515 (step 1)"
    assert lines["first after it"] == "0.5 (step 2)"
    assert lines["middle"].endswith("(step 10)")
    assert lines["last"] == "1e-06 (step 19)"
    # ResNet-18 without its classifier has 11,176,512 parameters; 512 x 16, two of BatchNorm's, 16 x 8 and 8.
    assert lines["parameters"] == "11,184,872 (encoder 11,176,512, projector 8,360)"
    assert lines["memory"].startswith("134.3 MB")
    assert re.fullmatch(
        r"about \d+\.\d MB, 2 pairs at once in (float32|bfloat16) \(TRAIN.MICRO_BATCH\)", lines["activations"]
    )
    time = re.fullmatch(
        r"about 0:\d\d:\d\d if .*: (.*) pairs/s on this cpu, timed on 3 steps of 2 pairs", lines["time"]
    )
    assert time is not None
    assert float(time[1]) > 0
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("place", ["0", "2"])
def test_one_of_the_processes_that_srun_has_started_says_what_it_comes_to_for_all(
    place: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name, value in {"NUM_TASKS": "4", "TASKS_PER_NODE": "4", "NODELIST": "node1"}.items():
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    for name, value in {"PROCID": place, "LOCALID": place, "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    train.main(["--dry-run", *SETTINGS, "DATA.ROOT", str(photos), "TRAIN.BATCH_SIZE", "12", "DATA.WORKERS", "0"])
    printed = capsys.readouterr().out
    assert ("12 = 4 process(es) x 3" in printed) if place == "0" else not printed


class TwoLayers(nn.Module):
    """Keeps, for each view, its input and what is between the layers; and nothing twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(view1), self.layers(view2)


def test_activations_are_what_autograd_keeps() -> None:
    network = build_without_memory(TwoLayers)
    numbers = 2 * (3 * 8 * 8 + 4)
    assert activation_bytes(network, 8, "float32") == 4 * numbers
    assert activation_bytes(network, 8, "bfloat16") == 2 * numbers


def test_time_follows_from_speed_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 steps of 120 pairs over two processes are 60,000 for each; a third more in parts."""
    config = get_defaults()
    config.TRAIN.BATCH_SIZE = 120
    monkeypatch.setattr(estimate, "pairs_per_second", lambda config, size, device: {60: 60.0, 16: 40.0, 10: 20.0}[size])

    def duration(part: int) -> str:
        config.TRAIN.MICRO_BATCH = part
        *_, line = estimate.describe_cost(config, processes=2, steps=1000, device=torch.device("cpu"))
        return line[18:].split(" if ")[0]

    assert duration(0) == "about 0:25:00"  # at 40 pairs a second, the speed of 16 pairs at once
    assert duration(10) == "about 1:06:40"


def test_too_large_for_the_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: CfgNode, size: int, device: torch.device) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(estimate, "pairs_per_second", fail)
    *_, line = estimate.describe_cost(get_defaults(), processes=1, steps=1, device=torch.device("cpu"))
    assert "16 pairs at once do not fit this cpu; set TRAIN.MICRO_BATCH" in line


def test_a_curve_shows_its_shape() -> None:
    assert text_curve(lambda step: step / 7, 8, width=8) == "▁▂▃▄▅▆▇█"
    assert text_curve(lambda step: 0.0, 8, width=4) == "▁▁▁▁"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_check_data_lists_every_bad_file(
    workers: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, error_of: Callable
) -> None:
    arguments = ["--check-data", *SETTINGS, "DATA.WORKERS", workers, "DATA.ROOT"]
    train.main([*arguments, str(photos)])
    assert "all 24 images can be read" in capsys.readouterr().out
    folder = tmp_path / "images"
    folder.mkdir()
    for path in (photos / "train" / "circle").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "00.jpg").write_bytes(b"")
    (folder / "07.jpg").write_text("<html>")
    (folder / "11.jpg").write_bytes((folder / "11.jpg").read_bytes()[:300])
    assert error_of(train.main, [*arguments, str(folder)]) == "3 of 12 images cannot be read; they are listed above"
    listed = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines() if ".jpg" in line]
    assert listed == [str(folder / name) for name in ("00.jpg", "07.jpg", "11.jpg")]
    assert not (tmp_path / "output").exists()
