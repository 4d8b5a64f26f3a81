"""Signals that ask to stop: acknowledged at once, and acted on at a moment that loses nothing."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from foundation import signals
from foundation.signals import STOPPED, StopRequest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_the_first_step_the_process_leaves_at_once(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left, StopRequest():
        signal.raise_signal(number)
    assert left.value.code == STOPPED
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1
    assert capfd.readouterr().err == f"{number.name} received: stopping before the first step, nothing is lost\n"


def test_after_the_last_step_nothing_is_said_of_the_first(capfd: pytest.CaptureFixture[str]) -> None:
    def leave() -> None:
        with StopRequest() as request:
            with request.deferred():
                pass
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        leave()
    assert left.value.code == STOPPED
    said = capfd.readouterr().err
    assert said == "SIGTERM received: stopping now; --resume goes on after the last checkpoint\n"


def test_ctrl_c_before_the_first_step_is_an_interrupt(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest():
        signal.raise_signal(signal.SIGINT)
    assert "SIGINT received" in capfd.readouterr().err


def test_during_training_the_first_signal_is_kept_and_a_late_second_ctrl_c_interrupts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(signals, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    with StopRequest() as request, request.deferred():
        for seconds in (0, 0.1, signals.REPEAT_AFTER - 0.1):  # torchrun repeats it
            clock[0] = 100 + seconds
            signal.raise_signal(signal.SIGINT)
        assert request.requested == signal.SIGINT
        clock[0] = 100 + signals.REPEAT_AFTER
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        said = ""
        while not said.endswith("\n"):
            said += capfd.readouterr().err
    again = "Ctrl-C again after 2 s stops without saving"
    assert said == f"SIGINT received: stopping after this step and a checkpoint; {again}\n"


def test_in_an_evaluation_a_late_second_signal_of_any_kind_leaves(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(signals, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    with StopRequest() as request, request.deferred(), request.evaluating():
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert request.requested == signal.SIGTERM
        clock[0] += signals.REPEAT_AFTER
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGUSR1)
        assert left.value.code == STOPPED
        said = ""
        while not said.endswith("\n"):
            said += capfd.readouterr().err
    assert said == "SIGTERM received: stopping after this evaluation; a second signal after 2 s stops at once\n"


@pytest.mark.parametrize(("number", "leaving"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_imports_are_not_cut_short(number: signal.Signals, leaving: type, capfd: pytest.CaptureFixture[str]) -> None:
    """PyTorch swallows an error while it imports NumPy, which is then left in part."""
    imported = []

    def start() -> None:
        with StopRequest() as request, request.importing():
            signal.raise_signal(number)
            imported.append("numpy")

    with pytest.raises(leaving):
        start()
    assert imported == ["numpy"]
    assert capfd.readouterr().err.startswith(f"{number.name} received: stopping before the first step")


def test_when_the_work_is_finished_signals_are_not_answered(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as request:
        with request.deferred():
            request.finish()
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == ""
    with pytest.raises(SystemExit) as left:
        request.begin()  # another run after all
    assert left.value.code == STOPPED
    assert capfd.readouterr().err == "SIGTERM received: stopping before the next run\n"


EXITING = """
import atexit, os, signal, sys
from foundation.errors import run
from foundation.signals import SIGNALS, STOPPED, StopRequest
def send():
    for number in SIGNALS:
        os.kill(os.getpid(), number)
def main(_):
    if sys.argv[1] != "plain":
        with StopRequest() as request, request.deferred():
            if sys.argv[1] == "stopped":
                os.kill(os.getpid(), signal.SIGINT)
                raise SystemExit(STOPPED)
        send()
atexit.register(send)
run(main)
"""


@pytest.mark.parametrize(("work", "status"), [("stopped", STOPPED), ("complete", 0), ("plain", 0)])
def test_signals_are_ignored_from_the_end_of_the_work_to_the_exit(work: str, status: int) -> None:
    """Also between the end of the request and that of the command, and in what is called at the exit."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", EXITING, work]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=40, check=False)
    assert done.returncode == status
    assert done.stderr.count(b"\n") == (work == "stopped")  # the answer to its signal


WORKER = """
import os, time, torch
from foundation import signals
class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 100
    def __getitem__(self, index):
        return os.getpid()
signals.end_workers_at_exit()
batches = iter(torch.utils.data.DataLoader(Items(), num_workers=1, worker_init_fn=signals.leave_to_parent))
os.kill(int(next(batches)), signals.signal.SIGTERM)
try:
    [next(batches) for _ in range(50)]
    raise KeyError
except KeyError as kept:
    raise SystemExit(3) from kept
"""


def test_workers_survive_sigterm_and_end_with_their_parent() -> None:
    """In the traceback that is left, the loader is still there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, env=environment, timeout=40, check=False)
    assert (done.returncode, done.stderr) == (3, b"")


BUSY = """
import hashlib, sys
from foundation import signals
signals.STUCK_AFTER = 0.3
with signals.StopRequest() as request:
    deferred = request.deferred()
    if sys.argv[1] == "deferred":
        deferred.__enter__()
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, where no handler of Python runs
"""


@pytest.mark.parametrize("phase", ["starting", "deferred"])
def test_it_is_acknowledged_while_the_main_thread_is_outside_of_python(phase: str) -> None:
    """As in a backward pass, or while it waits for other processes. A start-up that is stuck is left."""
    command = [sys.executable, "-c", BUSY, phase]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        said = process.stderr.readline().decode()
        assert time.monotonic() - sent < 1
        assert said.startswith("SIGTERM received: stopping " + ("after" if phase == "deferred" else "before"))
        if phase == "starting":
            assert process.wait(10) == STOPPED
        process.kill()


def test_a_forked_process_is_ended_by_sigterm() -> None:
    """So a multiprocessing pool ends its processes. Detectron2 reads Cityscapes in one."""
    with StopRequest(), StopRequest() as request, request.deferred():
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        process.start()
        process.terminate()
        process.join(20)
        status = process.exitcode
        process.kill()
    assert (status, request.requested) == (-signal.SIGTERM, None)
