"""Kill training at random moments, start it again with the same command, and compare the end with an undisturbed run.

    python tests/pretrain/torture.py --kills 20 --processes 2 --kinds all worker save one term hang --seed 0

Each process is a fork of this one, which has imported everything and trained nothing, so that a run takes a second and
the moments are spread over all of it. The kinds, in turn:

    all      SIGKILL of every process at a random time
    worker   SIGKILL of a worker of the loader
    save     SIGKILL of every process in a save, before one of its writes, syncs, renames, removals and links
    one      SIGKILL of one process of several, which the others have to notice by themselves
    term     a signal that asks to stop, to one process
    hang     a process that stops without dying

Prints a line for each kill, and one for all.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from foundation import files
from foundation.errors import run as run_command
from pretrain import train
from pretrain.runs import checkpoint
from pretrain.training import build

KINDS = ("all", "worker", "save", "one", "term", "hang")
SETTINGS = [
    *("DATA.NAME", "folder", "DATA.IMAGE_SIZE", "16", "PROJECTOR.DIMS", "[12, 8]", "TRAIN.PRECISION", "float32"),
    *("TRAIN.BATCH_SIZE", "4", "TRAIN.EPOCHS", "3", "LOG.PERIOD", "2", "CHECKPOINT.STEPS", "3"),
    *("TRAIN.PEER_TIMEOUT", "10", "DATA.WORKER_TIMEOUT", "60", "TRAIN.LR", "0.05"),
]
LIMIT = 240.0  # seconds for a run of a second, on a busy machine


def tiny_encoder(name: str, stem: str, zero_init_residual: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def write_images(folder: Path, count: int = 26) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")


def count_saving(marker: Path, stop_at: tuple[str, int] | None = None) -> None:
    """Count in `marker` what saving does to files; or wait, to be killed, before one of it: (operation, number)."""
    seen: Counter[str] = Counter()

    def counted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            seen[name] += 1
            if stop_at in (None, (name, seen[name])):
                marker.write_text(json.dumps(seen))
            time.sleep(LIMIT if stop_at == (name, seen[name]) else 0)
            return operation(*args, **options)

        return wrapper

    os.fsync = counted("fsync", os.fsync)
    for name in ("replace", "unlink", "symlink_to"):
        setattr(Path, name, counted(name, getattr(Path, name)))
    files._DigestingStream.write = counted("write", files._DigestingStream.write)  # type: ignore[method-assign]


class Attempt:
    """One start of the command, in as many processes as asked for."""

    def __init__(self, argv: Sequence[str], processes: int, log: Path, prepare: Callable[[], None] = lambda: None):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.pids = []
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                os.environ.update({name: str(value) for name, value in places.items()})
                os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                try:
                    prepare() if rank == 0 else None
                    run_command(lambda _: train.main(list(argv)))
                except SystemExit as leaving:
                    sys.stdout.flush()
                    os._exit(leaving.code if isinstance(leaving.code, int) else 1)
                except BaseException:
                    traceback.print_exc()
                finally:  # whatever happens, a fork must not go on as the parent
                    os._exit(1)
            self.pids.append(pid)

    def kill(self, pids: Sequence[int] | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            for pid in self.pids if pids is None else pids:
                os.kill(pid, signal.SIGKILL)

    def wait(self) -> list[int]:
        """The exit statuses; negative: the signal. Too late is an error, and nothing is left running."""
        deadline, left, found = time.monotonic() + LIMIT, list(self.pids), {}
        while left:
            for pid in list(left):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    found[pid] = os.waitstatus_to_exitcode(status)
                    left.remove(pid)
            if left and time.monotonic() > deadline:
                self.kill(left)
                raise TimeoutError(f"processes {left} do not end")
            time.sleep(0.005)
        return [found[pid] for pid in self.pids]

    def worker(self) -> int | None:
        """A loader's worker of the first process, if there is one yet."""
        with contextlib.suppress(OSError, IndexError):
            return int(Path(f"/proc/{self.pids[0]}/task/{self.pids[0]}/children").read_text().split()[0])
        return None


class Torture:
    """A command, and what is known of it from a run left alone: how long it takes, and what it does to files."""

    def __init__(self, folder: Path, processes: int, seed: int) -> None:
        self.folder, self.processes, self.rng = folder, processes, random.Random(seed)
        self.images, self.log = folder / "images", folder / "log.txt"
        write_images(self.images)
        marker, well = folder / "operations", [0] * processes
        assert self.start(folder / "whole", prepare=lambda: count_saving(marker)).wait() == well, self.log.read_text()
        self.operations, self.expected = json.loads(marker.read_text()), result(folder / "whole")
        started = time.monotonic()
        assert self.start(folder / "again").wait() == well, self.log.read_text()
        self.seconds = time.monotonic() - started
        assert not differences(self.expected, result(folder / "again"))
        print(f"{processes} process(es), {self.seconds:.2f} s left alone, {sum(self.operations.values())} operations")

    def start(self, run: Path, *more: str, prepare: Callable[[], None] = lambda: None) -> Attempt:
        argv = ["--config", "shapes_R18", "--output", str(run), "--resume", *SETTINGS, "DATA.ROOT", str(self.images)]
        return Attempt([*argv, *(more or ("DATA.WORKERS", "0"))], self.processes, self.log, prepare)

    def kill(self, run: Path, kind: str) -> bool:
        """Start the command and kill it. Returns whether it was still running; else the run is complete."""
        before = time.monotonic()
        attempt, text = getattr(self, f"kill_{kind}")(run)
        killed, statuses = time.monotonic(), attempt.wait()
        assert all(status in (0, 2, 75, 130) or status < 0 for status in statuses), (statuses, self.log.read_text())
        after, later = killed - before, time.monotonic() - killed
        print(f"  {kind}: {text}, {after:.2f} s after the start; statuses {statuses} {later:.1f} s later")
        return statuses != [0] * self.processes

    def kill_all(self, run: Path) -> tuple[Attempt, str]:
        attempt = self.start(run)
        time.sleep(self.rng.uniform(0, self.seconds))
        attempt.kill()
        return attempt, "every process"

    def kill_one(self, run: Path) -> tuple[Attempt, str]:
        attempt = self.start(run)
        time.sleep(self.rng.uniform(0, self.seconds))
        rank = self.rng.randrange(self.processes)
        attempt.kill([attempt.pids[rank]])
        return attempt, f"process {rank}"

    def kill_save(self, run: Path) -> tuple[Attempt, str]:
        name, marker = self.rng.choice(sorted(self.operations)), self.folder / f"{run.name}.marker"
        number = self.rng.randint(1, self.operations[name] // 2)  # a resumed run has fewer to do
        marker.unlink(missing_ok=True)
        attempt = self.start(run, prepare=lambda: count_saving(marker, (name, number)))
        wait_for(lambda: marker.exists() or _ended(attempt.pids[0]))
        attempt.kill()
        return attempt, f"before {name} {number}"

    def kill_worker(self, run: Path) -> tuple[Attempt, str]:
        attempt = self.start(run, "DATA.WORKERS", "1")
        wait_for(lambda: attempt.worker() is not None or _ended(attempt.pids[0]))
        time.sleep(self.rng.uniform(0, self.seconds / 2))
        worker = attempt.worker()
        attempt.kill([worker] if worker else None)
        return attempt, f"worker {worker}"

    def kill_term(self, run: Path) -> tuple[Attempt, str]:
        """Not a kill: a request to stop, to one process, of which all have to take notice."""
        attempt = self.start(run)
        wait_for(lambda: (run / "metrics.json").exists() or _ended(attempt.pids[0]))
        time.sleep(self.rng.uniform(0.1, self.seconds / 2))
        number = self.rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.rng.choice(attempt.pids), number)
        return attempt, number.name

    def kill_hang(self, run: Path) -> tuple[Attempt, str]:
        """One process stops without dying; the others have to leave within their timeout."""
        attempt = self.start(run, "TRAIN.PEER_TIMEOUT", "5")
        time.sleep(self.rng.uniform(self.seconds / 2, self.seconds))
        stopped = self.rng.choice(attempt.pids)
        os.kill(stopped, signal.SIGSTOP)
        wait_for(lambda: all(_ended(pid) for pid in attempt.pids if pid != stopped))
        attempt.kill([stopped])
        return attempt, "a process that hangs"

    def finish(self, run: Path) -> bool:
        """Run to the end. Returns whether that is bit-identical to the run left alone."""
        assert self.start(run).wait() == [0] * self.processes, self.log.read_text()
        found = differences(self.expected, result(run)) + [str(left) for left in run.glob("checkpoints/*.tmp")]
        print(f"  {run.name}: " + (f"DIFFERS in {found[:5]}" if found else "bit-identical"), flush=True)
        return not found


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)


def _ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def result(run: Path) -> dict[str, Any]:
    """All that must be the same: state, and each step's record without the times."""
    state = checkpoint.load(run / "checkpoints" / "last.pt")
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    record = [{k: v for k, v in line.items() if k not in ("images_per_second", "data_share")} for line in lines]
    return {
        **{part: state[part] for part in ("model", "objective", "optimizer", "position")},
        "record": record,
        "spectrum": (run / "spectrum.json").read_text(),
        "encoder": (run / "encoder.safetensors").read_bytes(),
    }


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Where two nested results differ, bit for bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [name]
    if isinstance(a, dict):
        keys = a.keys() | b.keys()
        return [
            found for key in sorted(keys, key=str) for found in differences(a.get(key), b.get(key), f"{name}.{key}")
        ]
    return [] if a == b else [name]


def torture(folder: Path, processes: int, kinds: Sequence[str], kills: int, kills_per_run: int, seed: int) -> int:
    """Returns the number of runs that ended otherwise than the one left alone."""
    command = Torture(folder, processes, seed)
    wrong = done = runs = 0
    while done < kills:
        run = folder / f"run{runs}"
        runs += 1
        for _ in range(min(kills_per_run, kills - done)):
            if not command.kill(run, kinds[done % len(kinds)]):
                break
            done += 1
        wrong += not command.finish(run)
    seconds = sum(os.times()[2:4])
    print(f"{processes} process(es): {done} kills in {runs} runs, {wrong} ended otherwise; {seconds:.1f} CPU s")
    return wrong


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kills-per-run", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["all", "worker", "save"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build.build_encoder, build.feature_dim = tiny_encoder, lambda name: 8
    with tempfile.TemporaryDirectory() as folder:
        SummaryWriter(folder).close()  # imports that the forks would otherwise repeat, each for itself
        sys.exit(torture(Path(folder), args.processes, args.kinds, args.kills, args.kills_per_run, args.seed) > 0)


if __name__ == "__main__":
    main()
