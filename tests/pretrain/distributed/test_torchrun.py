"""The commands of docs/reliability.md under torchrun: signals are passed on, and killed runs restarted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain import train
from pretrain.runs import checkpoint

pytestmark = pytest.mark.slow
TINY = [
    *("DATA.NAME", "folder", "DATA.IMAGE_SIZE", "32", "DATA.WORKERS", "1", "PROJECTOR.DIMS", "[16, 8]"),
    *("TRAIN.BATCH_SIZE", "8", "TRAIN.PRECISION", "float32", "LOG.PERIOD", "1", "CHECKPOINT.STEPS", "2"),
]
LIMIT = 250.0  # seconds


def start(photos: Path, output: Path, port: int, epochs: int, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", *options]
    arguments = ["--output", str(output), "--resume", *TINY, "TRAIN.EPOCHS", str(epochs), "DATA.ROOT", str(photos)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, train.__file__, *arguments], env=environment, stderr=subprocess.DEVNULL)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_steps(run: Path, count: int) -> bool:
    path = run / "metrics.json"
    return path.is_file() and path.read_text().count("\n") >= count


def test_a_signal_to_torchrun_reaches_the_run(photos: Path, tmp_path: Path, free_port: int) -> None:
    handled = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "240"]
    torchrun = start(photos, tmp_path, free_port, 1000, *handled)
    wait_for(lambda: has_steps(tmp_path, 3))
    torchrun.send_signal(signal.SIGUSR1)
    assert torchrun.wait(LIMIT) == 1  # whatever its processes leave with
    assert "stopped as requested" in (tmp_path / "log.txt").read_text()
    state = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    assert state["position"]["step"] == (tmp_path / "metrics.json").read_text().count("\n")


def test_torchrun_restarts_a_run_of_which_a_process_was_killed(photos: Path, tmp_path: Path, free_port: int) -> None:
    torchrun = start(photos, tmp_path, free_port, 4, "--max-restarts", "1")
    wait_for(lambda: has_steps(tmp_path, 4))
    processes = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(processes[-1]), signal.SIGKILL)
    assert torchrun.wait(LIMIT) == 0
    assert "resuming after epoch" in (tmp_path / "log.txt").read_text()
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["position"]["step"] == 12
    assert has_steps(tmp_path, 12)
