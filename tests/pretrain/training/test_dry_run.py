"""`--dry-run` and `--check-data`: what they print, that they leave no run behind, and what they refuse."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from pretrain import train
from pretrain.config import get_defaults
from pretrain.images.sources import ArraySource
from pretrain.training import dry_run
from pretrain.training.build import build_batches, build_parts, build_trainer
from pretrain.training.dry_run import (
    Cost,
    Memory,
    activation_bytes,
    build_without_memory,
    seconds_per_pair,
    text_curve,
    verdict,
)
from pretrain.training.schedule import StepRange

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
    lines = {line[:18].strip(): line[18:] for line in printed.partition("verdict\n")[0].splitlines()}
    assert "  BATCH_SIZE: 10\n" in printed
    assert lines["batch"] == "10 = 2 processes x 5, each in 3 passes"
    assert lines["epoch"] == "2 steps; 4 of 24 images are left out, a different set each epoch"
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
        r"about 0:\d\d:\d\d: (.*) pairs/s on this cpu, limited by .* \(timed on 3 steps and 16 images\)", lines["time"]
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
    assert ("12 = 4 processes x 3" in printed) if place == "0" else not printed


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


def images_in_memory(count: int = 2) -> ArraySource:
    return ArraySource(np.zeros((count, 8, 8, 3), np.uint8), [0] * count, ["one"])


def test_time_follows_from_speed_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 steps of 120 pairs over two processes are 60,000 for each; a third more in parts."""
    config = get_defaults()
    config.TRAIN.BATCH_SIZE = 120
    config.DATA.WORKERS = 0
    monkeypatch.setattr(dry_run, "pairs_per_second", lambda config, size, device: {32: 40.0, 10: 20.0}[size])
    monkeypatch.setattr(dry_run, "loading_seconds", lambda config, source: 1 / 40)

    def seconds(part: int) -> float | None:
        config.TRAIN.MICRO_BATCH = part
        device = torch.device("cpu")
        return dry_run.measure_cost(config, images_in_memory(), processes=2, steps=1000, device=device).seconds

    assert seconds(0) == pytest.approx(60000 / 20)  # 1/40 s to compute a pair, 1/40 s to load it
    assert seconds(10) == pytest.approx(60000 * (4 / 3 / 20 + 1 / 40))


@pytest.mark.parametrize(
    ("workers", "cores", "on_cpu", "seconds", "loading_bound"),
    [
        (0, 2, True, 5, False),  # one after the other
        (1, 2, True, 3.5, False),  # 2 s of one of two cores are 1 s of both, beside 3 s... less than a worker alone
        (4, 8, False, 3, False),  # a GPU computes while the workers load
        (1, 8, False, 4, True),
    ],
)
def test_loading_and_training_overlap_as_the_cores_allow(
    workers: int, cores: int, on_cpu: bool, seconds: float, loading_bound: bool
) -> None:
    load = {0: 2.0, 1: 1.0 if on_cpu else 4.0, 4: 4.0}[workers]
    found = seconds_per_pair(compute=3.0, load=load, workers=workers, cores=cores, on_cpu=on_cpu)
    assert found == (pytest.approx(seconds), loading_bound)


@pytest.mark.parametrize(
    ("error", "dim", "change"),
    [
        (torch.OutOfMemoryError(), 4, "set TRAIN.MICRO_BATCH"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4, "set TRAIN.MICRO_BATCH"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 20_000_000, "lower PROJECTOR.DIMS"),
    ],
)
def test_too_large_for_the_device_is_said(
    error: RuntimeError, dim: int, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: CfgNode, size: int, device: torch.device) -> float:
        raise error

    monkeypatch.setattr(dry_run, "pairs_per_second", fail)
    config, device = get_defaults(), torch.device("cpu")
    config.PROJECTOR.DIMS = [16, dim]
    cost = dry_run.measure_cost(config, images_in_memory(), processes=1, steps=1, device=device)
    *_, line = dry_run.describe_cost(cost, config, device)
    assert f"unknown: the timed steps do not fit this cpu; {change}" in line


@pytest.mark.parametrize(
    ("device", "steps", "expected"),
    [
        (
            "cpu",
            999,
            ["fits: training and the loader's workers need about 1.60 GB of this machine's 2.00 GB", "NOT enough"],
        ),
        ("cuda", 1000, ["does NOT fit: training need about 1.50 GB of the GPU's 1.00 GB", "fits: the loader's", "few"]),
        ("cuda", 5000, ["does NOT fit", "fits", "enough: 5,000"]),
    ],
)
def test_the_verdict_is_in_words(device: str, steps: int, expected: list[str]) -> None:
    memory = Memory(parameters=100_000_000, activations=1_000_000_000, loader=100_000_000)
    there = 2_000_000_000 if device == "cpu" else 1_000_000_000
    cost = Cost(8, memory, there, 2_000_000_000, pairs_per_second=1.0, loading_bound=False, seconds=9000.0)
    title, *lines, last = verdict(cost, steps, device)
    assert title == "verdict"
    assert [text in line for text, line in zip(expected, lines, strict=True)] == [True] * len(expected)
    assert "about 2.5 hours" in last


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run.machine, "available_memory", lambda: 8_000_000_000)
    assert dry_run.device_memory(torch.device("cpu"), processes=1) == 8_000_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # of eight processes, on two machines
    assert dry_run.device_memory(torch.device("cpu"), processes=8) == dry_run.host_memory(8) == 2_000_000_000
    memory = Memory(parameters=0, activations=2_000_000_000, loader=0)
    cost = Cost(8, memory, None, dry_run.host_memory(8), None, loading_bound=False, seconds=None, sharing=4)
    _, memory_line, *_ = dry_run.verdict(cost, 100, "cpu")
    assert "of each process's part of this machine's 2.00 GB" in memory_line
    monkeypatch.setattr(dry_run.machine, "available_memory", lambda: None)
    assert dry_run.host_memory(8) is None


def test_existing_weights_need_a_tenth_of_the_steps() -> None:
    config = get_defaults()
    assert dry_run.needed_steps(config) == (1000, 5000)
    config.ENCODER.WEIGHTS = "imagenet.pth"
    assert dry_run.needed_steps(config) == (100, 500)
    cost = Cost(8, Memory(0, 0, 0), None, None, pairs_per_second=None, loading_bound=False, seconds=None)
    assert "enough: 600 (500 to 3,000" in list(verdict(cost, 600, "cpu", needed=(100, 500)))[-1]


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
    message = error_of(train.main, [*arguments, str(folder)])
    assert message == "3 of 12 images cannot be read; replace or remove those listed above"
    listed = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines() if ".jpg" in line]
    assert listed == [str(folder / name) for name in ("00.jpg", "07.jpg", "11.jpg")]
    assert not (tmp_path / "output").exists()


def test_the_estimate_is_within_a_factor_of_what_steps_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """In CPU time of loading and training, which other processes of the machine change less than wall time."""
    monkeypatch.setattr(dry_run, "clock", time.process_time)
    config, device, steps = get_defaults(), torch.device("cpu"), 4
    config.DATA.WORKERS, config.DATA.IMAGE_SIZE, config.TRAIN.BATCH_SIZE = 0, 48, 48
    config.ENCODER.NAME, config.PROJECTOR.DIMS = "resnet18", [64, 64, 6]
    pixels = np.random.default_rng(0).integers(0, 256, (48, 200, 150, 3), np.uint8)
    source = ArraySource(pixels, [0] * len(pixels), ["one"])
    cost = dry_run.measure_cost(config, source, processes=1, steps=steps, device=device)
    span = StepRange(0, steps, 1, steps)
    trainer = build_trainer(config, build_parts(config, device), device, span.total, span.per_epoch)
    started = time.process_time()
    for step, batch in enumerate(build_batches(config, source, span, device)):
        trainer.step(step, batch)
    taken = time.process_time() - started
    assert cost.seconds is not None
    assert taken / 1.5 < cost.seconds < taken * 1.5


def test_what_pytorch_keeps_of_the_timed_steps_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [30_000_000_000]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80_000_000_000 - sum(kept), 80_000_000_000))
    assert dry_run.device_memory(torch.device("cuda"), processes=1) == 80_000_000_000


def test_durations_as_text() -> None:
    found = [dry_run.describe_hours(seconds) for seconds in (5, 89, 91, 5400, 172800)]
    assert found == ["about 1 minute", "about 1 minute", "about 2 minutes", "about 1.5 hours", "about 2.0 days"]
