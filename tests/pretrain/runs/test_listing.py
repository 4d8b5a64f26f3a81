"""`--list-runs`: what it says of runs that are complete, interrupted, being worked on, or none."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain import train
from pretrain.runs.listing import find_runs

TINY = [
    *("DATA.NAME", "folder", "DATA.IMAGE_SIZE", "32", "DATA.WORKERS", "0", "TRAIN.BATCH_SIZE", "8", "LOG.PERIOD", "1"),
    *("PROJECTOR.DIMS", "[16, 8]", "TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.LR", "0.01"),
]
HOLD = """
import pathlib, sys
from foundation import locks
locks.hold(pathlib.Path(sys.argv[1]))
print(flush=True)
input()
"""


def test_runs_are_listed_with_what_is_left(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.main(["--output", "output/a/whole", *TINY, "DATA.ROOT", str(photos)])
    train.main(["--output", "output/part", *TINY, "DATA.ROOT", str(photos), "TRAIN.MAX_STEPS", "4"])
    (Path("output") / "part" / "encoder.safetensors").unlink()  # as if it had been killed there
    with (Path("output") / "part" / "metrics.json").open("a") as record:  # steps that its checkpoint does not cover
        record.write('{"iteration": 4, "epoch": 1.67}\n')
    (Path("output") / "notes").mkdir()
    (Path("output") / "notes" / "config.yaml").write_text("a: 1")
    whole, part = find_runs(Path("output"))
    assert (whole.folder, whole.kind) == (Path("output/a/whole"), "pretrain")
    assert (whole.step, whole.epoch, whole.outlook) == (6, 2.0, "complete")
    assert (part.step, part.epochs, part.outlook) == (4, 2, "goes on with --resume")
    assert part.epoch == pytest.approx(4 / 3)
    assert part.saved is not None
    capsys.readouterr()
    train.main(["--list-runs"])
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert first.split()[:5] == ["output/a/whole", "pretrain", "2", "of", "2"]
    assert second.split()[:6] == ["output/part", "pretrain", "1.3", "of", "2", "4"]


def test_a_run_that_another_process_is_at(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("OBJECTIVE: {}\nTRAIN: {EPOCHS: 3}\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert find_runs(tmp_path)[0].outlook == "running"
        holder.communicate(b"\n")
    (run,) = find_runs(tmp_path)
    assert (run.outlook, run.epoch, run.epochs) == ("nothing saved", None, 3)


def test_a_folder_that_is_not_there_is_said(tmp_path: Path, error_of: Callable[..., str]) -> None:
    assert "no folder" in error_of(train.main, ["--list-runs", str(tmp_path / "nowhere")])
