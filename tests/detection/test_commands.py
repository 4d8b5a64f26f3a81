"""The commands as processes would run them: what a user can do wrong ends in one line and status 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detection import config as configs
from detection import predict, train_net
from detection.checks import preflight
from detection.data import datasets
from detection.training import prepare
from foundation.errors import UserError

ROOT = Path(train_net.__file__).parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a recipe with --config"),
        (["--config", "coco_R50_C5"], "coco_R50_C4"),
        (["--config", "coco_R50_C4", "SOLVER.BASE_LEARNING_RATE", "1"], "did you mean 'SOLVER.BASE_LR'"),
        (["--config", "coco_R50_C4", "--num-gpus", "99"], "--num-gpus 99: this machine has"),
        (["--config", "coco_R50_C4", "--num-gpus", "-1"], "--num-gpus -1"),
        (["--config", "coco_R50_C4", "--num-gpus", "0", "--num-machines", "2"], "several machines need GPUs"),
        (["--config", "coco_R50_C4", "--num-gpus", "0", "DATASETS.TRAIN", "('cocoa',)"], "no dataset 'cocoa'"),
        (["--config", "coco_R50_C4", "--num-gpus", "0", "SOLVER.AMP.ENABLED", "True"], "set SOLVER.PRECISION bfloat16"),
        (["--config", "coco_R50_C4", "--nonsense"], "--nonsense"),
        (["--config", "coco_R50_C4", "--lr-preset", "adam"], "invalid choice: 'adam'"),
        (["--config", "coco_R50_C4", "--lr-preset", "lars", "SOLVER.BASE_LR", "1"], "give one of them"),
        (["--config", "coco_R50_C4", "--lr-preset", "lars", "--sweep-lr", "0.1"], "give one of them"),
        (["--config", "coco_R50_C4", "--seeds", "1", "2", "SEED", "3"], "SEED and --seeds both set the seed"),
        (
            ["--config", "coco_R50_C4", "--seeds", "SEED", "3"],
            "--seeds needs finite numbers that are not negative, not 'SEED'",
        ),
        (["--config", "coco_R50_C4", "--sweep-lr", "0.1", "--eval-only"], "they do not go with --eval-only"),
        (
            ["--config", "coco_R50_C4", "--sweep-lr", "0.1", "-0.2"],
            "--sweep-lr needs finite numbers that are not negative, not '-0.2'",
        ),
        (
            ["--config", "coco_R50_C4", "--sweep-lr", "nan"],
            "--sweep-lr needs finite numbers that are not negative, not 'nan'",
        ),
        (
            ["--config", "coco_R50_C4", "--sweep-lr", "fast"],
            "--sweep-lr needs finite numbers that are not negative, not 'fast'",
        ),
        (["--config", "coco_R50_C4", "--num-gpus", "0", "--sweep-lr", "0"], "--sweep-lr needs learning rates above 0"),
        (["--config", "coco_R50_C4", "--train-json", "a.json"], "a.json cannot be read: No such file"),
        (["--config", "coco_R50_C4", "--test-json", "a.json", "--test-images", "b"], "needs --train-json FILE"),
        (["--train-json", "a.json", "--train-images", "/nowhere"], "--train-images /nowhere: there is no such folder"),
        (
            ["--eval-only", "--config", "coco_R50_C4", "--test-json", "a.json", "--test-images", "/nowhere"],
            "--test-images /nowhere: there is no such folder",
        ),
        (["--config", "coco_R50_C4", "--check-data", "--dry-run"], "--dry-run: not allowed with argument --check-data"),
        (["--config", "coco_R50_C4", "--dry-run", "--show-data", "3"], "--show-data: not allowed with argument --dry"),
        (["--config", "coco_R50_C4", "--num-machines", "0"], "--num-machines 0 must be 1 or more"),
        (["--config", "coco_R50_C4", "--machine-rank", "1"], "--machine-rank 1 must be 0 to 0: there is 1 machine"),
        (["--train-json", "a.json", "--test-images", "b"], "--test-images is the folder of --test-json FILE, which is"),
        (
            ["--config", "coco_R50_C4", "--eval-only", "--test-json", "a.json", "--train-images", "b"],
            "--train-images is the folder of --train-json FILE, which is not named",
        ),
        (["--train-json", "a.json", "--test-json", "b.json", "--val-fraction", "0.1"], "--val-fraction divides"),
        (["--config", "coco_R50_C4", "--val-fraction", "0.1"], "--val-fraction divides --train-json FILE where there"),
        (["--output", "/nowhere/run", "--resume"], "/nowhere/run holds no run (config.yaml) to continue or evaluate"),
        (
            ["--output", "/nowhere/run", "--eval-only"],
            "/nowhere/run holds no run (config.yaml) to continue or evaluate",
        ),
    ],
)
def test_wrong_use_of_training(arguments, message, error_of):
    assert message in error_of(train_net.cli, *arguments)


def test_a_batch_that_the_processes_do_not_divide(monkeypatch, error_of):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    line = error_of(train_net.cli, "--config", "coco_R50_C4", "--num-gpus", 8, "SOLVER.IMS_PER_BATCH", 12)
    assert "SOLVER.IMS_PER_BATCH 12 is not a multiple of the number of processes, 8" in line


def test_numbers_end_where_keys_begin():
    arguments = train_net.parse(
        ["--config", "x", "--seeds", "1", "2", "SOLVER.MAX_ITER", "5", "--sweep-lr", ".1", "1e-3", "SEED", "4"]
    )
    assert (arguments.seeds, arguments.sweep_lr) == ([1, 2], [0.1, 0.001])
    assert arguments.overrides == ["SOLVER.MAX_ITER", "5", "SEED", "4"]


PARTS = ("Eye", "Ear", "Shoulder", "Elbow", "Wrist", "Hip", "Knee", "Ankle")  # of a person, each left and right


def own_data(root):
    parts = (("train", "train2017"), ("test", "val2017"))
    return [
        text
        for part, split in parts
        for text in (
            *(f"--{part}-json", f"{root}/coco/annotations/instances_{split}.json"),
            *(f"--{part}-images", f"{root}/coco/{split}"),
        )
    ]


@pytest.mark.parametrize(("recipe", "key"), [("shapes_R18_FPN", "ROI_HEADS"), ("coco_R50_RetinaNet_1x", "RETINANET")])
def test_data_of_ones_own_brings_its_classes_and_stands_in_the_config(recipe, key, coco_root, tmp_path):
    config = prepare.configure(train_net.parse(["--config", recipe, "--num-gpus", "0", *own_data(coco_root)]))
    assert config.MODEL[key].NUM_CLASSES == 2
    prepare.check(config, resume=False)
    (tmp_path / "config.yaml").write_text(config.dump())
    again = configs.load(str(tmp_path / "config.yaml"))
    assert json.dumps(again) == json.dumps(config)
    assert datasets.class_names(again) == ["rectangle", "triangle"]
    for path in (coco_root / "coco" / "annotations").iterdir():  # a detector that was copied to another machine
        path.unlink()
    assert datasets.class_names(again) == datasets.model_classes(again) == ["rectangle", "triangle"]


def test_only_keypoints_of_persons_have_cocos_tolerances(coco_root):
    path = coco_root / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    words = ["--config", "coco_keypoints_R50_FPN", "--num-gpus", "0", *own_data(coco_root)]
    persons = ["nose", *(f"{side} {part}" for part in PARTS for side in ("Left", "Right"))]
    for names, sigmas in ((persons, []), ([f"point {i}" for i in range(17)], [0.067] * 17)):
        for category in content["categories"]:
            category["keypoints"] = names
        path.write_text(json.dumps(content))
        config = prepare.configure(train_net.parse(words))
        assert config.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 17
        assert sigmas == config.TEST.KEYPOINT_OKS_SIGMAS
    own = prepare.configure(train_net.parse([*words, "TEST.KEYPOINT_OKS_SIGMAS", f"{[0.1] * 17}"]))
    assert own.TEST.KEYPOINT_OKS_SIGMAS == [0.1] * 17


@pytest.mark.parametrize("option", ["--eval-only", "--resume"])
def test_a_run_that_was_copied_is_meant_by_its_own_config(option, coco_root, tmp_path):
    config = prepare.configure(train_net.parse(["--config", "shapes_R18_FPN", "--num-gpus", "0", *own_data(coco_root)]))
    for name in ("first", "copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_0000001.pth").touch()
        config.OUTPUT_DIR = str(tmp_path / "first")
        (tmp_path / name / "config.yaml").write_text(config.dump())
    words = ["--num-gpus", "0", option, "--config", str(tmp_path / "copy" / "config.yaml")]
    assert str(tmp_path / "copy") == prepare.configure(train_net.parse(words)).OUTPUT_DIR
    for named in (["--output", str(tmp_path / "new")], ["OUTPUT_DIR", str(tmp_path / "new")]):
        assert str(tmp_path / "new") == prepare.configure(train_net.parse([*words, *named])).OUTPUT_DIR


def test_a_key_without_effect_is_said_before_the_training(capsys):
    words = ["--config", "shapes_R18_FPN", "--num-gpus", "0", "INPUT.LSJ.SIZE", "512"]
    prepare.configure(train_net.parse(words))
    assert "warning: INPUT.LSJ.SIZE has no effect while INPUT.LSJ.ENABLED is False\n" in capsys.readouterr().out
    prepare.configure(train_net.parse([*words, "--eval-only"]))
    assert "no effect" not in capsys.readouterr().out


def test_patience_without_evaluations_is_refused(coco_root, tmp_path):
    words = ["--config", "shapes_R18_FPN", "--num-gpus", "0", "--output", str(tmp_path / "run"), *own_data(coco_root)]
    config = prepare.configure(train_net.parse([*words, "TEST.PATIENCE", "3", "TEST.EVAL_PERIOD", "0"]))
    with pytest.raises(UserError, match=r"TEST.PATIENCE 3 has no effect .* set TEST.EVAL_PERIOD"):
        prepare.check(config, resume=False)


def test_a_folder_that_tensorboard_cannot_write_to_is_refused(coco_root, tmp_path):
    config = prepare.configure(train_net.parse(["--config", "shapes_R18_FPN", "--num-gpus", "0", *own_data(coco_root)]))
    config.OUTPUT_DIR = str(tmp_path / os.fsdecode(b"run\xff"))
    with pytest.raises(UserError, match="TensorBoard needs a path that is UTF-8"):
        prepare.check(config, resume=False)


def test_data_of_ones_own_with_other_classes_to_test_on(coco_root, error_of):
    path = coco_root / "coco" / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace("triangle", "circle"))
    line = error_of(train_net.cli, "--config", "shapes_R18_FPN", "--num-gpus", 0, *own_data(coco_root))
    assert "classes that differ from those of the training set: 'circle'" in line


def test_a_test_set_may_have_fewer_classes_in_training_and_in_evaluation_of_a_run(coco_root, tmp_path):
    path = coco_root / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 9, "name": "triangle"}]
    objects = [one for one in content["annotations"] if one["category_id"] == 2]
    path.write_text(json.dumps(content | {"annotations": [{**one, "category_id": 9} for one in objects]}))
    own, fixed = own_data(coco_root), ["--num-gpus", "0", "--config"]
    config = prepare.configure(train_net.parse([*fixed, "shapes_R18_FPN", *own]))
    assert config.MODEL.ROI_HEADS.NUM_CLASSES == 2
    prepare.check(config, resume=False)
    (tmp_path / "config.yaml").write_text(config.dump())
    again = prepare.configure(train_net.parse([*fixed, str(tmp_path / "config.yaml"), "--eval-only", *own[4:]]))
    assert again.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert datasets.category_ids(again, again.DATASETS.TEST[0]) == [None, 9]
    (coco_root / "coco" / "annotations" / "instances_train2017.json").rename(coco_root / "elsewhere.json")
    again = prepare.configure(train_net.parse([*fixed, str(tmp_path / "config.yaml"), "--eval-only", *own[4:]]))
    assert again.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert datasets.category_ids(again, again.DATASETS.TEST[0]) == [None, 9]
    preflight.check(again, (), again.DATASETS.TEST)
    other = prepare.configure(train_net.parse([*fixed, "shapes_R18_FPN", "--eval-only", *own[4:]]))
    assert other.MODEL.ROI_HEADS.NUM_CLASSES == 1  # of a recipe nothing is known about what the weights were trained on
    content["categories"] = [{"id": 9 - index, "name": f"class {index}"} for index in range(8)]  # as many as in shapes
    path.write_text(json.dumps(content | {"annotations": []}))
    other = prepare.configure(train_net.parse([*fixed, "shapes_R18_FPN", "--eval-only", *own[4:]]))
    assert datasets.category_ids(other, other.DATASETS.TEST[0]) == [2, 3, 4, 5, 6, 7, 8, 9]
    preflight.check(other, (), other.DATASETS.TEST)


def test_the_datasets_can_be_looked_through_instead_of_trained_on(coco_root, capsys, tmp_path):
    fixed = ["--config", "shapes_R18_FPN", "--num-gpus", "0", "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        train_net.main([*fixed, *own_data(coco_root), "--check-data"])
    assert stopped.value.code == 0
    assert "4 images, 8 objects, 2 classes" in capsys.readouterr().out
    # Without a file to evaluate on, the whole file is looked at, under its own name.
    with pytest.raises(SystemExit) as stopped:
        train_net.main([*fixed, *own_data(coco_root)[:4], "--check-data"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert f"instances_train2017.json@{coco_root / 'coco' / 'train2017'} (training): 4 images, 8 objects" in said
    assert "(evaluation)" not in said
    elsewhere = [*own_data(coco_root)[:3], str(tmp_path / "nowhere")]  # listed among the others
    with pytest.raises(SystemExit) as stopped:
        train_net.main([*fixed, *elsewhere, "--check-data"])
    assert stopped.value.code == 2
    assert "error 4 images whose file is missing" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [[], ["--check-data"]])
def test_every_mistake_in_data_of_ones_own_is_listed(options, coco_root, tmp_path, capsys):
    """The plan for one's own data needs its objects, but `--check-data` has to list what keeps them from being read."""
    path = coco_root / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = None
    content["images"][1]["width"] = 63
    path.write_text(json.dumps(content))
    command = [*own_data(coco_root), "--num-gpus", "0", "--output", str(tmp_path / "run"), *options]
    if options:
        with pytest.raises(SystemExit) as stopped:
            train_net.main(command)
        assert stopped.value.code == 2
        printed = " ".join(capsys.readouterr().out.split())
        assert "annotations[0].bbox is missing" in printed
        assert "images of another size than annotated: 001.jpg" in printed
    else:
        with pytest.raises(UserError, match=r"annotations\[0\]\.bbox is missing"):
            train_net.main(command)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [lambda c: c["annotations"].clear(), lambda c: c["images"].clear()])
def test_own_data_without_anything_to_train_on_is_one_line(change, coco_root, error_of):
    path = coco_root / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    line = error_of(train_net.cli, *own_data(coco_root), "--num-gpus", 0)
    assert "instances_train2017.json: " in line


def test_seeds_and_rates_in_one_command(coco_root, tiny_overrides, tmp_path, capsys):
    """Two rates of which one diverges: the other one's results are there, and the command says so and fails."""
    fixed = ["--config", "shapes_R18_FPN", "--num-gpus", "0", "--output", str(tmp_path)]
    with pytest.raises(UserError, match=r"1 of 2 runs failed: .*lr1e\+30/seed7: the loss is not finite"):
        train_net.main([*fixed, "--sweep-lr", "0.001", "1e30", "--seeds", "7", *tiny_overrides, "SOLVER.MAX_ITER", "3"])
    results = json.loads((tmp_path / "lr0.001" / "seed7" / "results.json").read_text())
    assert (results["seed"], results["iterations"]) == (7, 3)
    (row,) = json.loads((tmp_path / "sweep.json").read_text())["means"]
    assert row["metrics"]["bbox/AP"] == {"mean": results["results"]["bbox"]["AP"], "spread": None}
    assert "| 0.001" in capsys.readouterr().out


def test_weights_that_are_none(tiny_overrides, tmp_path, error_of):
    arguments = ["--config", "shapes_R18_FPN", "--num-gpus", 0, "--output", tmp_path / "run"]
    for more in ((), ("--dry-run",)):
        line = error_of(train_net.cli, *arguments, "--weights", tmp_path / "none.pkl", *more, *tiny_overrides)
        assert "none.pkl: there is no such file of weights" in line
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_file(coco_root, tiny_overrides, tmp_path, error_of):
    (tmp_path / "file").touch()
    arguments = ["--config", "shapes_R18_FPN", "--num-gpus", 0, "--output", tmp_path / "file"]
    said = f"cannot write the folder {tmp_path}/file: it is a file; choose another --output"
    assert said in error_of(train_net.cli, *arguments, *tiny_overrides)
    given = own_data(coco_root)[:4]  # which the command divides into two files in the folder
    assert said in error_of(train_net.cli, *arguments[2:], *given)
    images = coco_root / "coco" / "val2017"
    assert said in error_of(predict.cli, *arguments[:2], "--weights", "none", *arguments[4:], images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: there is no such file or folder"),
        (["."], "there are no images or videos in this folder"),
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


def test_the_real_command_names_a_missing_dataset_from_any_folder(tmp_path):
    """`python detection/train_net.py` has detection/ first on its path: no file there may hide a module."""
    environment = os.environ | {"DETECTRON2_DATASETS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train_net.py", "--config", "coco_R50_C4", "--num-gpus", "0"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("error: dataset coco_2017_train (")
    assert "missing files or folders: " in line
    assert not list(tmp_path.iterdir())


def test_help_is_quick():
    """Parsing arguments imports nothing heavy."""
    program = (
        "import runpy, sys\n"
        "from detection import export, install, predict, report, train_net\n"
        "for command in (export, install, predict, report, train_net):\n"
        "    try: command.main(['--help'])\n"
        "    except SystemExit: pass\n"
        "sys.argv = ['stock', '--help']\n"
        "try: runpy.run_module('detection.stock', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'torchvision', 'detectron2', 'matplotlib', 'scipy', 'fvcore'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "--num-gpus" in done.stdout
    assert "ARGUMENTS OF THE SCRIPT" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
