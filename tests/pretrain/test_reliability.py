"""What docs/reliability.md promises of runs: killed, asked to stop, given bad batches, started twice.

The kills themselves are in torture.py, a script of its own: its runs are forks of a process that has trained nothing.
"""

import json
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fvcore.common.config import CfgNode

from foundation import signals
from foundation.errors import UserError
from foundation.signals import STOPPED
from pretrain import train
from pretrain.runs import checkpoint
from pretrain.runs.folder import open_run
from pretrain.training import build
from pretrain.training import run as training_run
from tests.pretrain.tiny_encoder import use_tiny_encoder

TORTURE = Path(__file__).with_name("torture.py")
TINY = [
    *("DATA.NAME", "folder", "DATA.IMAGE_SIZE", "16", "DATA.WORKERS", "0", "PROJECTOR.DIMS", "[12, 8]"),
    *("TRAIN.BATCH_SIZE", "4", "TRAIN.EPOCHS", "2", "TRAIN.PRECISION", "float32", "LOG.PERIOD", "2"),
]


@pytest.fixture(autouse=True)
def _tiny_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_encoder(monkeypatch)


def arguments(photos: Path, output: Path, *more: str) -> list[str]:
    return ["--config", "shapes_R18", "--output", str(output), *more, *TINY, "DATA.ROOT", str(photos)]


def record(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_share")} for line in lines]


def last(run: Path) -> dict[str, Any]:
    return checkpoint.load(run / "checkpoints" / "last.pt")


def assert_same(run: Path, other: Path) -> None:
    """Bit for bit: weights, BatchNorm, covariance, momentum, position, and each step's record."""
    one, two = last(run), last(other)
    for part in ("model", "objective"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(tensor, two[part][name]) for name, tensor in one[part].items())
    momenta = [state["optimizer"]["state"] for state in (one, two)]
    assert all(torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"]) for i in momenta[0])
    assert one["position"] == two["position"]
    assert record(run) == record(other)


def run_torture(*options: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TORTURE.parents[2])}
    done = subprocess.run([sys.executable, str(TORTURE), *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("processes", "kinds"),
    [(1, ["worker", "all", "save"]), pytest.param(2, ["one", "save", "term"], marks=pytest.mark.slow)],
)
def test_killed_runs_end_bit_identical(processes: int, kinds: list[str]) -> None:
    said = run_torture("--kills", "3", "--kills-per-run", "3", "--processes", str(processes), "--kinds", *kinds)
    assert "3 kills" in said
    assert "0 ended otherwise" in said


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_twenty_random_moments(processes: int) -> None:
    kinds = ["all", "worker", "save", "term", *(["one", "hang"] if processes > 1 else [])]
    said = run_torture("--kills", "20", "--processes", str(processes), "--kinds", *kinds, "--seed", "1")
    assert "20 kills" in said
    assert "0 ended otherwise" in said


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_encoder(patch)
        output = tmp_path_factory.mktemp("whole")
        train.main(arguments(photos, output))
    return output


def signal_at(step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the process get a signal in the middle of a step."""
    take = build.Trainer.step

    def step_and_signal(self: Any, now: int, *args: Any, **options: Any) -> Any:
        if now == step:
            os.kill(os.getpid(), number)
        return take(self, now, *args, **options)

    monkeypatch.setattr(build.Trainer, "step", step_and_signal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_its_own_status(
    number: signal.Signals, finished: Path, photos: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        signal_at(3, number, patch)
        with pytest.raises(SystemExit) as left:
            train.main(arguments(photos, tmp_path))
    assert left.value.code == STOPPED == 75
    assert last(tmp_path)["position"]["step"] == 4  # the step that was running is complete
    assert signal.getsignal(number) == before
    assert not (tmp_path / "encoder.safetensors").exists()
    train.main(arguments(photos, tmp_path, "--resume"))
    assert_same(tmp_path, finished)


def test_a_signal_before_the_first_step_leaves_at_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    build_source = training_run.build_source

    def signalled(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return build_source(*args, **options)

    monkeypatch.setattr(training_run, "build_source", signalled)
    with pytest.raises(SystemExit) as left:
        train.main(arguments(photos, tmp_path / "run"))
    assert left.value.code == STOPPED
    assert not (tmp_path / "run").exists()
    assert "SIGUSR1 received: stopping before the first step" in capfd.readouterr().err


def test_a_signal_during_the_export_leaves_it_to_resume(
    finished: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def signalled(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "export", signalled)
        with pytest.raises(SystemExit) as left:
            train.main(arguments(photos, tmp_path))
    assert left.value.code == STOPPED
    assert "SIGTERM received: stopping now; --resume" in capfd.readouterr().err
    assert not (tmp_path / "encoder.safetensors").exists()
    train.main(arguments(photos, tmp_path, "--resume"))
    assert (tmp_path / "encoder.safetensors").read_bytes() == (finished / "encoder.safetensors").read_bytes()
    assert_same(tmp_path, finished)


def test_a_signal_to_a_complete_run_is_ignored(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], signal_at_line: Callable
) -> None:
    signal_at_line("the encoder is in", signal.SIGTERM)
    train.main(arguments(photos, tmp_path))
    assert "received" not in capfd.readouterr().err


def test_a_second_signal_to_a_stopped_run_is_ignored(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_at_line: Callable
) -> None:
    monkeypatch.setattr(signals, "REPEAT_AFTER", 0)
    signal_at(3, signal.SIGINT, monkeypatch)
    signal_at_line("stopped as requested", signal.SIGINT)
    with pytest.raises(SystemExit) as left:
        train.main(arguments(photos, tmp_path))
    assert left.value.code == STOPPED


@pytest.mark.parametrize("size", [0, 100, 2000], ids=["config.yaml", "config.yaml in part", "metrics.json"])
def test_a_full_disk_at_the_start_is_one_line(size: int, photos: Path, tmp_path: Path, files_up_to: Callable) -> None:
    """The limit on a file's size stands for the disk: the next write is refused."""
    with files_up_to(size), pytest.raises(UserError, match=r"^cannot (write|save) \S+.*File too large"):
        train.main(arguments(photos, tmp_path / "run"))
    train.main(arguments(photos, tmp_path / "run", "--resume"))  # nothing that was left behind is in the way


def test_a_damaged_record_does_not_stop_a_resume(photos: Path, tmp_path: Path, finished: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        signal_at(7, signal.SIGTERM, patch)
        with pytest.raises(SystemExit):
            train.main(arguments(photos, tmp_path))
    for name in ("metrics.json", "spectrum.json"):
        with (tmp_path / name).open("ab") as file:
            file.write(b'5\n{}\n{"iteration": "\xff"}\n')
    train.main(arguments(photos, tmp_path, "--resume"))
    assert_same(tmp_path, finished)
    assert (tmp_path / "spectrum.json").read_bytes() == (finished / "spectrum.json").read_bytes()
    assert "metrics.json: skipped 2 lines" in (tmp_path / "log.txt").read_text()


def test_checkpoints_between_epochs(
    finished: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = checkpoint.save

    def noted(run: Path, state: dict[str, Any]) -> Path:
        saved.append(state["position"]["step"])
        return save(run, state)

    monkeypatch.setattr(checkpoint, "save", noted)
    for name, value, expected in [("STEPS", "5", [5, 6, 10, 12]), ("MINUTES", "1e-9", [2, 4, 6, 8, 10, 12])]:
        train.main([*arguments(photos, tmp_path / name), f"CHECKPOINT.{name}", value])
        assert saved == expected
        assert_same(tmp_path / name, finished)
        saved.clear()


def test_a_run_killed_before_the_link_of_its_last_checkpoint_is_completed(photos: Path, tmp_path: Path) -> None:
    train.main(arguments(photos, tmp_path))
    link = tmp_path / "checkpoints" / "last.pt"
    before, newest = sorted(link.parent.glob("step_*.pt"))
    link.unlink()
    link.symlink_to(before.name)
    train.main(arguments(photos, tmp_path, "--resume"))  # has no step to take, and so saves nothing
    assert link.resolve() == newest


def test_bad_batches_are_counted_named_and_bounded(photos: Path, tmp_path: Path) -> None:
    def poisoned(self: Any, batch: Any, view: int, augment: Callable = build.Trainer._augment) -> torch.Tensor:
        images = augment(self, batch, view)
        return images * float("nan") if 3 in batch.indices else images  # once in each epoch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.Trainer, "_augment", poisoned)
        train.main(arguments(photos, tmp_path / "few"))
        assert [line["skipped"] for line in record(tmp_path / "few")][-1] == 2
        assert last(tmp_path / "few")["position"] == {"epoch": 2, "step": 12, "skipped": 2}
        said = re.findall(r"step (\d+) skipped: .* images \[(.*)\]", (tmp_path / "few" / "log.txt").read_text())
        assert len(said) == 2
        assert all("3" in images.split(", ") and len(images.split(", ")) == 4 for _, images in said)
        assert all(tensor.isfinite().all() for tensor in last(tmp_path / "few")["model"].values())
        with pytest.raises(UserError, match=r"2 batches gave .* more than TRAIN.MAX_SKIPPED \(1\)"):
            train.main([*arguments(photos, tmp_path / "many"), "TRAIN.MAX_SKIPPED", "1"])
        assert all(tensor.isfinite().all() for tensor in last(tmp_path / "many")["model"].values())
        with pytest.raises(UserError, match="2 batches"):  # the count goes on after a resume
            train.main([*arguments(photos, tmp_path / "many", "--resume"), "TRAIN.MAX_SKIPPED", "1"])


def test_damaged_images_are_replaced_named_once_and_bounded(photos: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in (photos / "train").rglob("*.jpg"):
        (images / f"{path.parent.name}{path.name}").write_bytes(path.read_bytes())
    for name in ("circle03.jpg", "square01.jpg"):
        (images / name).write_bytes(b"<html>")
    for workers in ("0", "1"):
        run = tmp_path / workers
        train.main([*arguments(images, run), "DATA.MAX_UNREADABLE", "0.1", "DATA.WORKERS", workers])
        said = (run / "log.txt").read_text()
        assert [said.count(f"{name}: not an image") for name in ("circle03.jpg", "square01.jpg")] == [1, 1]
    assert_same(tmp_path / "0", tmp_path / "1")
    with pytest.raises(UserError, match=r"2 images cannot be read, and the limit is 1; .*circle03.jpg.*square01.jpg"):
        train.main([*arguments(images, tmp_path / "strict"), "DATA.MAX_UNREADABLE", "0.01"])
    (images / "square01.jpg").unlink()
    with pytest.raises(UserError, match=r"^1 image cannot be read, and the limit is 0; .*circle03.jpg"):
        train.main([*arguments(images, tmp_path / "none"), "DATA.MAX_UNREADABLE", "0"])


def test_collapse_is_warned_of(photos: Path, tmp_path: Path) -> None:
    # Batches of 4 images span 4 of 64 dimensions at most: fewer than a tenth.
    train.main([*arguments(photos, tmp_path), "PROJECTOR.DIMS", "[64]", "TRAIN.WARMUP_EPOCHS", "1"])
    said = re.findall(r"the embedding has collapsed: at step (\d+)", (tmp_path / "log.txt").read_text())
    assert "lower OBJECTIVE.ATTRACTION or TRAIN.LR" in (tmp_path / "log.txt").read_text()
    assert said == ["7"]  # once, at the first log point after the warm-up


def test_record_is_mirrored_where_asked_for(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[int, Any] = {}
    opened: dict[str, Any] = {}

    class Session:
        def log(self, values: dict, step: int) -> None:
            sent[step] = values

    library = types.ModuleType("wandb")
    library.init = lambda **options: opened.update(options) or Session()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", library)
    train.main([*arguments(photos, tmp_path / "a"), "LOG.WANDB", "mine"])
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.json").read_text().splitlines()]
    assert [{"iteration": step, **values} for step, values in sent.items()] == lines
    assert opened["project"] == "mine"
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"LOG.WANDB needs the library wandb"):
        train.main([*arguments(photos, tmp_path / "b"), "LOG.WANDB", "mine"])
    assert not (tmp_path / "b").exists()


def test_second_run_in_a_directory_is_refused(photos: Path, tmp_path: Path, error_of: Callable) -> None:
    locked, done = os.pipe(), os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            open_run(tmp_path, CfgNode({"SEED": 0}), resume=False)
            os.write(locked[1], b"1")
            os.read(done[0], 1)
        finally:
            os._exit(0)
    os.read(locked[0], 1)
    try:
        for more in ([], ["--resume"]):
            message = error_of(train.main, arguments(photos, tmp_path, *more))
            assert f"another process is running in {tmp_path}" in message
    finally:
        os.write(done[1], b"1")
        os.waitpid(holder, 0)
    train.main(arguments(photos, tmp_path, "--resume"))  # free again
