"""A run that is killed and resumed ends as one that is not: the same weights, bit for bit."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from detection import config as configs
from detection import train_net
from detection.training import checkpoints, prepare, run_folder, trainer
from detection.training.accumulation import AccumulatingTrainer
from foundation import signals
from foundation.errors import UserError
from foundation.signals import STOPPED
from tests.detection.conftest import write_split

# Evaluations and checkpoints in between, images of two shapes, sizes and flips by chance.
SMALL = [
    *("INPUT.MIN_SIZE_TRAIN", "(48, 56, 64)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "4"),
    *("SOLVER.ACCUMULATION", "2", "SOLVER.MAX_ITER", "6", "SOLVER.STEPS", "(4,)", "SOLVER.WARMUP_ITERS", "2"),
    *("SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "3", "TEST.PRECISE_BN.NUM_ITER", "2"),
    *("SOLVER.PRECISION", "float32", "SEED", "3"),
]


class Killed(BaseException):
    """What nothing catches."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Scenes in COCO's format, every second one of them wide."""
    folder = tmp_path_factory.mktemp("scenes")
    write_split(folder, "train", 10)
    write_split(folder, "val", 2)
    path = folder / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    for record in content["images"][::2]:
        picture = folder / "coco" / "train2017" / record["file_name"]
        Image.open(picture).crop((0, 0, 64, 40)).save(picture)
        record["height"] = 40
    path.write_text(json.dumps(content))
    return folder / "coco"


def arguments(root, folder, *pairs, options=()):
    data = []
    for part, split in (("train", "train2017"), ("test", "val2017")):
        data += [f"--{part}-json", f"{root}/annotations/instances_{split}.json", f"--{part}-images", f"{root}/{split}"]
    fixed = ["--config", "shapes_R18_FPN", "--num-gpus", "0", "--output", str(folder), *data, *options]
    return [*fixed, *SMALL, *map(str, pairs)]


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train_net.main(arguments(root, folder, "DATALOADER.NUM_WORKERS", 0))
    return folder


def leaves(value, name=""):
    if isinstance(value, dict):
        return {key: leaf for part in value for key, leaf in leaves(value[part], f"{name}/{part}").items()}
    return {name: value}


def assert_same_end(folder, other):
    """Weights, statistics of the batch norms, momentum, schedule, and the evaluation."""
    one, two = (leaves(torch.load(path / "model_final.pth", weights_only=True)) for path in (folder, other))
    assert one.keys() == two.keys()
    assert len([name for name in one if "momentum_buffer" in name]) > 100
    for name, value in one.items():
        same = torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
        assert same, name
    scores = [json.loads((path / "results.json").read_text())["results"] for path in (folder, other)]
    assert scores[0] == scores[1]
    assert records(folder) == records(other)


def records(folder):
    """By iteration, without what is measured."""
    found = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        record = json.loads(line)
        values = {name: value for name, value in record.items() if name not in ("time", "data_time", "eta_seconds")}
        assert not found.get(record["iteration"], {}).keys() & values.keys() - {"iteration"}
        found.setdefault(record["iteration"], {}).update(values)
    return found


def interrupt(root, folder, *pairs):
    with pytest.raises(Killed):
        train_net.main(arguments(root, folder, *pairs))


@pytest.mark.parametrize(("moment", "workers"), [(3, 0), (5, 1)])
def test_a_run_that_is_interrupted_and_resumed(moment, workers, root, undisturbed, tmp_path, monkeypatch):
    """With checkpoints after iterations 2, 4 and 6, the one in the middle of iteration 4 (or 6) is lost."""
    step = AccumulatingTrainer.run_step

    def dying(self):
        step(self)
        if self.iter == moment:
            raise Killed

    monkeypatch.setattr(AccumulatingTrainer, "run_step", dying)
    with pytest.raises(Killed):
        train_net.main(arguments(root, tmp_path / "run", "DATALOADER.NUM_WORKERS", workers))
    monkeypatch.undo()
    torch.rand(1000)  # what the process has drawn before must not matter
    train_net.main(arguments(root, tmp_path / "run", "DATALOADER.NUM_WORKERS", 1 - workers, options=["--resume"]))
    assert "at iteration" in (tmp_path / "run" / "log.txt").read_text()
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        (2, signal.SIGTERM),
        pytest.param(4, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(5, signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_asked_to_stop_and_resumed(moment, number, root, undisturbed, tmp_path, monkeypatch):
    """After 3 iterations an evaluation is due and no checkpoint, after 5 neither, and the sixth is the last."""
    step = AccumulatingTrainer.run_step

    def signalled(self):
        step(self)
        if self.iter == moment:
            signal.raise_signal(number)

    monkeypatch.setattr(AccumulatingTrainer, "run_step", signalled)
    with pytest.raises(SystemExit) as left:
        train_net.main(arguments(root, tmp_path / "run", "DATALOADER.NUM_WORKERS", 1))
    assert left.value.code == STOPPED
    assert "stopped as requested; the same command with --resume continues" in (tmp_path / "run/log.txt").read_text()
    newest = checkpoints.newest_intact(tmp_path / "run")
    assert newest.name == ("model_final.pth" if moment == 5 else f"model_000000{moment}.pth")
    monkeypatch.undo()
    train_net.main(arguments(root, tmp_path / "run", options=["--resume"]))
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_signal_in_an_evaluation_is_kept_and_a_second_one_ends_it(root, undisturbed, tmp_path, monkeypatch):
    test, signals_sent = trainer.TransferTrainer.test, 1

    def signalled(cls, *arguments):
        for _ in range(signals_sent):
            signal.raise_signal(signal.SIGTERM)
        return test(*arguments)

    monkeypatch.setattr(trainer.TransferTrainer, "test", classmethod(signalled))
    for saved in (3, 3):  # first after the iteration that follows the evaluation; then the last evaluation ends at once
        with pytest.raises(SystemExit) as left:
            train_net.main(arguments(root, tmp_path / "run", "SOLVER.CHECKPOINT_PERIOD", 5, options=["--resume"]))
        assert left.value.code == STOPPED
        assert (tmp_path / "run" / f"model_000000{saved}.pth").exists()
        monkeypatch.setattr(signals, "REPEAT_AFTER", 0)
        signals_sent = 2
    assert (tmp_path / "run" / "model_final.pth").exists()
    monkeypatch.undo()
    train_net.main(arguments(root, tmp_path / "run", "SOLVER.CHECKPOINT_PERIOD", 5, options=["--resume"]))
    assert_same_end(tmp_path / "run", undisturbed)


def test_several_runs_stop_where_one_is_asked_to_in_its_last_evaluation(root, tmp_path, monkeypatch):
    test = trainer.TransferTrainer.test

    def signalled(cls, *arguments):
        signal.raise_signal(signal.SIGTERM)
        return test(*arguments)

    monkeypatch.setattr(trainer.TransferTrainer, "test", classmethod(signalled))
    pairs = ["SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "TEST.EVAL_PERIOD", 0]
    words = arguments(root, tmp_path / "run", *pairs)
    at = words.index("SEED")
    del words[at : at + 2]
    with pytest.raises(SystemExit) as left:
        train_net.main([*words, "--seeds", "1", "2"])
    assert left.value.code == STOPPED
    assert (tmp_path / "run" / "seed1" / "results.json").exists()
    assert not (tmp_path / "run" / "seed2").exists()


@pytest.mark.parametrize("line", ["Results are in", "is finished"])
def test_a_signal_to_a_complete_run_is_ignored(line, root, undisturbed, tmp_path, monkeypatch, capfd, signal_at_line):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    if line == "Results are in":
        (run / "results.json").unlink()
        signal_at_line(line, signal.SIGTERM)
    else:
        monkeypatch.setattr(train_net, "print", lambda text: signal.raise_signal(signal.SIGTERM), raising=False)
    train_net.main(arguments(root, run, options=["--resume"]))
    assert (run / "results.json").exists()
    assert "received" not in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_the_annotations_are_read(number, root, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "configure", lambda arguments: signal.raise_signal(number))
    with pytest.raises(SystemExit) as left:
        train_net.main(arguments(root, tmp_path / "run"))
    assert left.value.code == STOPPED
    assert not (tmp_path / "run").exists()


def test_ctrl_c_before_the_training_says_how_to_go_on(root, tmp_path, monkeypatch):
    monkeypatch.setattr(train_net, "hold", lambda folder: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="the same command with --resume continues"):
        train_net.main(arguments(root, tmp_path / "run"))


def test_a_damaged_checkpoint_costs_its_own_iterations_only(root, undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for path in undisturbed.iterdir():  # as it was after 6 iterations, before the end was saved
        if path.name.startswith("model_0") or path.name in ("config.yaml", "metrics.json"):
            (run / path.name).write_bytes(path.read_bytes())
    newest = run / "model_0000005.pth"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    train_net.main(arguments(root, run, options=["--resume"]))
    log = (run / "log.txt").read_text()
    assert "model_0000005.pth is damaged (its content does not match its sha256)" in log
    assert "model_0000003.pth at iteration 4" in log
    assert_same_end(run, undisturbed)
    # All of them damaged: an error, and the folder stays as it is.
    for path in run.glob("*.pth"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="holds no intact checkpoint"):
        train_net.main(arguments(root, run, options=["--resume"]))


def die(*arguments, **options):
    raise Killed


def test_an_evaluation_that_was_killed_is_made_up_for(root, undisturbed, tmp_path, monkeypatch):
    """With a checkpoint and an evaluation after 3 iterations, the run is killed between the two."""
    monkeypatch.setattr(trainer.TransferTrainer, "test", die)
    interrupt(root, tmp_path / "run", "SOLVER.CHECKPOINT_PERIOD", 3)
    assert records(tmp_path / "run") == {}
    monkeypatch.undo()
    train_net.main(arguments(root, tmp_path / "run", "SOLVER.CHECKPOINT_PERIOD", 3, options=["--resume"]))
    assert "The evaluation after iteration 2 is not on record" in (tmp_path / "run" / "log.txt").read_text()
    assert_same_end(tmp_path / "run", undisturbed)
    best = [torch.load(folder / "model_best.pth", weights_only=True) for folder in (tmp_path / "run", undisturbed)]
    assert [each["iteration"] for each in best] == [2, 2]


def test_a_run_killed_before_its_final_checkpoint_gets_one(root, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_link", die)
    interrupt(root, tmp_path / "run")
    (tmp_path / "run" / "model_final.pth.tmp").touch()
    assert not (tmp_path / "run" / "model_final.pth").exists()
    monkeypatch.undo()
    train_net.main(arguments(root, tmp_path / "run", options=["--resume"]))
    assert_same_end(tmp_path / "run", undisturbed)
    assert (tmp_path / "run" / "model_final.pth").samefile(tmp_path / "run" / "model_0000005.pth")
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_run_that_was_planned_longer_ends_where_it_is_told_to(root, undisturbed, tmp_path, monkeypatch):
    """The batch norms are estimated at the end of a run, which this one's last checkpoint was not."""
    step = AccumulatingTrainer.run_step
    monkeypatch.setattr(AccumulatingTrainer, "run_step", lambda self: die() if self.iter == 6 else step(self))
    interrupt(root, tmp_path / "run", "SOLVER.MAX_ITER", 8, "TEST.EVAL_PERIOD", 0)
    monkeypatch.undo()
    train_net.main(arguments(root, tmp_path / "run", options=["--resume"]))
    one, two = (torch.load(folder / "model_final.pth", weights_only=True) for folder in (tmp_path / "run", undisturbed))
    for name, value in one["model"].items():  # the counters have seen other estimates
        assert torch.equal(value, two["model"][name]) or name.endswith("num_batches_tracked"), name
    with pytest.raises(UserError, match=r"has 6 iterations, more than SOLVER\.MAX_ITER 5"):
        train_net.main(arguments(root, tmp_path / "run", "SOLVER.MAX_ITER", 5, options=["--resume"]))


def test_a_run_is_not_resumed_with_another_config(root, undisturbed):
    pairs = ["SOLVER.WEIGHT_DECAY", 0.5]
    with pytest.raises(UserError, match=r"another config: SOLVER\.WEIGHT_DECAY \(0\.0001 then, 0\.5 now\)"):
        train_net.main(arguments(root, undisturbed, *pairs, options=["--resume"]))


def test_a_run_that_has_not_noted_its_classes_goes_on_and_one_with_others_does_not(tmp_path):
    config = configs.load("shapes_R18_FPN")
    config.OUTPUT_DIR = str(tmp_path)
    run_folder.write_config(tmp_path, config, "shapes_R18_FPN")  # as an earlier version does
    before = run_folder.digest(config)
    config.DATASETS.CLASSES = ("cat", "dog")
    run_folder.check_same(tmp_path, config)
    assert run_folder.digest(config) == before
    run_folder.write_config(tmp_path, config, "shapes_R18_FPN")
    config.DATASETS.CLASSES = ("dog", "cat")
    with pytest.raises(UserError, match=r"DATASETS\.CLASSES \(\['cat', 'dog'\] then, \['dog', 'cat'\] now\)"):
        run_folder.check_same(tmp_path, config)


def start(root, folder, *pairs):
    child = multiprocessing.get_context("fork").Process(
        target=train_net.main, args=(arguments(root, folder, *pairs, options=["--resume"]),)
    )
    child.start()
    return child


def kill(child):
    os.kill(child.pid, signal.SIGKILL)
    child.join()


def test_a_process_that_is_killed(root, undisturbed, tmp_path):
    child = start(root, tmp_path / "run")
    while not list((tmp_path / "run").glob("model_0000001.pth*")):  # killed in its first save, or just after it
        assert child.is_alive()
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process is running in"):
        train_net.main(arguments(root, tmp_path / "run", options=["--resume"]))
    kill(child)
    child = start(root, tmp_path / "run")
    child.join()
    assert child.exitcode == 0
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again(root, undisturbed, tmp_path):
    draws = random.Random(0)
    for number in range(20):
        pairs = ["SOLVER.CHECKPOINT_PERIOD", 1, "DATALOADER.NUM_WORKERS", number % 3]
        child = start(root, tmp_path / "run", *pairs)
        child.join(draws.uniform(0.5, 6))
        if child.exitcode is not None:
            break
        kill(child)
    child = start(root, tmp_path / "run", "SOLVER.CHECKPOINT_PERIOD", 1)
    child.join()
    assert child.exitcode == 0
    assert_same_end(tmp_path / "run", undisturbed)
