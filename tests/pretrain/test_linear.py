"""`python pretrain/linear.py` from the outside: results, resume, cache, processes, and bad input."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from foundation.images import UnreadableImage
from foundation.signals import STOPPED
from pretrain import linear
from pretrain.encoder import build_encoder
from pretrain.evaluation.features import FeatureExtractor
from pretrain.evaluation.linear import EncoderChanged
from pretrain.images.sources import FileSource
from pretrain.runs import checkpoint
from pretrain.runs.weights import build_from, fingerprint, read_weights, write_encoder
from tests.convert.conftest import tiny_resnet

TINY = [
    *("DATA.NAME", "folder", "DATA.IMAGE_SIZE", "32", "DATA.WORKERS", "0", "TRAIN.PRECISION", "float32"),
    *("TRAIN.BATCH_SIZE", "8", "TRAIN.EPOCHS", "3", "LOG.PERIOD", "2", "KNN.K", "[3, 20, 25]"),
    *("LINEAR.CACHED_VIEWS", "0", "LINEAR.LR", "[0.2, 0.01]"),
]
SCRIPT = Path(linear.__file__)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(5)
    write_encoder(
        run,
        build_encoder("resnet18", "imagenet"),
        objective="corinfomax",
        name="resnet18",
        stem="imagenet",
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.2, 0.2],
    )
    return run


def arguments(photos: Path, weights: Path | str, output: Path, *more: str) -> list[str]:
    return ["--weights", str(weights), "--output", str(output), *TINY, "DATA.ROOT", str(photos), *more]


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def heads_of(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "checkpoints" / "last.pt")["model"]


@pytest.fixture(scope="module")
def finished(photos: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("linear")
    linear.main(arguments(photos, weights, output))
    return output


def test_a_run_leaves_what_others_need(finished: Path, weights: Path) -> None:
    found = results(finished)
    assert found["kind"] == "linear"
    assert found["config"] == "shapes_R18"
    assert found["init"] == "corinfomax"
    assert found["weights"] == str(weights / "encoder.safetensors")
    assert (found["dataset"], found["encoder"], found["seed"], found["k"]) == ("folder", "resnet18", 0, 3)
    for key in ("linear_top1", "linear_best_top1", "knn_top1"):
        assert 0 <= found[key] <= 100
    assert "linear_top5" not in found  # of two classes every guess would be among five
    assert "knn_top5" not in found
    assert found["knn"].keys() == {"3", "20"}
    assert "kNN, k 25: left out, because there are only 24 training images" in (finished / "log.txt").read_text()
    assert [head["lr"] for head in found["heads"]] == [0.2, 0.01]
    assert found["linear_top1"] == max(head["linear_top1"] for head in found["heads"])
    lines = [json.loads(line) for line in (finished / "metrics.json").read_text().splitlines()]
    for head in found["heads"]:
        by_epoch = [line[f"linear_top1_lr{head['lr']:g}"] for line in lines if f"linear_top1_lr{head['lr']:g}" in line]
        assert head["linear_top1"] == by_epoch[-1]
        assert head["linear_best_top1"] == max(by_epoch)
        assert by_epoch[head["linear_best_epoch"] - 1] == max(by_epoch)
    assert sum("linear_top1_lr0.01" in line for line in lines) == 3  # once an epoch
    assert lines[0].keys() >= {"iteration", "loss_lr0.2", "loss_lr0.01", "learning_rate", "epoch"}
    assert "MEAN:\n  - 0.5" in (finished / "config.yaml").read_text()  # the encoder's own pixel statistics
    assert heads_of(finished).keys() == {f"head.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    last = (finished / "log.txt").read_text().splitlines()[-1]
    linear_top1, knn_top1 = (found[name] for name in ("linear_top1", "knn_top1"))
    assert last.endswith(
        f"linear top-1 {linear_top1:.2f} %, kNN top-1 {knn_top1:.2f} %; all results are in {finished}/results.json"
    )


@pytest.mark.parametrize("stop", [3, 5], ids=["between epochs", "within an epoch"])
def test_resumed_equals_uninterrupted_bit_for_bit(
    finished: Path, photos: Path, weights: Path, tmp_path: Path, stop: int
) -> None:
    linear.main(arguments(photos, weights, tmp_path, "TRAIN.MAX_STEPS", str(stop)))
    linear.main(arguments(photos, weights, tmp_path, "--resume"))
    whole, resumed = heads_of(finished), heads_of(tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert results(finished) == results(tmp_path)


def test_a_complete_run_prints_its_results_without_computing(
    finished: Path, photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    monkeypatch.setattr(FeatureExtractor, "all", None)
    linear.main(arguments(photos, weights, run, "--resume"))
    assert results(run) == results(finished)
    *_, said, last = (run / "log.txt").read_text().splitlines()
    assert "the run is complete" in said
    assert f"linear top-1 {results(run)['linear_top1']:.2f} %" in last
    assert last.endswith(f"all results are in {run}/results.json")
    monkeypatch.undo()
    # Damaged, or of another encoder: they are computed again.
    for content in ("{", json.dumps({**results(finished), "encoder_sha256": "0", "linear_top1": -1.0})):
        (run / "results.json").write_text(content)
        linear.main(arguments(photos, weights, run, "--resume"))
        assert results(run) == results(finished)


def test_cached_equals_fresh_where_the_views_are_the_same(
    finished: Path, photos: Path, weights: Path, tmp_path: Path
) -> None:
    # With a view for each of the 3 epochs the cache holds just what would be computed. Not bit for bit: the sums in a
    # convolution come in another order in batches of another size.
    linear.main(arguments(photos, weights, tmp_path, "LINEAR.CACHED_VIEWS", "3"))
    fresh, cached = heads_of(finished), heads_of(tmp_path)
    assert all(torch.allclose(fresh[name], cached[name], rtol=1e-4, atol=1e-6) for name in fresh)
    other = tmp_path / "one"
    linear.main(arguments(photos, weights, other, "LINEAR.CACHED_VIEWS", "1"))
    assert not torch.allclose(fresh["head.0.weight"], heads_of(other)["head.0.weight"], rtol=1e-4, atol=1e-6)


def test_an_encoder_that_changes_is_noticed(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = FeatureExtractor.local

    def disturbed(self: FeatureExtractor, *args: Any, **options: Any) -> Any:
        self.encoder.layer4[0].bn1.running_mean[3] += 1e-6  # one number of one buffer
        return extract(self, *args, **options)

    monkeypatch.setattr(FeatureExtractor, "local", disturbed)
    with pytest.raises(EncoderChanged):
        linear.main(arguments(photos, weights, tmp_path))
    assert not (tmp_path / "results.json").exists()


def test_a_random_encoder_is_the_one_of_its_seed(photos: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        linear.main(arguments(photos, "random", tmp_path / name, "SEED", seed, "TRAIN.EPOCHS", "1"))
    a, b, c = (results(tmp_path / name) for name in "abc")
    assert a["init"] == "random"
    assert a == b
    assert a["encoder_sha256"] != c["encoder_sha256"]


def test_two_processes_find_what_one_finds(finished: Path, photos: Path, weights: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(SCRIPT)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command += arguments(photos, weights, tmp_path)
    subprocess.run(command, check=True, env=environment, timeout=240, capture_output=True)
    one, two = heads_of(finished), heads_of(tmp_path)
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5) for name in one)
    assert results(finished)["knn"] == results(tmp_path)["knn"]


def test_a_signal_while_features_are_computed_says_that_they_are_lost(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FeatureExtractor, "all", lambda *_, **options: signal.raise_signal(signal.SIGUSR1))
    with pytest.raises(SystemExit) as left:
        linear.main(arguments(photos, weights, tmp_path))
    assert left.value.code == STOPPED
    said = "SIGUSR1 received: stopping before the first step; the features are computed again"
    assert said in capfd.readouterr().err


SIGNALLED = """
import os, signal, sys
from pretrain import linear
from pretrain.evaluation.supervised import SupervisedTrainer
take = SupervisedTrainer.step
def signalled(self, *values):
    if os.environ["RANK"] == "1" and self.optimizer.state:
        signal.raise_signal(signal.SIGTERM)
    return take(self, *values)
SupervisedTrainer.step = signalled
linear.cli()
"""


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(
    finished: Path, photos: Path, weights: Path, tmp_path: Path
) -> None:
    """They agree at the next log line: here after the second step."""
    script, run = tmp_path / "signalled.py", tmp_path / "run"
    script.write_text(SIGNALLED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(SCRIPT.parents[1]),
    }
    words = arguments(photos, weights, run)
    stopped = subprocess.run([*command, script, *words], env=environment, timeout=240, capture_output=True, check=False)
    assert f"exitcode  : {STOPPED} " in stopped.stderr.decode()  # torchrun may end the other while it leaves
    assert checkpoint.load(run / "checkpoints" / "last.pt")["position"] == {"epoch": 0, "step": 2}
    subprocess.run(
        [*command, SCRIPT, *words, "--resume"], env=environment, timeout=240, capture_output=True, check=True
    )
    whole, resumed = heads_of(finished), heads_of(run)
    assert all(torch.allclose(whole[name], resumed[name], rtol=1e-3, atol=1e-5) for name in whole)


def test_fingerprint_sees_names_values_and_buffers() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", "cifar")
    before = fingerprint(encoder)
    assert before == fingerprint(encoder)
    encoder.bn1.num_batches_tracked += 1
    assert fingerprint(encoder) != before


def test_bad_input_is_one_line(
    photos: Path, weights: Path, finished: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    def error(given: Path | str, *more: str, output: Path = tmp_path / "never") -> str:
        return error_of(linear.main, arguments(photos, given, output, *more))

    assert "the weights nosuch do not exist" in error("nosuch")
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "is not a checkpoint" in error(tmp_path / "text.pt")
    (tmp_path / "text.safetensors").write_text("no checkpoint")
    assert "is not a checkpoint" in error(tmp_path / "text.safetensors")
    assert "there is no encoder.safetensors or checkpoints/last.pt" in error(photos)
    assert "no encoder, only heads" in error(finished)
    assert "ENCODER.STEM 'imagenet', but the config says 'cifar'" in error(weights, "ENCODER.STEM", "cifar")
    assert "ENCODER.NAME 'resnet18', but the config says 'resnet50'" in error(weights, "ENCODER.NAME", "resnet50")
    assert "DATA.MEAN [0.5, 0.4, 0.3]" in error(weights, "DATA.MEAN", "[0.1, 0.1, 0.1]")
    for key in ("LINEAR.LRS", "TRAIN.LRS"):  # of the group, and of one without a learning rate
        assert "did you mean 'LINEAR.LR'" in error(weights, key, "[1.0]")
    assert "nearest: imagenet1k_R50_moco" in error(weights, "--config", "imagenet1k_R50_mocco")
    assert "LINEAR.LR[1] must be" in error(weights, "LINEAR.LR", "[1.0, -1.0]")
    assert "names a learning rate twice" in error(weights, "LINEAR.LR", "[1.0, 1.0]")
    assert "KNN.K[0] must be" in error(weights, "KNN.K", "[0]")
    message = error(weights, "KNN.K", "[25, 3]")
    assert message.startswith("KNN.K[0] asks for 25 nearest neighbours, and there are 24 reference images")
    assert "SEED must be between 0 and" in error(weights, "SEED", str(2**64))
    assert "TRAIN.OPTIMIZER is 'adam'" in error(weights, "TRAIN.OPTIMIZER", "adam")
    assert "the dataset has 24 images: set TRAIN.BATCH_SIZE 24 or lower" in error(weights, "TRAIN.BATCH_SIZE", "25")
    assert "no/train does not exist; check DATA.ROOT" in error(weights, "DATA.ROOT", str(tmp_path / "no"))
    assert not (tmp_path / "never").exists()
    assert "add --resume" in error(weights, output=finished)
    assert "LINEAR.LR: [0.2, 0.01] then, [0.5] now" in error(weights, "--resume", "LINEAR.LR", "[0.5]", output=finished)
    other = ["--resume", "DATA.MEAN", "[0.5, 0.4, 0.3]", "DATA.STD", "[0.2, 0.2, 0.2]"]
    assert "began with another encoder" in error("random", *other, output=finished)


def test_torchvision_weights_tell_their_architecture(
    photos: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", "imagenet")
    supervised = {**encoder.state_dict(), "fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    torch.save(supervised, tmp_path / "resnet18.pth")
    linear.main(arguments(photos, tmp_path / "resnet18.pth", tmp_path / "run", "TRAIN.EPOCHS", "1"))
    assert results(tmp_path / "run")["init"] == "torchvision"
    assert results(tmp_path / "run")["encoder_sha256"] == fingerprint(encoder)
    other = arguments(photos, tmp_path / "resnet18.pth", tmp_path / "no", "ENCODER.NAME", "resnet34")
    assert "ENCODER.NAME 'resnet18', but the config says 'resnet34'" in error_of(linear.main, other)


@pytest.mark.parametrize(("epoch", "expected"), [(1, "its state after 1 of 2 epochs"), (2, "")])
def test_weights_of_an_unfinished_run_come_with_a_warning(
    epoch: int, expected: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "ENCODER": {"NAME": "resnet18", "STEM": "imagenet"},
        "DATA": {"MEAN": [0.5, 0.4, 0.3], "STD": [0.2, 0.2, 0.2]},
        "OBJECTIVE": {"NAME": "corinfomax"},
        "TRAIN": {"EPOCHS": 2, "MAX_STEPS": 0},
    }
    state = {"format": checkpoint.PRETRAIN, "model": {"encoder.conv1.weight": torch.ones(3)}, "config": config}
    checkpoint.save(tmp_path, {**state, "position": {"epoch": epoch, "step": 4}})
    monkeypatch.setattr(logging.getLogger("pretrain"), "propagate", True)
    with caplog.at_level(logging.WARNING, "pretrain"):
        assert read_weights(str(tmp_path)).init == "corinfomax"
    assert expected in caplog.text
    assert bool(caplog.text) == bool(expected)


def test_weights_of_other_projects_are_converted(tmp_path: Path) -> None:
    encoder = build_encoder("resnet18", "cifar")
    moco = {f"module.encoder_q.{name}": tensor for name, tensor in encoder.state_dict().items()}
    torch.save(
        {"state_dict": {**moco, "module.queue": torch.ones(4, 9)}, "arch": "resnet18"}, tmp_path / "moco.pth.tar"
    )
    found = read_weights(str(tmp_path / "moco.pth.tar"))
    assert (found.name, found.stem, found.init) == ("resnet18", "cifar", "MoCo v1/v2, PCL")
    assert (found.mean, found.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    built = build_from(found, found.name, found.stem)
    assert all(torch.equal(tensor, built.state_dict()[name]) for name, tensor in encoder.state_dict().items())


def test_a_network_that_torchvision_does_not_have_is_refused(
    photos: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    """The wide ResNets of SwAV, VICReg and BYOL: the converter has them for Detectron2."""
    torch.save(tiny_resnet(0, width=16).state_dict(), tmp_path / "wide.pth")
    message = error_of(linear.main, arguments(photos, tmp_path / "wide.pth", tmp_path / "run", "ENCODER.NAME", ""))
    assert "none of torchvision's networks" in message
    assert not (tmp_path / "run").exists()


def test_a_damaged_image_is_replaced(photos: Path, weights: Path, tmp_path: Path, monkeypatch: Any) -> None:
    opened = FileSource.open

    def damaged(self: FileSource, index: int) -> Any:
        if self.paths[index].name == "05.jpg":
            raise UnreadableImage(f"{self.paths[index]}: damaged")
        return opened(self, index)

    monkeypatch.setattr(FileSource, "open", damaged)
    linear.main(arguments(photos, weights, tmp_path, "TRAIN.EPOCHS", "1", "DATA.MAX_UNREADABLE", "0.2"))
    assert (tmp_path / "results.json").is_file()
    assert "05.jpg: damaged" in (tmp_path / "log.txt").read_text()


def test_a_head_that_diverges_leaves_metrics_that_are_json(photos: Path, weights: Path, tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    linear.main(arguments(photos, weights, tmp_path, "LINEAR.LR", "[0.1, 1e38]"))
    text = (tmp_path / "metrics.json").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    losses = [{key for key in line if key.startswith("loss")} for line in lines if "learning_rate" in line]
    healthy = set.intersection(*losses)
    assert len(healthy) == 1
    assert losses[-1] == healthy, "the other head's loss is not finite"


def test_the_recipe_is_known_when_a_run_goes_on_with_its_own_config(
    photos: Path, weights: Path, tmp_path: Path
) -> None:
    """And what is published for the recipe is logged."""
    recipe, run = tmp_path / "cifar100_R18.yaml", tmp_path / "run"
    recipe.write_text("SEED: 0\n")
    linear.main(arguments(photos, weights, run, "TRAIN.MAX_STEPS", "1", "--config", str(recipe)))
    resume = ["--weights", str(weights), "--resume", "--config", str(run / "config.yaml")]
    linear.main([*resume, "TRAIN.MAX_STEPS", "2"])
    assert results(run)["config"] == "cifar100_R18"
    assert (run / "log.txt").read_text().count("71.61, not within the margin of 0.45 (CorInfoMax, thesis") == 2


def test_an_evaluation_of_version_0_1_0_resumes_with_its_own_config(
    photos: Path, weights: Path, tmp_path: Path
) -> None:
    newer = {"DATA.INTERPOLATION": "bicubic", "LINEAR.INIT": "normal", "TRAIN.DROP_LAST": "True"}
    given = [part for pair in newer.items() for part in pair]
    linear.main(arguments(photos, weights, tmp_path / "whole", *given))
    linear.main(arguments(photos, weights, tmp_path / "begun", *given, "TRAIN.MAX_STEPS", "3"))
    config, state = tmp_path / "begun" / "config.yaml", checkpoint.load(tmp_path / "begun" / "checkpoints" / "last.pt")
    written = yaml.safe_load(config.read_text())
    for key in newer:  # that version had none of them
        section, name = key.split(".")
        del written[section][name], state["config"][section][name]
    config.write_text(yaml.safe_dump(written))
    shutil.rmtree(tmp_path / "begun" / "checkpoints")
    checkpoint.save(tmp_path / "begun", state)
    resume = ["--weights", str(weights), "--output", str(tmp_path / "begun"), "--resume", "--config", str(config)]
    linear.main([*resume, "TRAIN.MAX_STEPS", "0"])
    whole, resumed = heads_of(tmp_path / "whole"), heads_of(tmp_path / "begun")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
