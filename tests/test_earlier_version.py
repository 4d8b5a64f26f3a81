"""Run folders, configurations and checkpoints that version 0.1.0 has written resume, convert and report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSION_0_1_0 = "9936aea"
TINY = ["DATA.IMAGE_SIZE", "32", "DATA.WORKERS", "0", "TRAIN.BATCH_SIZE", "8", "PROJECTOR.DIMS", "[16,8]"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the earlier version, from the repository's history."""
    folder = tmp_path_factory.mktemp("earlier")
    archive = subprocess.run(["git", "archive", VERSION_0_1_0], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"the history does not hold {VERSION_0_1_0}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def call(tree: Path, folder: Path, script: str, *arguments: object) -> str:
    """A command of one version, run in `folder`; its output, or what it printed when it failed."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tree / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]


@pytest.fixture(scope="module")
def pretrained(earlier: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the earlier version left after one of two epochs, and its continuation by this version."""
    folder = tmp_path_factory.mktemp("pretrained")
    data = ["DATA.NAME", "folder", "DATA.ROOT", photos / "train", *TINY]
    options = ["--output", "run", *data, "TRAIN.EPOCHS", 2, "TRAIN.WARMUP_EPOCHS", 1, "LOG.PERIOD", 1]
    call(earlier, folder, "pretrain/train.py", *options, "TRAIN.MAX_STEPS", 3)
    call(ROOT, folder, "pretrain/train.py", *options, "TRAIN.MAX_STEPS", 6, "--resume")
    return folder / "run"


def test_pretraining_resumes_with_its_own_network(pretrained: Path) -> None:
    assert [line["iteration"] for line in lines(pretrained)] == list(range(6))


def test_the_run_is_evaluated_converted_and_drawn(pretrained: Path, photos: Path) -> None:
    folder = pretrained.parent
    data = ["DATA.NAME", "folder", "DATA.ROOT", photos, "TRAIN.BATCH_SIZE", 8, "TRAIN.EPOCHS", 1, "DATA.WORKERS", 0]
    call(ROOT, folder, "pretrain/linear.py", "--weights", pretrained, "--output", "linear", *data)
    call(ROOT, folder, "convert/to_d2.py", pretrained / "checkpoints" / "last.pt", "encoder.pkl", "--verify")
    call(ROOT, folder, "pretrain/figures.py", pretrained, "--output", "figures")
    assert list((folder / "figures").glob("*.png"))
    call(ROOT, folder, "detection/report.py", pretrained, folder / "linear", "--output", "report")
    assert (folder / "report" / "report.html").is_file()


def test_a_detector_resumes_and_is_reported(earlier: Path, pretrained: Path, tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    from tests.detection.conftest import write_split

    write_split(tmp_path, "train", 4)
    write_split(tmp_path, "val", 2)
    call(earlier, tmp_path, "convert/to_d2.py", pretrained / "checkpoints" / "last.pt", "encoder.pkl")
    coco = tmp_path / "coco"
    options = ["--config", "shapes_R18_FPN", "--output", "run", "--num-gpus", 0, "--weights", "encoder.pkl"]
    for part in ("train", "test"):
        split = "train" if part == "train" else "val"
        options += [f"--{part}-json", coco / "annotations" / f"instances_{split}2017.json"]
        options += [f"--{part}-images", coco / f"{split}2017"]
    options += ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.STEPS", "(1,)", "SOLVER.CHECKPOINT_PERIOD", 1]
    options += ["TEST.EVAL_PERIOD", 0, "TEST.PRECISE_BN.NUM_ITER", 1, "INPUT.MIN_SIZE_TRAIN", "(64,)"]
    call(earlier, tmp_path, "detection/train_net.py", *options, "SOLVER.MAX_ITER", 2)
    (tmp_path / "run" / "model_final.pth").unlink()
    call(ROOT, tmp_path, "detection/train_net.py", *options, "SOLVER.MAX_ITER", 2, "--resume")
    assert (tmp_path / "run" / "model_final.pth").is_file()
    call(ROOT, tmp_path, "detection/report.py", "run", "--output", "report")
    assert "bbox" in json.loads((tmp_path / "run" / "results.json").read_text())["results"]
