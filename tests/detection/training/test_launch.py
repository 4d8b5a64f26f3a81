"""Several processes: what they train is what one trains in several passes, and their errors are errors of the run."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

pytest.importorskip("detectron2")

from detection import train_net
from detection.training import launch, prepare, trainer
from detection.training.accumulation import AccumulatingTrainer
from foundation.errors import UserError
from foundation.signals import STOPPED, StopRequest

WHERE = ["--config", "shapes_R18_FPN", "--num-gpus", "0"]


def join(rank, meeting, argv, stops_at):
    """One of two processes of a training. Detectron2 launches processes on GPUs only; theirs meet in the same way.

    The second one is told to stop in the iteration `stops_at`.
    """
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    config = prepare.configure(train_net.parse(argv))
    step = AccumulatingTrainer.run_step

    def run_step(self):
        step(self)
        if (rank, self.iter) == (1, stops_at):
            signal.raise_signal(signal.SIGUSR1)

    AccumulatingTrainer.run_step = run_step
    with StopRequest() as request:
        trainer.train(config, "shapes_R18_FPN", True, request)


def test_two_processes_train_what_one_trains_in_two_passes(tiny_overrides, tmp_path):
    """Batch norm sees the same images in both cases; of its statistics each of the processes keeps its own.

    A signal to one of the two stops both, with one checkpoint.
    """

    def arguments(folder, passes):
        pairs = ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATION", passes, "TEST.PRECISE_BN.ENABLED", "False"]
        more = ["SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 3]
        return [*WHERE, "--output", str(tmp_path / folder), *tiny_overrides, *map(str, [*pairs, *more])]

    train_net.main(arguments("one", passes=2))
    for stops_at, status in ((1, STOPPED), (None, 0)):  # the second time, they go on from where the first ended
        meeting, argv = str(tmp_path / f"meeting{status}"), arguments("two", passes=1)
        fork = multiprocessing.get_context("fork")
        both = [fork.Process(target=join, args=(rank, meeting, argv, stops_at)) for rank in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join()
        assert [process.exitcode for process in both] == [status, status]
        assert (tmp_path / "two" / "model_0000001.pth").exists()
    one, two = (torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in ("one", "two"))
    assert (one["iteration"], two["iteration"]) == (2, 2)
    for name, value in one["model"].items():
        if "running_" not in name and "num_batches" not in name:
            assert torch.equal(value, two["model"][name]), name
    assert "2 processes, 4 images a step (2 a process)" in (tmp_path / "two" / "log.txt").read_text()
    assert "1 process, 4 images a step (4 a process in 2 passes of 2)" in (tmp_path / "one" / "log.txt").read_text()


def fail(message):
    if torch.distributed.get_rank() == 1:
        raise UserError(message)
    torch.distributed.barrier()


def die(message):
    os.kill(os.getpid(), signal.SIGKILL)


def break_down(message):
    raise ZeroDivisionError(message)


def meet(local_rank, work, world, gpus, machine_rank, url, values):
    """What Detectron2 does in each new process, without GPUs."""
    torch.distributed.init_process_group("gloo", init_method=url, rank=local_rank, world_size=world)
    work(*values)


@pytest.fixture
def two_gpus():
    return train_net.parse([*WHERE[:2], "--num-gpus", "2"])


@pytest.fixture
def forked(monkeypatch):
    """Forked processes in place of new ones, which would take seconds each to begin."""

    def spawn(work, values, count, join):
        return torch.multiprocessing.start_processes(work, values, count, join, start_method="fork")

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    monkeypatch.setattr(launch, "_distributed_worker", meet)


def test_an_error_of_one_process_is_the_error_of_the_run(two_gpus, forked):
    with pytest.raises(UserError) as raised:
        launch.run(two_gpus, fail, "the loss is not finite at iteration 3: lower SOLVER.BASE_LR")
    assert str(raised.value).strip() == "the loss is not finite at iteration 3: lower SOLVER.BASE_LR"


def fail_twice(message):
    """As where a loader's worker, whose error holds its traceback, has ended an evaluation."""
    name = f"{UserError.__module__}.{UserError.__qualname__}"
    try:
        raise UserError(f"Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n{name}: {message}\n")
    except UserError as error:
        raise UserError(message) from error


def break_down_after_an_error(message):
    try:
        raise UserError("a mistake")
    finally:
        break_down(message)


def test_the_last_error_of_several_is_the_error_of_the_run(two_gpus, forked):
    with pytest.raises(UserError) as raised:
        launch.run(two_gpus, fail_twice, "a.jpg: damaged")
    assert str(raised.value).strip() == "a.jpg: damaged"


def wait_for_a_signal(parent, request):
    with request.deferred():
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            os.kill(parent, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while not request.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        torch.distributed.barrier()
    raise SystemExit(STOPPED if request.requested == signal.SIGUSR1 else 1)


def test_a_signal_to_the_command_reaches_its_processes(two_gpus, forked, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.05)
    with StopRequest() as request:
        with pytest.raises(SystemExit) as left:
            launch.run(two_gpus, wait_for_a_signal, os.getpid(), request=request)
        assert left.value.code == STOPPED
        assert request.requested == signal.SIGTERM


def test_a_process_that_is_killed_is_an_error_of_the_run(two_gpus, forked):
    with pytest.raises(UserError, match="SIGKILL; what is saved is intact, --resume continues from there"):
        launch.run(two_gpus, die, "")


@pytest.mark.parametrize("work", [break_down, break_down_after_an_error])
def test_a_defect_keeps_its_traceback(work, two_gpus, forked):
    with pytest.raises(ProcessRaisedException, match=r"(?s)Traceback.*ZeroDivisionError: nought"):
        launch.run(two_gpus, work, "nought")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_new_processes_come_as_far_as_looking_for_their_gpu(two_gpus):
    """They begin with nothing imported, and must make Detectron2 importable before they import it."""
    with pytest.raises(Exception, match="cuda is not available"):
        launch.run(two_gpus, print, "")
