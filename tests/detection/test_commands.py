"""The commands as processes would run them: what a user can do wrong ends in one line and status 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from cli.errors import UserError
from detection import predict, train_net

ROOT = Path(train_net.__file__).parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config"),
        (["--config", "coco_R50_C5"], "coco_R50_C4"),
        (["--config", "coco_R50_C4", "SOLVER.BASE_LEARNING_RATE", "1"], "did you mean 'SOLVER.BASE_LR'"),
        (["--config", "coco_R50_C4", "--num-gpus", "99"], "--num-gpus 99: this machine has"),
        (["--config", "coco_R50_C4", "--num-gpus", "-1"], "--num-gpus -1"),
        (["--config", "coco_R50_C4", "--num-gpus", "0", "--num-machines", "2"], "several machines need GPUs"),
        (["--config", "coco_R50_C4", "--num-gpus", "0", "DATASETS.TRAIN", "('cocoa',)"], "no dataset 'cocoa'"),
        (["--config", "coco_R50_C4", "--num-gpus", "0", "SOLVER.AMP.ENABLED", "True"], "set SOLVER.PRECISION bfloat16"),
        (["--config", "coco_R50_C4", "--nonsense"], "--nonsense"),
    ],
)
def test_wrong_use_of_training(arguments, message, error_of):
    assert message in error_of(train_net.cli, *arguments)


def test_a_batch_that_the_processes_do_not_divide(monkeypatch, error_of):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    line = error_of(train_net.cli, "--config", "coco_R50_C4", "--num-gpus", 8, "SOLVER.IMS_PER_BATCH", 12)
    assert "SOLVER.IMS_PER_BATCH 12 is not a multiple of the number of processes, 8" in line


def test_weights_that_are_none(tiny_overrides, tmp_path, error_of):
    arguments = ["--config", "shapes_R18_FPN", "--num-gpus", 0, "--output", tmp_path / "run"]
    line = error_of(train_net.cli, *arguments, "--weights", tmp_path / "none.pkl", *tiny_overrides)
    assert "none.pkl: there is no such file of weights" in line
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_file(tiny_overrides, tmp_path, error_of):
    (tmp_path / "file").touch()
    arguments = ["--config", "shapes_R18_FPN", "--num-gpus", 0, "--output", tmp_path / "file"]
    assert "the run cannot be kept in" in error_of(train_net.cli, *arguments, *tiny_overrides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: there is no such file or folder"),
        (["."], "there are no pictures in this folder"),
        (["picture.jpg", "--score-threshold", "3"], "--score-threshold must be in 0..1"),
        (["picture.jpg"], "none.pth: there is no such file of weights"),
    ],
)
def test_wrong_use_of_prediction(arguments, message, error_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "picture.jpg":
        Path("picture.jpg").touch()
    fixed = ["--config", "shapes_R18_FPN", "--weights", "none.pth", "--output", "drawn"]
    assert message in error_of(predict.cli, *fixed, *arguments)


def test_a_file_that_is_no_picture(tmp_path):
    path = tmp_path / "page.jpg"
    path.write_text("<html>")
    with pytest.raises(UserError, match=r"page\.jpg cannot be read as a picture"):
        predict.read_image(path)


def test_the_real_command_names_a_missing_dataset_from_any_folder(tmp_path):
    """`python detection/train_net.py` has detection/ first on its path: no file there may hide a module."""
    environment = os.environ | {"DETECTRON2_DATASETS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train_net.py", "--config", "coco_R50_C4", "--num-gpus", "0"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("error: dataset coco_2017_train: ")
    assert "instances_train2017.json does not exist" in line
    assert not list(tmp_path.iterdir())


def test_help_is_quick_and_needs_no_torch():
    program = (
        "import sys; sys.modules['torch'] = None; from detection import train_net\n"
        "train_net.build_parser().print_help()"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "--num-gpus" in done.stdout
