"""Real training and evaluation, small."""

import contextlib
import errno
import json
import logging
import math
import os
import pickle
import shutil
import subprocess
import sys
import types

import numpy
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytest.importorskip("detectron2")

from detection import config as configs
from detection import predict, train_net
from detection.data import training_data
from detection.evaluation import pictures
from detection.training import checkpoints, trainer, weights
from detection.training.accumulation import AccumulatingTrainer
from detection.training.hooks import HighestRate
from foundation.errors import UserError

# isort: split
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils.events import EventStorage


@pytest.fixture
def train(tiny_overrides, tmp_path):
    """Runs the training command on the tiny dataset. Gives the run's folder."""

    def call(*pairs, options=(), folder="run"):
        output = tmp_path / folder
        fixed = ["--config", "shapes_R18_FPN", "--num-gpus", "0", "--output", str(output)]
        train_net.main([*fixed, *options, *tiny_overrides, *map(str, pairs)])
        return output

    return call


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_a_run_leaves_what_a_report_needs(train, coco_root):
    folder = train("SEED", 3)
    assert not images_of(folder)
    results = json.loads((folder / "results.json").read_text())
    assert {key: results[key] for key in ("kind", "config", "weights", "init", "seed", "iterations")} == {
        "kind": "detection", "config": "shapes_R18_FPN", "weights": "", "init": "random", "seed": 3, "iterations": 2,
    }  # fmt: skip
    assert results["train_images"] == 4
    assert results["dataset"] == {
        "name": "tiny_val",
        "image_root": str(coco_root / "coco" / "val2017"),
        "annotations": str(coco_root / "coco" / "annotations" / "instances_val2017.json"),
    }
    for task in ("bbox", "segm"):
        assert {"AP", "AP50", "AP75"} <= results["results"][task].keys()
    predictions = json.loads((folder / "predictions" / "coco_instances_results.json").read_text())
    assert {entry["image_id"] for entry in predictions} <= {1, 2}
    (last,) = [line for line in lines(folder) if "total_loss" in line]
    assert last["iteration"] == 1
    assert numpy.isfinite(last["total_loss"])
    assert "SEED: 3" in (folder / "config.yaml").read_text()
    assert "random weights" in (folder / "log.txt").read_text()


def images_of(folder):
    """TensorBoard's pictures: (height, width) by name and iteration."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {
        (name, each.step): (each.height, each.width) for name in events.Tags()["images"] for each in events.Images(name)
    }


def test_pictures_and_records_reach_tensorboard_and_weights_and_biases(train, monkeypatch):
    sent, opened, drawn = [], [], []

    class Session:
        def log(self, values, step):
            sent.append((step, values))

    library = types.ModuleType("wandb")
    library.init = lambda **options: opened.append(options) or Session()
    library.Image = lambda picture: picture.size
    monkeypatch.setitem(sys.modules, "wandb", library)
    draw = pictures.draw_cell
    monkeypatch.setattr(pictures, "draw_cell", lambda *cell: drawn.append(cell) or draw(*cell))
    pairs = ("TEST.EVAL_PERIOD", 1, "TEST.PRECISE_BN.NUM_ITER", 1, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    folder = train(*pairs, "LOG.PICTURES", 2, "LOG.WANDB", "mine")
    images = images_of(folder)
    assert {name: sorted(step for each, step in images if each == name) for name, _ in images} == {
        "training_images": [0], "evaluation_images": [0, 2],
    }  # fmt: skip
    # Two training images, then for each evaluation two images with their annotations and what was detected.
    assert [note.partition(":")[0] for *_, note in drawn[2::2]] == ["000.jpg", "001.jpg"] * 2
    annotations = json.loads((folder.parent / "coco" / "annotations" / "instances_val2017.json").read_text())
    for number, (photograph, overlays, _) in enumerate(drawn[2:6:2], 1):
        truth = [each for each in annotations["annotations"] if each["image_id"] == number]
        assert [overlay.text for overlay in overlays] == ["rectangle", "triangle"]
        for overlay, each in zip(overlays, truth, strict=True):
            assert overlay.box == (*each["bbox"][:2], each["bbox"][0] + 22, each["bbox"][1] + 22)
            assert overlay.mask.sum() == pytest.approx(each["area"], rel=0.1)
        assert photograph.size == (64, 64)
    scores = [line for line in lines(folder) if "bbox/AP" in line or "total_loss" in line]
    records = [{"iteration": step, **values} for step, values in sent]
    steps = [step for step, _ in sent]
    assert steps == sorted(steps)  # Weights & Biases drops what comes for an earlier step
    for line in scores:
        assert any(line.items() <= record.items() for record in records)
    assert {(name, step): values[name][::-1] for step, values in sent for name in values if "images" in name} == images
    assert (opened[0]["project"], opened[0]["config"]["SEED"]) == ("mine", 0)


def test_resuming_goes_on_with_the_schedule_and_the_optimizer(train, monkeypatch):
    folder = train("SOLVER.STEPS", "(1,)", "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.KEEP_CHECKPOINTS", 0)
    seen = {}
    begin = trainer.TransferTrainer.before_train

    def watch(self):
        seen["iteration"] = self.start_iter
        seen["momentum"] = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        seen["lr"] = self.optimizer.param_groups[0]["lr"]
        return begin(self)

    monkeypatch.setattr(trainer.TransferTrainer, "before_train", watch)
    train("SOLVER.STEPS", "(1,)", "SOLVER.MAX_ITER", 4, "SOLVER.KEEP_CHECKPOINTS", 0, options=["--resume"])
    assert seen["iteration"] == 2
    assert seen["lr"] == pytest.approx(0.002)
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 3
    first = torch.load(folder / "model_0000000.pth", weights_only=True)["trainer"]["_trainer"]["optimizer"]["state"]
    assert len(seen["momentum"]) == len(first) > 100
    assert all(buffer.abs().sum() > 0 for buffer in seen["momentum"][:3])
    assert [line["iteration"] for line in lines(folder) if "total_loss" in line] == [1, 3]
    assert json.loads((folder / "results.json").read_text())["iterations"] == 4


def test_a_finished_run_is_left_alone_unless_it_is_evaluated_by_other_rules(train, capsys):
    folder = train("SOLVER.MAX_ITER", 1)
    written = (folder / "results.json").stat().st_mtime_ns
    capsys.readouterr()
    train("SOLVER.MAX_ITER", 1, "DATALOADER.NUM_WORKERS", 1, options=["--resume"])
    assert f"{folder} is finished: its results are in results.json" in capsys.readouterr().out
    assert (folder / "results.json").stat().st_mtime_ns == written
    for damaged in ("{", "[]", "{}"):  # written anew, by one more evaluation
        (folder / "results.json").write_text(damaged)
        train("SOLVER.MAX_ITER", 1, options=["--resume"])
        assert json.loads((folder / "results.json").read_text())["iterations"] == 1
    train("SOLVER.MAX_ITER", 1, "TEST.DETECTIONS_PER_IMAGE", 1, options=["--resume"])
    assert "is finished" not in capsys.readouterr().out
    predictions = json.loads((folder / "predictions" / "coco_instances_results.json").read_text())
    images = [each["image_id"] for each in predictions]
    assert len(images) == len(set(images)) > 0
    assert len([line for line in lines(folder) if "total_loss" in line]) == 1  # nothing was trained


def test_a_run_that_cannot_be_continued_keeps_its_config(train):
    folder = train()
    config = (folder / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"has 2 iterations, more than SOLVER\.MAX_ITER 1"):
        train("SOLVER.MAX_ITER", 1, options=["--resume"])
    assert (folder / "config.yaml").read_text() == config


def test_a_folder_with_a_run_is_not_overwritten(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000000.pth")
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        train()


def test_results_of_other_runs_are_not_overwritten(train, tmp_path):
    other = tmp_path / "encoder"
    other.mkdir()
    (other / "config.yaml").write_text("OBJECTIVE: {NAME: corinfomax}\n")
    (other / "metrics.json").write_text('{"iteration": 3}\n')
    weights = tmp_path / "detector.pth"
    weights.touch()
    for options in ((), ("--resume",), ("--eval-only", "--weights", str(weights))):
        with pytest.raises(UserError, match=r"encoder holds a run of pretrain/train.py: choose another --output"):
            train(options=options, folder="encoder")
    assert (other / "metrics.json").read_text() == '{"iteration": 3}\n'
    evaluated = tmp_path / "evaluated"
    evaluated.mkdir()
    results = json.dumps({"kind": "detection", "iterations": 0, "weights": "/first.pth"})
    (evaluated / "results.json").write_text(results)
    for options in ((), ("--resume",)):
        with pytest.raises(UserError, match=r"evaluated holds results of a detector, and no checkpoint of it"):
            train(options=options, folder="evaluated")
    with pytest.raises(UserError, match=r"evaluated holds the results of /first\.pth: choose another --output"):
        train(options=["--eval-only", "--weights", str(weights)], folder="evaluated")
    assert (evaluated / "results.json").read_text() == results


def test_the_same_seed_gives_the_same_run_in_its_own_folder(train):
    one, two = train("SOLVER.MAX_ITER", 1, folder="one"), train("SOLVER.MAX_ITER", 1, folder="two")
    assert lines(one)[0]["total_loss"] == lines(two)[0]["total_loss"]
    assert "one/results.json" in (one / "log.txt").read_text()
    assert "two/results.json" not in (one / "log.txt").read_text()
    assert len(logging.getLogger("detectron2").handlers) == 2


def test_weights_land_and_are_named_in_the_results(train, tmp_path):
    random = torch.load(train("SOLVER.BASE_LR", 1e-12) / "model_final.pth", weights_only=True)["model"]
    place = "backbone.bottom_up."
    short = {key.removeprefix(place): value.numpy() for key, value in random.items() if key.startswith(place)}
    tensors = {key: value * 0.5 for key, value in short.items() if "num_batches" not in key}
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"model": tensors, "__author__": "x", "matching_heuristics": True}))
    path.with_suffix(".json").write_text(json.dumps({"trained_by": "corinfomax", "depth": 18, "format": "RGB"}))
    folder = train("SOLVER.BASE_LR", 1e-12, options=["--weights", str(path)], folder="warm")
    results = json.loads((folder / "results.json").read_text())
    assert (results["init"], results["weights"]) == ("corinfomax", str(path))
    state = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    key = "backbone.bottom_up.res3.0.conv1.weight"
    assert torch.allclose(state[key], torch.from_numpy(tensors["res3.0.conv1.weight"]), atol=1e-6)
    # Statistics of the weights are taken, and kept when the run is resumed without them.
    path.with_suffix(".json").write_text(json.dumps({"depth": 18, "pixel_mean": [100.0, 110.0, 120.0]}))
    folder = train(options=["--weights", str(path)], folder="own")
    path.unlink()
    train("SOLVER.MAX_ITER", 3, options=["--weights", str(path), "--resume"], folder="own")
    assert configs.load(str(folder / "config.yaml")).MODEL.PIXEL_MEAN == [100.0, 110.0, 120.0]
    path.write_bytes(pickle.dumps({"model": tensors, "__author__": "x", "matching_heuristics": True}))
    with pytest.raises(UserError, match=r"needs MODEL\.RESNETS\.DEPTH 18, but the config has 34"):
        train("MODEL.RESNETS.DEPTH", 34, options=["--weights", str(path)], folder="conflict")


def test_a_loss_that_diverges_is_an_error_and_saves_nothing(train, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.TransferTrainer, "build_optimizer", classmethod(diverging))
    advice = r"lower SOLVER\.BASE_LR \(now 0\.02\) .* in a new run, with another --output: --resume keeps both"
    with pytest.raises(UserError, match=rf"not finite at iteration 1: {advice}"):
        train()
    assert not (tmp_path / "run" / "model_final.pth").exists()


def diverging(cls, cfg, model):
    return torch.optim.SGD(model.parameters(), lr=1e30)


def test_a_share_of_the_images(tiny):
    pairs = ["DATASETS.TRAIN", f"{tiny[:1]}", "DATASETS.FRACTION", "0.5"]
    assert len(training_data.training_images(configs.load("shapes_R18_FPN", pairs))) == 2


def test_a_finished_run_can_be_evaluated_and_its_detector_used(train, tmp_path, coco_root, capsys):
    folder = train()
    before = json.loads((folder / "results.json").read_text())["results"]
    weights = folder / "model_final.pth"
    again = train(options=["--eval-only", "--weights", str(weights)], folder="again")
    assert json.loads((again / "results.json").read_text())["results"] == before
    unsure = ["--eval-only", "--weights", str(weights)]
    none = train("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0, options=unsure, folder="none")
    assert json.loads((none / "results.json").read_text())["results"]["segm"]["AP"] == 0
    # As documented: the run's own config, which names the weights that it started from.
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("  WEIGHTS: ''", "  WEIGHTS: /gone/encoder.pkl"))
    train_net.main(["--config", str(path), "--num-gpus", "0", "--eval-only"])
    assert json.loads((folder / "results.json").read_text())["results"] == before
    path.write_text(path.read_text().replace("/gone/encoder.pkl", "''"))
    record, config = json.loads((folder / "results.json").read_text()), (folder / "config.yaml").read_text()
    train("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0, options=["--eval-only"])  # the run itself, by other rules
    none = json.loads((folder / "results.json").read_text())
    assert none.pop("results")["bbox"]["AP"] == 0
    assert none.pop("config_sha256") != record["config_sha256"]  # training would evaluate by its own rules again
    assert none.pop("evaluated_with") == {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 1.0}
    assert none == {key: value for key, value in record.items() if key not in ("results", "config_sha256")}
    assert (folder / "config.yaml").read_text() == config
    train(options=["--eval-only"])  # by its own rules again
    again = json.loads((folder / "results.json").read_text())
    assert {**again, "config_sha256": record["config_sha256"]} == record
    with pytest.raises(UserError, match="already holds a run: leave --weights out to evaluate it"):
        train(options=unsure)
    (folder / "results.json").write_text(json.dumps({**record, "iterations": 99}))
    (folder / "model_0000041.pth").write_bytes(weights.read_bytes())
    (folder / "last_checkpoint").write_text("model_0000041.pth")  # as in a run that goes on
    train("TEST.DETECTIONS_PER_IMAGE", 7, options=["--eval-only"])
    results = json.loads((folder / "results.json").read_text())
    assert (results["iterations"], results["evaluated_with"]) == (42, {"TEST.DETECTIONS_PER_IMAGE": 7})
    pictures = coco_root / "coco" / "val2017"
    arguments = ["--config", str(folder / "config.yaml"), "--weights", str(weights), "--score-threshold", "0"]
    predict.main([*arguments, "--output", str(tmp_path / "drawn"), str(pictures), str(pictures / "000.jpg")])
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in drawn] == ["0000_000.png", "0001_001.png", "0002_000.png"]
    assert all(Image.open(path).size == (460, 460) for path in drawn)
    assert "objects" in capsys.readouterr().out


def test_an_evaluation_leaves_a_run_alone_that_is_trained_or_has_no_checkpoint(train, tmp_path):
    folder = train("SOLVER.MAX_ITER", 1)
    evaluate = ["--eval-only", "--weights", str(folder / "model_final.pth")]
    begun = tmp_path / "begun"
    begun.mkdir()
    for name in ("config.yaml", "metrics.json"):
        (begun / name).write_bytes((folder / name).read_bytes())
    config = (begun / "config.yaml").read_text()
    with pytest.raises(UserError, match="begun holds a run without a checkpoint: choose another --output"):
        train(options=evaluate, folder="begun")
    assert (begun / "config.yaml").read_text() == config
    shutil.copytree(folder, tmp_path / "copy")  # this process holds the folder itself
    (tmp_path / "new").mkdir()
    for name, options in (("copy", ["--eval-only"]), ("new", evaluate)):
        with held(tmp_path / name), pytest.raises(UserError, match=f"another process is running in .*{name}"):
            train(options=options, folder=name)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".lock"]


@contextlib.contextmanager
def held(folder):
    """Another process holds a folder."""
    program = "import pathlib, sys, foundation.locks as l; l.hold(pathlib.Path(sys.argv[1])); print(); input()"
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        yield
        process.communicate(b"\n")


def test_training_in_bfloat16_keeps_weights_and_gradients_in_float32(train, monkeypatch):
    seen = []
    step = AccumulatingTrainer.run_step

    def watch(self):
        step(self)
        seen.extend(parameter.grad.dtype for parameter in self.model.parameters())

    monkeypatch.setattr(AccumulatingTrainer, "run_step", watch)
    crop = ("INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[0.7, 0.7]")  # of polygons too
    folder = train("SOLVER.PRECISION", "bfloat16", "SOLVER.ACCUMULATION", 2, *crop)
    assert set(seen) == {torch.float32}
    state = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert "The model computes in bfloat16" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_model_computes_in_the_precision_asked_for(precision, dtype):
    pairs = ["SOLVER.PRECISION", precision, "MODEL.DEVICE", "cpu"]
    config, _ = configs.for_one_process(configs.load("shapes_R18_FPN", pairs))
    model = trainer.TransferTrainer.build_model(config).eval()
    seen = []
    model.backbone.bottom_up.stem.conv1.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    with torch.no_grad():
        found = model([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8), "height": 64, "width": 64}])
    assert seen == [dtype]
    assert found[0]["instances"].pred_boxes.tensor.dtype == torch.float32
    assert all(value.dtype != torch.bfloat16 for value in model.state_dict().values())


def test_a_full_disk_at_the_start_is_one_line(train, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "run" / "events.out.tfevents.1"))

    monkeypatch.setattr(trainer, "TensorboardXWriter", full)
    with pytest.raises(UserError, match=r"cannot write .*events.* No space left on device \(\d+ MB free\)"):
        train()


def test_a_killed_loader_worker_is_one_line(train, monkeypatch):
    """PyTorch raises it from a signal handler, here within the model."""

    def die(self):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(AccumulatingTrainer, "run_step", die)
    with pytest.raises(UserError, match=r"a process that reads images has died .*lower DATALOADER\.NUM_WORKERS"):
        train()


def test_nothing_to_evaluate_is_not_an_ap_of_nought(train, coco_root):
    """Annotations of crowds only: there is nothing to detect, and AP is the mean of nothing."""
    path = coco_root / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    for record in content["annotations"]:
        record["iscrowd"] = 1
    path.write_text(json.dumps(content))
    folder = train()
    results = json.loads((folder / "results.json").read_text())["results"]
    assert results["bbox"]["AP"] is None


def test_the_best_weights_are_kept_and_training_stops_when_nothing_improves(train, monkeypatch, capsys):
    """Evaluations after 2, 4, 6, .. of 20 iterations give 1, 5, 3, 4, 9: with a patience of 2, it ends after 8."""
    scores = iter([1.0, 5.0, 3.0, 4.0, 9.0])
    monkeypatch.setattr(trainer.TransferTrainer, "test", lambda *_: {"bbox": {"AP": next(scores), "APs": float("nan")}})
    pairs = ("SOLVER.MAX_ITER", 20, "TEST.EVAL_PERIOD", 2, "TEST.PATIENCE", 2, "TEST.PRECISE_BN.NUM_ITER", 1)
    folder = train(*pairs)
    results = json.loads((folder / "results.json").read_text())
    assert results["best"] == {"iterations": 4, "metric": "bbox/AP", "value": 5.0, "weights": "model_best.pth"}
    assert (results["iterations"], results["stopped_early"], results["results"]["bbox"]["AP"]) == (8, True, 4.0)
    best = torch.load(folder / "model_best.pth", weights_only=True)
    assert (best["iteration"], best["value"], best["dataset"]) == (3, 5.0, "tiny_val")
    assert torch.load(folder / "model_final.pth", weights_only=True)["iteration"] == 7
    assert [line["bbox/AP"] for line in lines(folder) if "bbox/AP" in line] == [1.0, 5.0, 3.0, 4.0]
    assert capsys.readouterr().out.splitlines()[-3:-1] == ["", "box AP 4.0 (2 images)"]
    train(*pairs, options=["--resume"])
    assert "is finished" in capsys.readouterr().out
    assert checkpoints.read_best(folder, "bbox/AP", "tiny_val") == (3, 5.0)
    assert checkpoints.read_best(folder, "bbox/AP", "lab.json@images") is None  # its values are not comparable


def test_a_training_that_has_ended_early_is_evaluated_again_and_not_trained_on(train, monkeypatch):
    """By another metric, by which it would not have ended."""
    scores = iter([(5.0, 1.0), (1.0, 2.0), (7.0, 8.0), (0.0, 0.0)])

    def score(*_):
        found = next(scores)
        return {"bbox": {"AP": found[0], "AP50": found[1]}}

    monkeypatch.setattr(trainer.TransferTrainer, "test", score)
    pairs = ("SOLVER.MAX_ITER", 6, "TEST.EVAL_PERIOD", 1, "TEST.PATIENCE", 1, "TEST.PRECISE_BN.NUM_ITER", 1)
    folder = train(*pairs)
    saved = (folder / "model_final.pth").read_bytes()
    before = json.loads((folder / "results.json").read_text())
    assert (before["iterations"], before["stopped_early"]) == (2, True)
    train(*pairs, "TEST.BEST_METRIC", "bbox/AP50", options=["--resume"])
    after = json.loads((folder / "results.json").read_text())
    assert (after["iterations"], after["stopped_early"], after["results"]["bbox"]["AP50"]) == (2, True, 8.0)
    assert after["best"] == {"iterations": 2, "metric": "bbox/AP50", "value": 8.0, "weights": "model_best.pth"}
    assert (folder / "model_final.pth").read_bytes() == saved
    assert [line["iteration"] for line in lines(folder) if "total_loss" in line] == [0, 1]
    (folder / "results.json").unlink()  # as documented
    train(*pairs, "SOLVER.MAX_ITER", 3, "TEST.PATIENCE", 0, options=["--resume"])
    assert json.loads((folder / "results.json").read_text())["iterations"] == 3


def test_the_highest_rate_is_recorded():
    few, many = torch.zeros(1, requires_grad=True), [torch.zeros(1, requires_grad=True) for _ in range(4)]
    optimizer = torch.optim.SGD([{"params": [few], "lr": 0.1}, {"params": many, "lr": 0.01}])  # Detectron2 takes 0.01
    hook = HighestRate(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))
    hook.before_train()
    with EventStorage() as storage:
        hook.trainer = types.SimpleNamespace(storage=storage)
        hook.after_step()
    assert storage.latest()["lr"][0] == 0.1


def test_the_average_of_the_weights_is_evaluated_beside_them(train, monkeypatch):
    """By hand, from the weights after each iteration; a run that is resumed has the same. With AdamW, a cosine and
    clipped gradients.
    """
    seen, gradients = [], []
    step = AccumulatingTrainer.run_step

    def watch(self):
        if not seen:
            seen.append(self.model.backbone.bottom_up.stem.conv1.weight.detach().clone())
        step(self)
        seen.append(self.model.backbone.bottom_up.stem.conv1.weight.detach().clone())
        gradients.append(max(each.grad.norm().item() for each in self.model.parameters()))

    monkeypatch.setattr(AccumulatingTrainer, "run_step", watch)
    pairs = ("SOLVER.EMA", 0.75, "SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.OPTIMIZER", "AdamW")
    pairs += ("SOLVER.BASE_LR", 0.001, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.LAYER_DECAY", 0.5)
    pairs += ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm")
    folder = train(*pairs, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01)
    assert max(gradients) == pytest.approx(0.01, rel=1e-3)  # of each tensor
    assert lines(folder)[0]["lr"] == pytest.approx(0.001 * (1 + math.cos(2 / 3 * math.pi)) / 2)
    expected = seen[0]
    for value in seen[1:]:
        expected = 0.75 * expected + 0.25 * value
    key = "backbone.bottom_up.stem.conv1.weight"
    average = torch.load(folder / "model_ema.pth", weights_only=True)["model"]
    assert torch.allclose(average[key], expected, atol=1e-6)
    results = json.loads((folder / "results.json").read_text())["results"]
    assert list(results) == ["bbox", "segm", "bbox_EMA", "segm_EMA"]
    final = torch.load(folder / "model_final.pth", weights_only=True)
    assert torch.equal(final["model"][key], seen[-1])
    assert "exp_avg" in next(iter(final["trainer"]["_trainer"]["optimizer"]["state"].values()))
    for name in ("model_final.pth", "model_0000002.pth", "model_ema.pth", "results.json"):
        (folder / name).unlink()
    (folder / "last_checkpoint").unlink()
    train(*pairs, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01, options=["--resume"])
    again = torch.load(folder / "model_ema.pth", weights_only=True)["model"]
    assert all(torch.equal(value, again[name]) for name, value in average.items())
    train(*pairs, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01, options=["--eval-only"])  # of both
    assert json.loads((folder / "results.json").read_text())["results"] == results


@pytest.mark.slow
def test_several_evaluation_sets(train, coco_root, capsys):
    sets = ("DATASETS.TEST", "('tiny_val', 'tiny_train')", "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1)
    sets += ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "SOLVER.EMA", 0.5)
    folder = train(*sets, "TEST.BEST_METRIC", "tiny_train/segm/AP50")
    said = [line.partition(" (")[0::2] for line in capsys.readouterr().out.splitlines()[-3:-1]]
    assert [text.partition(":")[0] for text, _ in said] == ["tiny_val", "tiny_train"]
    assert [rest.partition(")")[0] for _, rest in said] == ["2 images", "4 images"]
    record = json.loads((folder / "results.json").read_text())
    (other,) = record["evaluations"]
    assert (record["dataset"]["name"], other["dataset"]["name"]) == ("tiny_val", "tiny_train")
    assert record["results"].keys() == other["results"].keys() == {"bbox", "segm", "bbox_EMA", "segm_EMA"}
    assert other["dataset"]["image_root"] == str(coco_root / "coco" / "train2017")
    for name, count in (("predictions", 2), (other["predictions"], 4)):
        found = json.loads((folder / name / "coco_instances_results.json").read_text())
        assert len({each["image_id"] for each in found}) == count
        assert (folder / name / "analysis.json").is_file()
    assert {"bbox/AP", "tiny_train/bbox/AP"} <= lines(folder)[-1].keys()
    # Each is what an evaluation of it alone gives; the folder then holds that one.
    train(*sets, "DATASETS.TEST", "('tiny_train',)", options=["--eval-only"])
    alone = json.loads((folder / "results.json").read_text())
    assert alone["dataset"] == other["dataset"]
    assert "evaluations" not in alone
    assert alone["results"]["bbox"] == other["results"]["bbox"]


def test_results_that_were_not_expected_are_an_error(train):
    with pytest.raises(UserError, match=r"TEST\.EXPECTED_RESULTS: bbox/AP is 0\.0000 instead of 40 ± 0\.5"):
        train("TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 40, 0.5], ['segm', 'AP', 0, 50]]")


def test_augmented_evaluation_is_that_of_detectron2(train):
    """`TEST.AUG`: results beside the plain ones, equal to those of Detectron2's model on the same weights."""
    pairs = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48, 64)")
    pairs += ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "SOLVER.BASE_LR", 1e-12)
    folder = train(*pairs)
    results = json.loads((folder / "results.json").read_text())["results"]
    assert list(results) == ["bbox", "segm", "bbox_TTA", "segm_TTA"]
    config = configs.load(str(folder / "config.yaml"))
    model = trainer.TransferTrainer.build_model(config)
    weights.load_detector(model, folder / "model_final.pth")
    augmented = GeneralizedRCNNWithTTA(config, model.eval())
    loader = trainer.TransferTrainer.build_test_loader(config, "tiny_val")
    with torch.no_grad():
        expected = [found for inputs in loader for found in augmented(inputs)[0]["instances"].scores.tolist()]
    written = json.loads((folder / "predictions_TTA" / "coco_instances_results.json").read_text())
    assert sorted(entry["score"] for entry in written) == pytest.approx(sorted(expected), abs=1e-6)
    assert written


@pytest.mark.slow
def test_augmented_evaluation_gives_the_ap_of_upstreams_tool(train, tmp_path):
    """As `test_with_TTA` of Detectron2's tools/train_net.py: its loader, model and evaluator, on one checkpoint."""
    pairs = ("SOLVER.MAX_ITER", 100, "SOLVER.BASE_LR", 0.01, "SOLVER.IMS_PER_BATCH", 4, "TEST.PRECISE_BN.NUM_ITER", 20)
    folder = train(*pairs, "TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48, 64, 80)", "TEST.AUG.MAX_SIZE", 96)
    ours = json.loads((folder / "results.json").read_text())["results"]
    config = configs.load(str(folder / "config.yaml"))
    model = DefaultTrainer.build_model(config)
    DetectionCheckpointer(model).load(str(folder / "model_final.pth"))
    evaluator = COCOEvaluator("tiny_val", output_dir=str(tmp_path / "upstream"), use_fast_impl=False)
    theirs = DefaultTrainer.test(config, GeneralizedRCNNWithTTA(config, model), [evaluator])
    for task in ("bbox", "segm"):
        assert ours[f"{task}_TTA"]["AP"] > 5  # it has learned something to compare
        assert ours[f"{task}_TTA"] != ours[task]
        for metric, value in theirs[task].items():
            ap = ours[f"{task}_TTA"][metric]
            assert (numpy.isnan(value) and ap is None) or ap == pytest.approx(value, abs=1e-3), (task, metric)
