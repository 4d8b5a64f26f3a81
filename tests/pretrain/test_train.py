"""`python pretrain/train.py` from the outside: a whole run, resume, several processes, and bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from foundation.run_states import find_runs
from pretrain import train
from pretrain.runs import checkpoint
from tests.pretrain.tiny_encoder import use_tiny_encoder

TINY = [
    *("DATA.NAME", "folder", "DATA.IMAGE_SIZE", "32", "DATA.WORKERS", "0", "PROJECTOR.DIMS", "[16, 8]"),
    *("TRAIN.BATCH_SIZE", "8", "TRAIN.EPOCHS", "2", "TRAIN.PRECISION", "float32", "LOG.PERIOD", "1"),
    *("TRAIN.LR", "0.5", "OBJECTIVE.ATTRACTION", "250"),
]
SCRIPT = Path(train.__file__)


def arguments(photos: Path, output: Path, *more: str) -> list[str]:
    return ["--config", "shapes_R18", "--output", str(output), *more, *TINY, "DATA.ROOT", str(photos)]


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    train.main(arguments(photos, output))
    return output


def log_lines(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_share")} for line in lines]


def test_a_run_leaves_what_others_need(finished: Path) -> None:
    lines = log_lines(finished)
    assert [line["iteration"] for line in lines] == list(range(6))
    assert set(lines[0]) == {"iteration", "total", "big_bang", "attraction", "learning_rate", "epoch"} | {
        *("skipped", "ldmi", "effective_rank", "min_eigenvalue")
    }
    assert 1 <= lines[-1]["effective_rank"] <= 8
    spectra = [json.loads(line) for line in (finished / "spectrum.json").read_text().splitlines()]
    assert [(line["iteration"], line["epoch"]) for line in spectra] == [(2, 1.0), (5, 2.0)]
    assert min(map(min, spectra[1]["eigenvalues"])) == pytest.approx(lines[-1]["min_eigenvalue"], rel=1e-6)
    assert [len(row) for row in spectra[1]["eigenvalues"]] == [8, 8]
    assert lines[0]["total"] == pytest.approx(lines[0]["big_bang"] + 250 * lines[0]["attraction"], rel=1e-6)
    state = checkpoint.load(finished / "checkpoints" / "last.pt")
    assert set(state) == {"format", "version", "model", "objective", "optimizer", "position", "config", "images"}
    assert state["position"] == {"epoch": 2, "step": 6, "skipped": 0}
    exported = safetensors.torch.load_file(finished / "encoder.safetensors")
    assert all(torch.equal(exported[name], state["model"][f"encoder.{name}"]) for name in exported)
    assert len(exported) == 120  # ResNet-18: 20 convolutions and 20 x 5 of BatchNorm
    assert (finished / "config.yaml").is_file()
    assert (finished / "log.txt").is_file()
    assert list(finished.glob("events.out.tfevents*"))


@pytest.mark.parametrize("stop", [3, 4], ids=["between epochs", "within an epoch"])
def test_resumed_equals_uninterrupted_bit_for_bit(finished: Path, photos: Path, tmp_path: Path, stop: int) -> None:
    train.main([*arguments(photos, tmp_path), "TRAIN.MAX_STEPS", str(stop)])
    with (tmp_path / "metrics.json").open("a") as file:  # as if killed after the checkpoint, in the middle of a line
        file.write('{"iteration": 5, "total": 1.0}\n{"iterat')
    train.main(arguments(photos, tmp_path, "--resume"))
    whole, resumed = (checkpoint.load(run / "checkpoints" / "last.pt") for run in (finished, tmp_path))
    assert resumed["position"] == whole["position"]
    for part in ("model", "objective"):
        assert all(torch.equal(resumed[part][name], tensor) for name, tensor in whole[part].items())
    momenta = [s["optimizer"]["state"] for s in (whole, resumed)]
    assert all(torch.equal(momenta[1][i]["momentum_buffer"], momenta[0][i]["momentum_buffer"]) for i in momenta[0])
    assert log_lines(tmp_path) == log_lines(finished)


def test_resume_refuses_what_would_change_the_result(
    finished: Path, photos: Path, error_of: Callable, tmp_path: Path
) -> None:
    again = arguments(photos, finished)
    assert "add --resume" in error_of(train.main, again)
    fewer = arguments(photos / "train" / "circle", finished, "--resume")
    assert "begun on 24 images, and there are 12 now" in error_of(train.main, fewer)
    message = error_of(train.main, [*again, "--resume", "TRAIN.LR", "0.1"])
    assert "TRAIN.LR: 0.5 then, 0.1 now" in message
    train.main([*again, "--resume", "DATA.WORKERS", "1"])  # nothing is left to do, and workers change nothing
    assert log_lines(finished)[-1]["iteration"] == 5


def test_a_run_of_a_version_with_fewer_keys_goes_on(
    finished: Path, photos: Path, error_of: Callable, tmp_path: Path
) -> None:
    state = checkpoint.load(finished / "checkpoints" / "last.pt")
    del state["config"]["TRAIN"]["OPTIMIZER"], state["config"]["DATA"]["WINDOW"]
    checkpoint.save(tmp_path, state)
    train.main(arguments(photos, tmp_path, "--resume"))  # nothing is left to do
    message = error_of(train.main, [*arguments(photos, tmp_path, "--resume"), "TRAIN.OPTIMIZER", "lars"])
    assert "(TRAIN.OPTIMIZER: 'sgd' then, 'lars' now)" in message


def test_two_processes_share_the_work(photos: Path, tmp_path: Path, free_port: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}"]
    arguments_ = [str(SCRIPT), *arguments(photos, tmp_path), "TRAIN.MAX_STEPS", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments_], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line["iteration"] for line in log_lines(tmp_path)] == [0, 1]
    assert "2 cpu processes" in (tmp_path / "log.txt").read_text()


def test_online_probe(photos: Path, tmp_path: Path) -> None:
    flat = photos / "train" / "circle"  # without labels, and monitored with those of another folder
    train.main([*arguments(flat, tmp_path), "PROBE.EVERY", "1", "TRAIN.MAX_STEPS", "1", "PROBE.ROOT", str(photos)])
    assert 0 <= json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])["knn_top1"] <= 100


def test_keys_of_a_probe_that_does_not_run(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = [*arguments(photos, tmp_path), "PROBE.ROOT", str(photos), "PROBE.K", "5", "TRAIN.MAX_STEPS", "1"]
    train.main(run)
    warning = (
        "warning: with PROBE.EVERY 0 nothing is probed during training (PROBE.K, PROBE.ROOT): set PROBE.EVERY to a"
        " number of epochs"
    )
    assert "".join(capsys.readouterr()).count(warning) == 1, "on a terminal, which shows both streams"
    assert (tmp_path / "log.txt").read_text().count(warning) == 1
    train.main([*run, "--resume", "TRAIN.MAX_STEPS", "2"])
    assert warning not in "".join(capsys.readouterr()), "a resumed run repeats it"


def test_bad_input_is_named(photos: Path, tmp_path: Path, error_of: Callable) -> None:
    run = tmp_path / "run"
    for more, message in [
        (["DATA.ROOT", str(tmp_path / "gone")], "gone does not exist"),
        (["DATA.ROOT", str(tmp_path)], "there is no image below"),
        (["TRAIN.BATCH_SIZE", "64"], "the dataset has 24 images"),
        (["TRAIN.EPOHCS", "3"], "did you mean 'TRAIN.EPOCHS'"),
        (["--confg", "x"], "unrecognized arguments"),
        (["--dry-run", "--check-data"], "--check-data: not allowed with argument --dry-run"),
        (["--list-runs", str(tmp_path), "--dry-run"], "--dry-run: not allowed with argument --list-runs"),
    ]:
        assert message in error_of(train.main, [*arguments(photos, run), *more])
    flat = photos / "train" / "circle"
    message = error_of(train.main, [*arguments(flat, run), "PROBE.EVERY", "1"])
    assert "train does not exist" in message
    assert message.endswith("or set PROBE.ROOT")
    probed = [*arguments(photos, run), "PROBE.EVERY", "1"]
    message = error_of(train.main, [*probed, "PROBE.K", "25"])
    assert message.startswith("PROBE.K asks for 25 nearest neighbours, and there are 24 reference images")
    assert "and there are 5 reference" in error_of(train.main, [*probed, "PROBE.MAX_TRAIN", "5"])
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("more", [[], ["TRAIN.LR", "0.1"], ["photos", "TRAIN.LR", "0.1"]])
@pytest.mark.parametrize("name", ["PHOTOS", "PHOTOS.tar"])
def test_a_missing_path_in_capitals_is_not_only_called_a_wrong_key(
    name: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_of(train.main, [name, *more]) == f"'{name}' is neither a folder or tar that exists nor a config key"


def test_a_run_of_another_command_is_not_replaced(photos: Path, tmp_path: Path, error_of: Callable) -> None:
    detector = "SOLVER: {MAX_ITER: 90}\n"
    (tmp_path / "config.yaml").write_text(detector)
    for more in ([], ["--resume", "--config", "shapes_R18"]):
        message = error_of(train.main, arguments(photos, tmp_path, *more))
        assert f"{tmp_path} holds a run of detection/train_net.py: choose another --output" in message
    assert (tmp_path / "config.yaml").read_text() == detector


def test_names_that_are_not_utf8(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_encoder(monkeypatch)
    images, run, weights = tmp_path / "ph\udcff", tmp_path / "run", tmp_path / "w\udcff.safetensors"
    shutil.copytree(photos / "train" / "circle", images)
    train.main([*arguments(images, tmp_path / "first"), "TRAIN.MAX_STEPS", "1"])
    (tmp_path / "first" / "encoder.safetensors").rename(weights)
    train.main([*arguments(images, run, "--weights", str(weights)), "TRAIN.MAX_STEPS", "1"])
    with safetensors.safe_open(run / "encoder.safetensors", framework="pt") as file:
        assert file.metadata()["begun_from"].endswith("/w\\udcff.safetensors")
    train.main(["--output", str(run), "--resume", "TRAIN.MAX_STEPS", "2"])
    assert checkpoint.load(run / "checkpoints" / "last.pt")["position"]["step"] == 2
    assert [state.outlook for state in find_runs(run)] == ["complete"]


def test_output_that_is_a_file(photos: Path, tmp_path: Path, error_of: Callable) -> None:
    file = tmp_path / "file"
    file.write_text("")
    message = error_of(train.main, arguments(photos, file))
    assert message == f"cannot write the folder {file}: it is a file; choose another --output"


def test_an_output_that_cannot_be_written_is_found_before_the_plan(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: Callable
) -> None:
    monkeypatch.setattr("pretrain.training.own_images.plan_run", lambda *_: pytest.fail("the plan measures"))
    (tmp_path / "file").write_text("")
    for more in ([], ["--resume"]):
        message = error_of(train.main, [str(photos), "--output", str(tmp_path / "file" / "run"), *more])
        assert message.endswith(f": {tmp_path}/file is a file; choose another --output")


def test_one_line_and_status_two(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "TRAIN.LR", "fast"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: the command line: TRAIN.LR must be of type float like \S+, not str 'fast'\n", done.stderr
    )
    assert done.stdout == ""


def test_a_graph_that_cannot_be_is_refused_before_there_is_a_run(
    photos: Path, tmp_path: Path, error_of: Callable
) -> None:
    message = error_of(
        train.main, [*arguments(photos, tmp_path / "run"), "TRAIN.MICRO_BATCH", "4", "TRAIN.CUDA_GRAPH", "on"]
    )
    assert "TRAIN.MICRO_BATCH 0" in message
    assert not (tmp_path / "run" / "config.yaml").exists()
