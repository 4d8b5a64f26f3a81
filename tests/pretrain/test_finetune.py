"""`python pretrain/finetune.py` from the outside: what is trained, on what, resume, and bad input."""

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foundation.config import config_folder, load_config
from foundation.signals import STOPPED
from pretrain import finetune, linear, train
from pretrain.encoder import build_encoder
from pretrain.evaluation import finetuning
from pretrain.evaluation.config import get_finetune_defaults, get_linear_defaults, validate_finetune, validate_linear
from pretrain.evaluation.supervised import SupervisedTrainer
from pretrain.runs import checkpoint
from pretrain.runs.weights import fingerprint, read_weights, write_encoder

TINY = [
    *("DATA.NAME", "folder", "DATA.IMAGE_SIZE", "32", "DATA.WORKERS", "0", "TRAIN.PRECISION", "float32"),
    *("TRAIN.BATCH_SIZE", "4", "TRAIN.EPOCHS", "2", "LOG.PERIOD", "1"),
    *("TRAIN.SCHEDULE", "step", "TRAIN.MILESTONES", "[1]", "FINETUNE.ENCODER_LR", "0.01", "FINETUNE.HEAD_LR", "0.1"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(5)
    encoder = build_encoder("resnet18", "imagenet")
    statistics = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    write_encoder(run, encoder, objective="corinfomax", name="resnet18", stem="imagenet", **statistics)
    return run


def arguments(photos: Path, weights: Path | str, output: Path, *more: str) -> list[str]:
    given = ["--config", "shapes_R18", "--weights", str(weights), "--output", str(output)]
    return [*given, *TINY, "DATA.ROOT", str(photos), *more]


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def state_of(run: Path) -> dict[str, Any]:
    return checkpoint.load(run / "checkpoints" / "last.pt")


@pytest.fixture(scope="module")
def finished(photos: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finetune")
    finetune.main(arguments(photos, weights, output, "--fraction", "0.5"))
    return output


def test_a_run_leaves_what_others_need(finished: Path, weights: Path) -> None:
    found = results(finished)
    assert (found["kind"], found["config"], found["init"]) == ("finetune", "shapes_R18", "corinfomax")
    assert (found["fraction"], found["images"], found["seed"]) == (0.5, 12, 0)  # half of 12 in each of 2 classes
    assert 0 <= found["top1"] <= found["best_top1"] <= 100
    assert found["best_epoch"] >= 1
    state = state_of(finished)
    assert state["format"] == "corinfomax-finetune"
    assert state["position"] == {"epoch": 2, "step": 6}
    assert {name.split(".")[0] for name in state["model"]} == {"encoder", "head"}
    assert state["model"]["head.weight"].shape == (2, 512)
    exported = read_weights(str(finished))
    assert all(torch.equal(exported.tensors[name], state["model"][f"encoder.{name}"]) for name in exported.tensors)
    assert (exported.init, exported.name, exported.mean) == ("corinfomax, fine-tuned", "resnet18", [0.5, 0.4, 0.3])
    lines = [json.loads(line) for line in (finished / "metrics.json").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines if "loss" in line] == pytest.approx([0.01] * 3 + [0.002] * 3)
    assert sum("top1" in line for line in lines) == 2


def test_encoder_and_head_learn_each_at_its_own_rate(
    photos: Path, weights: Path, finished: Path, tmp_path: Path
) -> None:
    before = read_weights(str(weights)).tensors
    after = state_of(finished)["model"]
    assert not torch.equal(before["conv1.weight"], after["encoder.conv1.weight"])
    assert after["encoder.bn1.num_batches_tracked"] == 6
    groups = state_of(finished)["optimizer"]["param_groups"]
    # One milestone, before the last epoch: x 0.2 for the encoder, x 0.1 for the head.
    assert [group["lr"] for group in groups] == pytest.approx([0.002, 0.01])
    finetune.main(arguments(photos, weights, tmp_path, "FINETUNE.ENCODER_LR", "0.0", "TRAIN.EPOCHS", "1"))
    still = state_of(tmp_path)["model"]
    assert torch.equal(before["conv1.weight"], still["encoder.conv1.weight"])
    assert not torch.equal(still["head.weight"], after["head.weight"])


@pytest.mark.parametrize("stop", [3, 4], ids=["between epochs", "within an epoch"])
def test_resumed_equals_uninterrupted_bit_for_bit(
    finished: Path, photos: Path, weights: Path, tmp_path: Path, stop: int
) -> None:
    finetune.main(arguments(photos, weights, tmp_path, "--fraction", "0.5", "TRAIN.MAX_STEPS", str(stop)))
    finetune.main(arguments(photos, weights, tmp_path, "--fraction", "0.5", "--resume"))
    whole, resumed = state_of(finished)["model"], state_of(tmp_path)["model"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert results(finished) == results(tmp_path)


@pytest.mark.parametrize(("step", "number"), [(3, signal.SIGTERM), (4, signal.SIGINT)], ids=["epoch", "within it"])
def test_a_signal_saves_and_leaves_with_its_own_status(
    step: int, number: signal.Signals, finished: Path, photos: Path, weights: Path, tmp_path: Path
) -> None:
    options = ["--fraction", "0.5", "DATA.WORKERS", "1"]
    take, taken = SupervisedTrainer.step, []

    def signalled(self: SupervisedTrainer, *values: Any) -> Any:
        taken.append(values)
        if len(taken) == step:
            signal.raise_signal(number)
        return take(self, *values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SupervisedTrainer, "step", signalled)
        with pytest.raises(SystemExit) as left:
            finetune.main(arguments(photos, weights, tmp_path, *options))
    assert left.value.code == STOPPED
    assert state_of(tmp_path)["position"] == {"epoch": 1, "step": step}
    assert "stopped as requested; the same command with --resume continues" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "results.json").exists()
    finetune.main(arguments(photos, weights, tmp_path, *options, "--resume"))
    whole, resumed = state_of(finished)["model"], state_of(tmp_path)["model"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert results(finished) == results(tmp_path)


def test_a_complete_run_prints_its_results_without_computing(
    finished: Path, photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    again = arguments(photos, weights, run, "--fraction", "0.5", "--resume")
    monkeypatch.setattr(finetuning, "extract", None)
    finetune.main(again)
    assert results(run) == results(finished)
    last = (run / "log.txt").read_text().splitlines()[-1]
    assert last.endswith(f"top-1 {results(run)['top1']:.2f} %; all results are in {run}/results.json")
    monkeypatch.undo()
    (run / "encoder.safetensors").unlink()  # written again
    finetune.main(again)
    assert read_weights(str(run)).init == "corinfomax, fine-tuned"
    assert results(run) == results(finished)


@pytest.mark.parametrize("line", ["the run is complete", "all results are in"])
def test_a_signal_to_a_complete_run_is_ignored(
    line: str,
    finished: Path,
    photos: Path,
    weights: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    signal_at_line: Callable,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    signal_at_line(line, signal.SIGUSR1)
    finetune.main(arguments(photos, weights, run, "--fraction", "0.5", "--resume"))
    assert "received" not in capfd.readouterr().err


def test_from_scratch_and_probed_afterwards(photos: Path, tmp_path: Path) -> None:
    zero = ["ENCODER.ZERO_INIT_RESIDUAL", "True"]
    finetune.main(arguments(photos, "random", tmp_path / "a", "TRAIN.MAX_STEPS", "2", *zero))
    found = results(tmp_path / "a")
    assert (found["init"], found["images"], found["fraction"]) == ("random", 24, 1.0)
    torch.manual_seed(0)
    assert found["encoder_sha256"] == fingerprint(build_encoder("resnet18", "imagenet", zero_init_residual=True))
    checkpoint_file = tmp_path / "a" / "checkpoints" / "last.pt"
    probe = ["--weights", str(checkpoint_file), "--output", str(tmp_path / "b"), *TINY[:10], "TRAIN.EPOCHS", "1"]
    linear.main([*probe, "LINEAR.CACHED_VIEWS", "1", "DATA.ROOT", str(photos)])
    # Nothing but labels has trained it; the weights that a run ends with say so wherever they are read.
    assert results(tmp_path / "b")["init"] == "supervised"
    assert read_weights(str(tmp_path / "a")).init == "supervised"


def test_images_by_list(photos: Path, weights: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
    root = tmp_path / "data"
    for path in sorted(photos.rglob("*.jpg")):
        split, label = path.parts[-3:-1]
        (root / split / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / split / label / f"{label}_{path.name}")
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{label}_0{i}.jpg\n" for label in ("circle", "square") for i in range(3)))
    digest = hashlib.sha256(names.read_bytes()).hexdigest()
    given = ["DATA.LIST", str(names), "DATA.LIST_SHA256", digest, "TRAIN.EPOCHS", "1"]
    finetune.main(arguments(root, weights, tmp_path / "run", *given))
    assert results(tmp_path / "run")["images"] == 6
    names.write_text("circle_00.jpg\nn01440764_10074.JPEG\n")
    never = arguments(root, weights, tmp_path / "never", "DATA.LIST", str(names))
    assert "names 1 file, of 2 in all, not found among the 24 training images" in error_of(finetune.main, never)
    names.write_text("circle_00.jpg\n\ncircle_00.jpg\n")
    assert "names.txt names circle_00.jpg more than once" in error_of(finetune.main, never)
    names.write_text("\n")
    assert "names.txt names no file" in error_of(finetune.main, never)
    assert "is not the file expected" in error_of(finetune.main, [*never, "DATA.LIST_SHA256", digest])
    assert "set only one of them" in error_of(finetune.main, [*never, "DATA.FRACTION", "0.5"])
    assert not (tmp_path / "never").exists()
    finetune.main([*arguments(root, weights, tmp_path / "half", *given), "--fraction", "0.5"])
    assert results(tmp_path / "half")["images"] == 12  # --fraction takes the place of the list


@pytest.mark.parametrize("fraction", ["0", "-0.1", "1.01", "nan", "inf"])
def test_a_fraction_is_above_0_and_at_most_1(fraction: str, error_of: Callable[..., str]) -> None:
    wrong = f"must be above 0 and at most 1, not {fraction}"
    assert error_of(finetune.main, ["--config", "shapes_R18", f"--fraction={fraction}"]) == f"--fraction {wrong}"
    assert error_of(finetune.main, ["--config", "shapes_R18", f"DATA.FRACTION={fraction}"]) == f"DATA.FRACTION {wrong}"


def test_bad_input_is_one_line(
    photos: Path, weights: Path, finished: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    def error(given: Path | str, *more: str, output: Path = tmp_path / "never") -> str:
        return error_of(finetune.main, arguments(photos, given, output, *more))

    assert "--config" in error_of(finetune.main, [])
    assert "the weights nosuch do not exist" in error("nosuch")
    assert "ENCODER.NAME 'resnet18', but the config says 'resnet50'" in error(weights, "ENCODER.NAME", "resnet50")
    assert "set TRAIN.BATCH_SIZE 2 or lower" in error(weights, "--fraction", "0.01")
    assert "TRAIN.BATCH_SIZE 1: BatchNorm needs at least two" in error(weights, "TRAIN.BATCH_SIZE", "1")
    assert "FINETUNE.HEAD_LR must be" in error(weights, "FINETUNE.HEAD_LR", "-1")
    assert "TRAIN.SCHEDULE is 'linear'" in error(weights, "TRAIN.SCHEDULE", "linear")
    assert not (tmp_path / "never").exists()
    assert "add --resume" in error(weights, output=finished)
    assert "DATA.FRACTION: 0.5 then, 1.0 now" in error(weights, "--resume", output=finished)
    same = ["--fraction", "0.5", "--resume", "DATA.MEAN", "[0.5, 0.4, 0.3]", "DATA.STD", "[0.2, 0.2, 0.2]"]
    assert "began with another encoder" in error("random", *same, output=finished)


def test_damaged_images_can_be_listed_as_the_message_says(
    photos: Path, weights: Path, tmp_path: Path, error_of: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(photos, folder)
    images = sorted((folder / "train").rglob("*.jpg"))
    for path in images:
        path.write_bytes(path.read_bytes()[:300])
    probe = ["--weights", str(weights), "--output", str(tmp_path / "probe"), *TINY[:10], "DATA.ROOT", str(folder)]
    for main, given in ((finetune.main, arguments(folder, weights, tmp_path / "run")), (linear.main, probe)):
        message = error_of(main, given)
        assert "20 images in a row cannot be read, the last: " in message
        assert message.endswith("`python pretrain/train.py FOLDER --check-data` lists all images that cannot be read")
    capsys.readouterr()
    error_of(train.main, [str(folder), "--check-data", "DATA.WORKERS", "0"])
    listed = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines() if ".jpg" in line]
    assert listed == [str(path) for path in images]


def test_every_recipe_loads() -> None:
    for path in config_folder("linear").glob("*.yaml"):
        validate_linear(load_config(get_linear_defaults(), str(path), "linear"))
    for path in config_folder("finetune").glob("*.yaml"):
        validate_finetune(load_config(get_finetune_defaults(), str(path), "finetune"))


def test_the_articles_numbers() -> None:
    one, ten = (load_config(get_finetune_defaults(), f"imagenet1k_{n}percent", "finetune") for n in (1, 10))
    assert (one.TRAIN.EPOCHS, one.TRAIN.BATCH_SIZE, one.TRAIN.MILESTONES) == (20, 256, [5, 10, 15])
    assert (one.FINETUNE.ENCODER_LR, one.FINETUNE.HEAD_LR, ten.FINETUNE.HEAD_LR) == (0.005, 30, 20)
    assert (one.FINETUNE.ENCODER_GAMMA, one.FINETUNE.HEAD_GAMMA, one.TRAIN.WEIGHT_DECAY) == (0.2, 0.1, 0)
    probe = load_config(get_linear_defaults(), "imagenet1k_R50", "linear")
    assert (probe.LINEAR.LR, probe.LINEAR.GAMMA, probe.TRAIN.SCHEDULE) == ([25], 0.1, "step")
    assert (probe.TRAIN.EPOCHS, probe.TRAIN.BATCH_SIZE, probe.TRAIN.MILESTONES) == (100, 256, [20, 40, 60, 80])
    cifar = load_config(get_linear_defaults(), "cifar10_R18", "linear")
    assert (cifar.LINEAR.LR, cifar.TRAIN.FINAL, cifar.TRAIN.SCHEDULE) == ([0.2], 0.01, "cosine")
