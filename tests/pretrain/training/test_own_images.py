"""The plan for own images: its rules, with the machine's measurements replaced, and a real run by it."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from foundation.config import load_config
from foundation.errors import UserError
from pretrain import train
from pretrain.config import get_defaults, validate
from pretrain.images.survey import Survey
from pretrain.runs import checkpoint
from pretrain.runs.weights import EncoderWeights
from pretrain.training import dry_run, own_images, run
from pretrain.training.dry_run import Memory
from pretrain.training.own_images import Measures, Place, choose, target_steps
from pretrain.training.suitability import memory_warning, steps_warning

CPU = Place("cpu", cores=2, memory=16_000_000_000)
GPU = Place("cuda", cores=16, memory=24_000_000_000)


def facts(count: int, side: int = 300, grey: bool = False) -> Survey:
    return Survey(count, side, 2 * side, [0.4, 0.4, 0.4], [0.2, 0.2, 0.2], grey, sampled=96)


def measures(second_per_pair: float = 0.01, megabytes: int = 10) -> Measures:
    """A pair of 64 pixels takes that long, and so much memory; both grow with the area."""

    def area(config: Any) -> float:
        return (config.DATA.IMAGE_SIZE / 64) ** 2

    def memory(config: Any) -> Memory:
        pairs = config.TRAIN.MICRO_BATCH or config.TRAIN.BATCH_SIZE
        return Memory(0, int(pairs * megabytes * 1e6 * area(config)), 0)

    return Measures(lambda config: second_per_pair * area(config), lambda config: 0.002, memory)


def plan(count: int, place: Place, *, given: dict[str, Any] | None = None, **more: Any) -> Any:
    config = get_defaults()
    for key, value in (given or {}).items():
        group, name = key.split(".")
        config[group][name] = value
    options = {"side": 300, "grey": False, "measures": measures(), **more}
    found = facts(count, options.pop("side"), options.pop("grey"))
    config, lines = choose(config, set(given or {}), found, place, options.pop("measures"), **options)
    validate(config)
    return config, lines


@pytest.mark.parametrize("place", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("count", [16, 100, 1000, 4000, 10000, 100000, 1000000])
def test_every_plan_keeps_the_ratios_that_the_objective_needs(count: int, place: Place) -> None:
    config, lines = plan(count, place)
    batch, dim = config.TRAIN.BATCH_SIZE, config.PROJECTOR.DIMS[-1]
    assert batch / dim >= 8
    assert 3.8 <= config.OBJECTIVE.ATTRACTION / dim <= 4.0
    assert batch <= max(16, count / 4)
    assert ("resnet18" if place is CPU else "resnet50") == config.ENCODER.NAME
    assert config.TRAIN.WARMUP_EPOCHS < config.TRAIN.EPOCHS
    steps = count // batch * config.TRAIN.EPOCHS
    assert steps >= 5000
    assert all(len(line.split(None, 2)) == 3 for line in lines if line.startswith("  "))


def test_the_values_for_6000_images_on_two_cores() -> None:
    config, _ = plan(6000, CPU)
    assert (config.TRAIN.BATCH_SIZE, config.PROJECTOR.DIMS, config.OBJECTIVE.ATTRACTION) == (128, [512, 512, 16], 62.5)
    assert config.DATA.IMAGE_SIZE == 48  # 5,000 steps of 128 pairs at 0.0066 s are 1.2 hours
    assert config.TRAIN.EPOCHS == 109  # of 46 steps: 5,014
    assert config.TRAIN.WARMUP_EPOCHS == 6
    assert config.TRAIN.LR == 0.0707
    assert config.ENCODER.ZERO_INIT_RESIDUAL
    assert config.DATA.MEAN == [0.4, 0.4, 0.4]


@pytest.mark.parametrize(
    ("count", "batch", "reason"),
    [
        (16, 16, "the smallest of a plan, although more than a quarter of the 16 images"),
        (64, 16, "the power of two within a quarter of the 64 images"),
        (92, 16, "the power of two within a quarter of the 92 images"),
        (370, 64, "the power of two within a quarter of the 370 images"),
        (512, 128, "smaller batches give more steps in the time"),
    ],
)
def test_a_batch_is_at_most_a_quarter_of_the_images_where_there_are_enough(count: int, batch: int, reason: str) -> None:
    config, lines = plan(count, CPU)
    assert batch == config.TRAIN.BATCH_SIZE
    (said,) = [line for line in lines if "TRAIN.BATCH_SIZE" in line]
    assert said.endswith(reason)


def test_a_rate_for_each_256_images_takes_the_place_of_the_learning_rate() -> None:
    _, lines = plan(6000, CPU, given={"TRAIN.LR_PER_256": 0.2})
    text = "\n".join(lines)
    assert "TRAIN.LR " not in text
    assert re.search(r"TRAIN.LR_PER_256 +0.2 +as given", text)


def test_the_learning_rate_follows_the_batch() -> None:
    found = [plan(100000, GPU, given={"TRAIN.BATCH_SIZE": b})[0].TRAIN.LR for b in (32, 128, 256, 512, 1024, 2048)]
    assert found == [0.0354, 0.0707, 0.1, 0.2, 0.4, 0.4]
    assert plan(100000, GPU)[0].ENCODER.ZERO_INIT_RESIDUAL  # of a ResNet-50


def test_a_slow_cpu_gets_smaller_views_then_fewer_steps() -> None:
    config, lines = plan(6000, CPU, measures=measures(0.05))  # at 48 pixels 5.2 hours, at 40 3.6
    assert config.DATA.IMAGE_SIZE == 40
    assert config.TRAIN.EPOCHS == 109
    config, lines = plan(6000, CPU, measures=measures(0.2))  # at 40 pixels 14 hours
    assert config.DATA.IMAGE_SIZE == 40
    steps = 46 * config.TRAIN.EPOCHS
    assert pytest.approx(steps, rel=0.05) == 4 * 3600 / (128 * (0.2 * (40 / 64) ** 2 + 0.001))
    assert any("as many as fit into 4 hours here" in line for line in lines)


def test_hours_bound_the_steps() -> None:
    config, _ = plan(10000, GPU, hours=1.0, measures=measures(0.001, megabytes=1))  # 128 pixels: 0.004 s
    assert pytest.approx(3600 / (512 * 0.004), rel=0.02) == 19 * config.TRAIN.EPOCHS


def test_hours_count_the_loading_of_a_gpu_that_waits_for_it() -> None:
    few = Place("cuda", cores=3, memory=24_000_000_000)
    slow = Measures(lambda _: 0.001, lambda _: 0.02, measures().memory)
    config, _ = plan(10000, few, hours=1.0, measures=slow)  # two workers load a pair in 0.01 s
    assert pytest.approx(3600 / (512 * 0.01), rel=0.03) == 19 * config.TRAIN.EPOCHS
    config, _ = plan(10000, few, hours=1.0, measures=slow, given={"DATA.WORKERS": 1})
    assert pytest.approx(3600 / (512 * 0.02), rel=0.06) == 19 * config.TRAIN.EPOCHS


def test_processes_on_cpus_share_the_pairs_when_the_side_is_chosen() -> None:
    pair = measures(0.05)  # alone at 40 pixels; 5,000 steps of 64 pairs at 48 pixels take 2.6 hours
    assert plan(6000, CPU, measures=pair)[0].DATA.IMAGE_SIZE == 40
    both = Place("cpu", cores=2, memory=16_000_000_000, processes=2)
    config, lines = plan(6000, both, measures=pair)
    assert config.DATA.IMAGE_SIZE == 48
    _, lines = plan(6000, both, measures=measures(0.5))
    assert any("the smallest; even so 5,000 steps take more than 4 hours" in line for line in lines)


def test_a_micro_batch_that_is_no_part_of_the_batch_costs_nothing() -> None:
    given = {"TRAIN.MICRO_BATCH": 512}
    small = measures(0.001, megabytes=1)
    found = [plan(10000, GPU, hours=1.0, measures=small, given=g)[0].TRAIN.EPOCHS for g in ({}, given)]
    assert found[0] == found[1]


def test_hours_on_a_cpu_also_allow_more_steps_than_it_takes_by_itself() -> None:
    assert plan(6000, CPU)[0].TRAIN.EPOCHS == 109
    assert pytest.approx(19000 / 46, abs=1) == plan(6000, CPU, hours=100.0)[0].TRAIN.EPOCHS


def test_memory_that_does_not_hold_the_batch_holds_a_part_of_it() -> None:
    small = Place("cuda", cores=8, memory=8_000_000_000)
    config, _ = plan(10000, small)  # 512 pairs of 128 pixels at 40 MB are 20 GB, and 1.4 times that
    assert config.TRAIN.BATCH_SIZE == 512
    assert config.TRAIN.MICRO_BATCH == 128  # 128 x 40 MB x 1.4 is 7.17 of 7.2 GB


def test_views_are_no_larger_than_the_images() -> None:
    assert plan(5000, GPU, side=100)[0].DATA.IMAGE_SIZE == 96
    config, _ = plan(5000, GPU, side=28)
    assert (config.DATA.IMAGE_SIZE, config.ENCODER.STEM) == (32, "cifar")
    assert plan(5000, CPU, side=50)[0].DATA.IMAGE_SIZE == 48


def test_what_is_given_stays_and_the_rest_follows() -> None:
    given = {"TRAIN.BATCH_SIZE": 64, "TRAIN.EPOCHS": 3, "ENCODER.NAME": "resnet34", "DATA.IMAGE_SIZE": 100}
    config, lines = plan(6000, CPU, given=given)
    assert (config.TRAIN.BATCH_SIZE, config.TRAIN.EPOCHS, config.ENCODER.NAME) == (64, 3, "resnet34")
    assert config.DATA.IMAGE_SIZE == 100
    assert config.PROJECTOR.DIMS[-1] == 8
    assert config.TRAIN.WARMUP_EPOCHS == 1
    assert sum("as given" in line for line in lines) == 4


def test_existing_weights_need_fewer_steps_at_a_lower_rate() -> None:
    weights = EncoderWeights("w.pth", "supervised", {}, "resnet18", "imagenet", [0.1] * 3, [0.3] * 3)
    config, _ = plan(1000, GPU, weights=weights, given={"ENCODER.WEIGHTS": "w.pth"})
    assert config.ENCODER.NAME == "resnet18"
    assert config.DATA.MEAN == [0.1] * 3
    assert config.TRAIN.BATCH_SIZE == 128
    assert config.TRAIN.LR == 0.0212
    assert pytest.approx(500, abs=7) == 7 * config.TRAIN.EPOCHS
    assert config.DATA.IMAGE_SIZE == 224


def test_grey_images_get_no_colour_changes() -> None:
    config, _ = plan(5000, CPU, grey=True)
    assert (config.AUGMENT.HUE, config.AUGMENT.SATURATION, config.AUGMENT.GRAY) == (0, 0, 0)
    assert plan(5000, CPU)[0].AUGMENT.GRAY > 0


def test_labels_are_used_to_monitor() -> None:
    assert plan(6000, CPU, labelled=True)[0].PROBE.EVERY == 5
    assert plan(6000, CPU, given={"PROBE.ROOT": "/labelled"})[0].PROBE.EVERY == 5
    assert plan(6000, CPU)[0].PROBE.EVERY == 0
    assert [plan(count, CPU, labelled=True)[0].PROBE.K for count in (16, 20, 100)] == [16, 20, 20]


def test_too_few_images() -> None:
    with pytest.raises(UserError, match="too few images, 15: give at least 16"):
        plan(15, CPU)


def test_target_steps() -> None:
    """Hierarchical pretraining (Reed et al. 2021) took 500 to 5,000 steps where training from scratch took 400,000."""
    assert [target_steps(n, "cuda", False) for n in (1000, 10000, 100000)] == [10000, 22000, 50000]
    assert [target_steps(n, "cuda", True) for n in (1000, 10000, 100000)] == [500, 2500, 12600]
    assert target_steps(10**9, "cpu", False) == 5000


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_timing_takes_what_the_device_holds(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def holds(most: int) -> Any:
        def speed(config: Any, size: int, device: torch.device) -> float:
            tried.append(size)
            if size > most:
                raise error
            return 4.0

        return speed

    monkeypatch.setattr(dry_run, "pairs_per_second", holds(70))
    config, device = get_defaults(), torch.device("cuda")
    assert own_images.time_pair(config, device) == 0.25
    assert tried == [256, 128, 64]
    monkeypatch.setattr(dry_run, "pairs_per_second", holds(1))
    with pytest.raises(UserError, match="lower DATA"):
        own_images.time_pair(config, device)


@pytest.fixture
def slow_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run of two epochs where the plan is followed, since a pair seems to take a minute; in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "pairs_per_second", lambda config, size, device: 0.0042)
    monkeypatch.setattr(own_images, "CPU_SIDES", (32,))


def test_a_run_by_plan_and_its_exact_continuation(
    slow_machine: None, photos: Path, tmp_path: Path, error_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.main([str(photos / "train"), "TRAIN.MAX_STEPS=1", "--epochs", "2", "DATA.WORKERS=0"])
    run = tmp_path / "output" / "train"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["DATA"]["ROOT"] == str(photos / "train")
    assert config["TRAIN"]["BATCH_SIZE"] == 16
    assert config["TRAIN"]["EPOCHS"] == 2
    log = (run / "log.txt").read_text()
    assert "plan for 24 images" in log
    assert "TRAIN.BATCH_SIZE" in log
    # The plan would come out differently now; the run's own configuration is what counts.
    (tmp_path / "other").mkdir()
    train.main([str(photos / "train"), "--resume", "TRAIN.MAX_STEPS=2"])
    state = checkpoint.load(run / "checkpoints" / "last.pt")
    assert state["position"]["step"] == 2
    again = {**config, "TRAIN": {**config["TRAIN"], "MAX_STEPS": 2}}
    assert yaml.safe_load((run / "config.yaml").read_text()) == again
    # Without --resume it is refused, before the plan measures anything.
    monkeypatch.setattr(own_images, "plan_run", lambda *_: pytest.fail("the plan was made"))
    assert "add --resume to continue it" in error_of(train.main, [str(photos / "train")])


def test_too_many_damaged_images_are_refused_before_there_is_a_run(
    slow_machine: None, photos: Path, tmp_path: Path, error_of: Callable, capsys: pytest.CaptureFixture
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(photos / "train" / "circle", damaged / "circle")
    shutil.copytree(photos / "train" / "square", damaged / "square")
    for name in ("circle/03.jpg", "square/11.jpg"):
        content = (damaged / name).read_bytes()
        (damaged / name).write_bytes(content[: len(content) // 2])  # its header is in order
    refused = error_of(train.main, [str(damaged), "--epochs", "1"])
    assert refused.startswith("2 of 24 images cannot be read, more than DATA.MAX_UNREADABLE (0.01) allows")
    assert "circle/03.jpg" in refused
    assert not (tmp_path / "output").exists()
    train.main([str(damaged), "--dry-run", "DATA.MAX_UNREADABLE=0.1"])
    assert "2 of 24 images cannot be read and are replaced by others" in capsys.readouterr().out


def test_the_plan_counts_hidden_files(
    slow_machine: None, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(photos / "train", tmp_path / "all")
    (tmp_path / "all" / "circle" / "02.jpg").rename(tmp_path / "all" / "circle" / ".02.jpg")
    (tmp_path / "all" / ".new").mkdir()
    train.main([str(tmp_path / "all"), "--dry-run"])
    printed = capsys.readouterr().out
    assert "plan for 23 images" in printed
    assert "  left out: 1 hidden image and 1 hidden folder (names that begin with a dot)" in printed


def test_folders_are_joined_and_a_plan_is_printed(
    slow_machine: None, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train.main(["--dry-run", str(photos / "train" / "circle"), str(photos / "train" / "square"), "--hours", "1"])
    printed = capsys.readouterr().out
    assert printed.startswith("plan for 24 images (median ")
    assert "fewer than 1,000 images" in printed
    assert "as many as fit into 1 hour here" in printed
    assert "memory          fits" in printed
    assert "steps           NOT enough" in printed
    assert not (tmp_path / "output").exists()
    train.main(["--dry-run", str(photos)])
    assert "images of train/ only; val left out" in capsys.readouterr().out


def test_a_run_from_existing_weights(
    slow_machine: None, photos: Path, tmp_path: Path, error_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [str(photos / "train"), "--epochs", "1", "TRAIN.MAX_STEPS=1", "DATA.WORKERS=0"]
    train.main([*common, "--output", "first", "--encoder", "resnet18"])
    first = tmp_path / "first" / "encoder.safetensors"
    still = ["TRAIN.LR=1e-12", "TRAIN.WARMUP_LR=0", "TRAIN.MIN_LR=0"]
    train.main([*common, "--output", "second", "--weights", str(first), *still])
    before, after = (safetensors.torch.load_file(tmp_path / run / "encoder.safetensors") for run in ("first", "second"))
    weights = [name for name in before if name.endswith("weight")]
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in weights)
    metadata = json.loads(_header(tmp_path / "second" / "encoder.safetensors"))["__metadata__"]
    assert metadata["begun_from"] == str(first)
    monkeypatch.setattr(own_images, "survey", lambda source: pytest.fail("the images were measured first"))
    wrong = error_of(train.main, [*common, "--output", "third", "--weights", str(first), "--encoder", "resnet34"])
    assert "resnet18" in wrong
    assert "resnet34" in wrong


def _header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def test_wrong_paths_are_named(slow_machine: None, photos: Path, tmp_path: Path, error_of: Callable) -> None:
    picture = next((photos / "train" / "circle").iterdir())
    tars, empty = tmp_path / "tars", tmp_path / "empty"
    tars.mkdir()
    empty.mkdir()
    (tmp_path / "annotations.json").write_text('{"images": []}')
    (tars / "a.tar").write_bytes(b"")
    for argv, message in [
        (["nowhere"], "there is no folder or tar nowhere"),
        ([str(picture)], "is a single image; give the folder"),
        ([str(tars), str(photos)], "give only one of the two kinds"),
        ([str(photos), f"{photos}/."], "is given twice"),
        ([str(photos / "train"), str(photos)], f"{photos}/train lies in {photos}, so its images would count twice"),
        (["--hours", "2"], "--hours is the time that a plan may use"),
        ([str(tmp_path / "tars")], "a.tar"),
        ([str(empty)], ".pgm); check PATH"),
        ([str(empty), "--check-data"], ".pgm); check PATH"),
        ([str(empty), "--config", "shapes_R18"], ".pgm); check PATH"),
        ([str(empty), "--config", "shapes_R18", "--dry-run"], ".pgm); check PATH"),
        (["annotations.json"], "of images in a folder, give the folder"),
        ([str(photos), "PROBE.ROOT", "nowhere"], "PROBE.ROOT: the image folder nowhere does not exist; check the path"),
        ([str(photos), "--weights", "nowhere.pt"], "the weights nowhere.pt do not exist; check --weights"),
        ([str(photos), "--weights", "random"], "--weights random (ENCODER.WEIGHTS) is the default here: leave it out"),
        ([str(photos), "--output", str(photos / "runs" / "a")], f"runs/a, among the images of {photos}: add --output"),
    ]:
        found = error_of(train.main, argv)
        assert message in found
        assert "DATA.ROOT" not in found, "an option that the user has not given"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--hours", "nan"], "--hours is the time"),
        (["--hours", "inf"], "--hours is the time"),
        (["--batch-size", "0"], "TRAIN.BATCH_SIZE must be at least 2"),
        (["PROJECTOR.DIMS=[]"], "PROJECTOR.DIMS must be a list"),
        (["DATA.IMAGE_SIZE=0"], "DATA.IMAGE_SIZE must be between"),
        (["SEED=-1"], "SEED must be between"),
        (["AUGMENT.BLUR=[1.0]"], "AUGMENT.BLUR must be a list of 2 numbers"),
        (["TRAIN.MICRO_BATCH=-1"], "TRAIN.MICRO_BATCH must be at least 0"),
    ],
)
def test_given_values_are_checked_before_a_plan_uses_them(
    wrong: list[str], message: str, photos: Path, error_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_images, "survey", lambda source: pytest.fail("the images were measured first"))
    assert message in error_of(train.main, [str(photos), "--dry-run", *wrong])


@pytest.mark.parametrize(("count", "batch", "message"), [(100, 2, "the 4 processes"), (20, 64, "has 20 images")])
def test_a_batch_that_cannot_be_formed_is_refused_before_anything_is_timed(
    count: int, batch: int, message: str
) -> None:
    place = Place("cpu", cores=1, memory=None, processes=4)
    with pytest.raises(UserError, match=message):
        plan(count, place, given={"TRAIN.BATCH_SIZE": batch}, measures=None)


def test_memory_that_runs_out_is_reported_with_the_planned_batch(
    slow_machine: None, photos: Path, error_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: Any) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(run, "pretrain", run_out)
    assert "set TRAIN.MICRO_BATCH below 16" in error_of(train.main, [str(photos), "--epochs", "2", "DATA.WORKERS=0"])


def test_a_run_of_a_folder_whose_name_is_not_unicode_has_a_name_that_is() -> None:
    args = train.parse(["somewhere/" + os.fsdecode(b"photos\xff")])
    assert train.output_folder(args) == Path("output/photos\ufffd")


@pytest.mark.parametrize(("here", "cores"), [("4", 4), ("2", 8), ("1", 16)])
def test_the_cores_are_divided_among_the_processes_of_this_machine(
    here: str, cores: int, slow_machine: None, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(dry_run.machine, "usable_cores", lambda: 16)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": here}.items():
        monkeypatch.setenv(name, value)
    train.main([str(photos), "--dry-run"])
    assert f"on {cores} CPU core{'s' * (cores > 1)}" in capsys.readouterr().out


def test_a_micro_batch_of_one_image_is_refused_for_what_it_is() -> None:
    config = get_defaults()
    config.TRAIN.MICRO_BATCH = 1
    with pytest.raises(UserError, match=r"TRAIN.MICRO_BATCH: BatchNorm needs at least two images"):
        own_images.time_pair(config, torch.device("cpu"))


def test_a_recipe_that_cannot_work_says_so(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, error_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--config", "shapes_R18", "--output", "run", str(photos), "TRAIN.BATCH_SIZE=8", "PROJECTOR.DIMS=[16,4]"]
    small = [*argv, "DATA.IMAGE_SIZE=32", "DATA.WORKERS=0", "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0"]
    train.main(small)
    advice = (
        "warning: 3 steps are too few to learn much (24 images, TRAIN.BATCH_SIZE 8: 3 an epoch); set TRAIN.EPOCHS 1667"
    )
    assert "".join(capsys.readouterr()).count(advice) == 1, "on a terminal, which shows both streams"
    assert advice in (tmp_path / "run" / "log.txt").read_text()
    train.main([*small, "--resume"])
    assert advice not in "".join(capsys.readouterr()), "a resumed run repeats it"
    huge = [*argv, "DATA.IMAGE_SIZE=4096", "--output", "huge"]
    monkeypatch.setattr(dry_run.machine, "available_memory", lambda: 1_000_000_000)
    message = error_of(train.main, huge)
    assert "8 pairs at once need" in message
    assert "set TRAIN.MICRO_BATCH 2" in message
    assert "add TRAIN.WARMUP_EPOCHS 0" in error_of(train.main, [*argv, "--epochs", "1"])


@pytest.mark.parametrize(
    ("gigabytes", "part", "workers", "advice"),
    [
        # Training takes 3.3 GB, a worker 1.5 GB.
        (16, 16, 64, r"set DATA.WORKERS 7 \(the batches of 64 workers take 95.19 GB\)$"),
        (3.5, 16, 1, r"set DATA.WORKERS 0 \(the batches of 1 worker take 1.49 GB\)$"),
        (16, 256, 4, r"set TRAIN.MICRO_BATCH 32 \(the loss stays .*\), or lower DATA.IMAGE_SIZE$"),
        (16, 256, 64, r"set TRAIN.MICRO_BATCH 32 .* lower DATA.IMAGE_SIZE; and set DATA.WORKERS 4 \(the batches"),
        (1.5, 2, 0, r"this machine has 1.50 GB free; lower DATA.IMAGE_SIZE$"),
        (0.1, 16, 0, r"need 1.35 GB, and .*; lower PROJECTOR.DIMS, or choose a smaller ENCODER.NAME$"),
    ],
)
def test_the_advice_on_memory_is_about_what_does_not_fit(
    gigabytes: float, part: int, workers: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(get_defaults(), "imagenet1k_R50", "pretrain")
    config.DATA.WORKERS, config.TRAIN.MICRO_BATCH = workers, part
    monkeypatch.setattr(dry_run.machine, "available_memory", lambda: int(gigabytes * 1e9))
    try:
        (said,) = memory_warning(config, torch.device("cpu"), 1)
    except UserError as error:
        said = str(error)
    assert re.search(advice, said), said


def test_a_plan_with_too_few_steps_names_the_options_that_give_more() -> None:
    config = get_defaults()
    config.DATA.NAME, config.TRAIN.BATCH_SIZE, config.TRAIN.EPOCHS, config.TRAIN.WARMUP_EPOCHS = "folder", 8, 1, 0
    (line,) = steps_warning(config, True, 24)
    assert line.endswith("(24 images, TRAIN.BATCH_SIZE 8: 3 an epoch); give --epochs 1667, or more --hours")
    config.TRAIN.EPOCHS = 1667
    assert steps_warning(config, True, 24) == []
