"""What docs/reliability.md promises of faults: damaged checkpoints, disks that refuse, workers that die or hang."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foundation import files
from foundation.errors import UserError
from foundation.images import OpenImage
from pretrain.batches.loader import build_loader, read_batches, report_dead_workers
from pretrain.batches.sampler import SequentialBatches
from pretrain.batches.views import ViewDataset
from pretrain.config import get_defaults
from pretrain.images.sources import ArraySource
from pretrain.runs import checkpoint
from pretrain.runs.folder import open_run


def saved_twice(run: Path) -> Path:
    for step in (1, 2):
        state = {"format": checkpoint.PRETRAIN, "model": {"w": torch.full((5000,), float(step))}}
        path = checkpoint.save(run, {**state, "position": {"step": step}})
    return path


def damages() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    for share in (0.0, 0.01, 0.5, 0.999):
        yield f"cut to {share:.1%}", lambda content, share=share: content[: int(share * len(content))]
    yield "one byte missing", lambda content: content[:-1]
    yield "one byte more", lambda content: content + b"\0"
    for place in np.linspace(0, 0.9999, 25):  # header, pickle, tensor data, directory of the zip
        for bit in (0, 7):
            yield f"bit {bit} at {place:.1%}", lambda content, place=place, bit=bit: flip(content, place, bit)
    yield "another file type", lambda content: b"<html>" + content
    yield "zeros", lambda content: bytes(len(content))


def flip(content: bytes, place: float, bit: int) -> bytes:
    changed = bytearray(content)
    changed[int(place * len(content))] ^= 1 << bit
    return bytes(changed)


def test_every_damage_is_detected_and_the_one_before_is_used(tmp_path: Path) -> None:
    path = saved_twice(tmp_path)
    whole, digest = path.read_bytes(), path.with_suffix(".sha256").read_bytes()
    cases = list(damages())
    assert len(cases) == 58
    for name, damage in cases:
        path.write_bytes(damage(whole))
        with pytest.raises(UserError, match=r"step_000000002.pt is damaged"):
            checkpoint.load(path)
        found = checkpoint.load_newest(tmp_path)
        assert found is not None, name
        assert found["position"] == {"step": 1}, name
    path.write_bytes(whole)
    for content in (b"", digest[:10], digest.swapcase().replace(b"0", b"1")):
        path.with_suffix(".sha256").write_bytes(content)
        assert checkpoint.load_newest(tmp_path)["position"] == {"step": 1}  # type: ignore[index]
    path.with_suffix(".sha256").unlink()
    assert checkpoint.load_newest(tmp_path)["position"] == {"step": 1}  # type: ignore[index]
    path.unlink()
    assert checkpoint.load_newest(tmp_path)["position"] == {"step": 1}  # type: ignore[index]


def test_what_a_killed_save_leaves_is_removed(photos: Path, tmp_path: Path) -> None:
    path = saved_twice(tmp_path)
    before = sorted(path.parent.iterdir())
    unfinished = ["step_000000003.tmp", "step_000000003.pt.tmp", "step_000000003.sha256", "step_000000003.sha256.tmp"]
    for name in (*unfinished, "last.tmp"):
        (path.parent / name).write_text("half")
    checkpoint.finish_save(tmp_path)
    assert sorted(path.parent.iterdir()) == before


def save_steps(run: Path, *steps: int) -> None:
    for step in steps:
        state = {"format": checkpoint.PRETRAIN, "model": {"w": torch.full((50,), float(step))}}
        checkpoint.save(run, {**state, "position": {"step": step}})


def steps_kept(run: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (run / "checkpoints").glob(f"step_{'[0-9]' * 9}.pt"))


def test_files_of_others_in_the_folder_are_left_alone_and_never_counted(tmp_path: Path) -> None:
    """Copies that a user has made, whose names sort after the run's own."""
    save_steps(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    content = (folder / "step_000000001.pt").read_bytes()
    own = ["step_best.pt", "step_keep.pt", "step_000000001 (copy).pt", "step_best.sha256", "notes.tmp", "step_9.pt"]
    for name in own:
        (folder / name).write_bytes(content)
    save_steps(tmp_path, 2, 3)
    checkpoint.finish_save(tmp_path)
    assert steps_kept(tmp_path) == [2, 3]
    assert checkpoint.load(folder / "last.pt")["position"] == {"step": 3}
    assert checkpoint.load_newest(tmp_path)["position"] == {"step": 3}  # type: ignore[index]
    assert all((folder / name).read_bytes() == content for name in own)


@pytest.mark.parametrize("damaged", [[8], [8, 9]])
def test_damaged_checkpoints_never_push_out_an_intact_one(damaged: list[int], tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    folder = tmp_path / "checkpoints"
    for step in damaged:
        (folder / f"step_{step:09d}.pt").write_bytes(b"damaged")
        (folder / f"step_{step:09d}.sha256").write_text("0" * 64)
    checkpoint.finish_save(tmp_path)
    assert checkpoint.load(folder / "last.pt")["position"] == {"step": 3}
    save_steps(tmp_path, 4)
    assert steps_kept(tmp_path) == [3, 4, *damaged]
    save_steps(tmp_path, 5)
    assert steps_kept(tmp_path) == [4, 5, *damaged]
    assert checkpoint.load_newest(tmp_path)["position"] == {"step": 5}  # type: ignore[index]
    checkpoint.finish_save(tmp_path)
    assert checkpoint.load(folder / "last.pt")["position"] == {"step": 5}
    save_steps(tmp_path, 8, 12)  # the run passes the damaged ones
    assert steps_kept(tmp_path) == [8, *damaged[1:], 12]
    save_steps(tmp_path, 13)
    assert steps_kept(tmp_path) == [12, 13]


def test_an_intact_checkpoint_below_damaged_ones_is_kept_by_a_save(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "step_000000002.pt").write_bytes(b"damaged while the run goes on")
    save_steps(tmp_path, 3)
    assert steps_kept(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("operation", ["symlink_to", "replace"])
def test_a_save_killed_before_its_link_is_the_last_one_after_a_restart(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved_twice(tmp_path)
    done = getattr(Path, operation)

    def killed(self: Path, *args: Any) -> Any:
        if self.name == "last.tmp":
            raise KeyboardInterrupt  # stands for SIGKILL: nothing here catches it
        return done(self, *args)

    monkeypatch.setattr(Path, operation, killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, {"format": checkpoint.PRETRAIN, "model": {}, "position": {"step": 3}})
    monkeypatch.undo()
    last = path.with_name("last.pt")
    assert checkpoint.load(last)["position"] == {"step": 2}
    checkpoint.finish_save(tmp_path)
    assert checkpoint.load(last)["position"] == {"step": 3}
    last.unlink()  # as after the first save of all
    checkpoint.finish_save(tmp_path)
    assert checkpoint.load(last)["position"] == {"step": 3}
    assert not list(path.parent.glob("*.tmp"))


def test_a_folder_that_tensorboard_cannot_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"run\xff")
    with pytest.raises(UserError, match="TensorBoard needs a path that is UTF-8"):
        open_run(folder, get_defaults(), resume=False)
    assert not folder.exists()


def test_a_file_system_without_symbolic_links_is_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")  # as Linux answers on exFAT

    checkpoint.finish_save(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Path, "symlink_to", refused)
    with pytest.raises(UserError, match=r"this file system has no symbolic links .* another file system"):
        checkpoint.finish_save(tmp_path)


def test_full_disk_says_so_and_keeps_the_checkpoints(tmp_path: Path, files_up_to: Callable) -> None:
    path = saved_twice(tmp_path)
    state = {"format": checkpoint.PRETRAIN, "model": {"w": torch.zeros(5000)}, "position": {"step": 3}}
    message = r"cannot save .*step_000000003.pt: .*File too large.* MB free"
    with files_up_to(16384), pytest.raises(UserError, match=message):
        checkpoint.save(tmp_path, state)
    assert checkpoint.load_newest(tmp_path)["position"] == {"step": 2}  # type: ignore[index]
    assert not list(path.parent.glob("*3*"))


def test_read_only_folder_says_so_and_keeps_the_checkpoints() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        run.chmod(0o755)
        path = saved_twice(run)
        path.parent.chmod(0o555)
        root = os.geteuid() == 0
        if root:  # whom no permission stops
            os.seteuid(65534)
        try:
            with pytest.raises(UserError, match=r"cannot save .*Permission denied"):
                checkpoint.save(run, {"format": checkpoint.PRETRAIN, "position": {"step": 3}})
        finally:
            if root:
                os.seteuid(0)
        path.parent.chmod(0o755)
        assert checkpoint.load_newest(run)["position"] == {"step": 2}  # type: ignore[index]


def test_what_is_read_back_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_twice(tmp_path)
    monkeypatch.setattr(files, "sha256_of", lambda path: "of something else")
    with pytest.raises(UserError, match="the file read back is not what was written"):
        checkpoint.save(tmp_path, {"format": checkpoint.PRETRAIN, "position": {"step": 3}})
    monkeypatch.undo()
    assert checkpoint.load_newest(tmp_path)["position"] == {"step": 2}  # type: ignore[index]


def living_children() -> set[str]:
    """Process ids of this process's children that have not ended."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    states = [Path(f"/proc/{child}/stat") for child in children]
    return {path.parent.name for path in states if path.is_file() and " Z " not in path.read_text()}


class Treacherous(ArraySource):
    """Images of which the sixth does something bad to the process that reads it."""

    deed: Callable[[], Any]

    def open(self, index: int) -> OpenImage:
        if index == 5:
            type(self).deed()
        return super().open(index)

    def name(self, index: int) -> str:
        return f"picture {index}"


def refused(reason: str) -> None:
    """As torch refuses memory for a batch where /dev/shm is full."""
    raise RuntimeError(f"unable to allocate shared memory(shm) for file {reason}")


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        pytest.param(
            lambda: time.sleep(60),
            r"loader worker \d \(process \d+\), at picture 5 .* hangs: no batch came for 2 s",
            marks=pytest.mark.slow,
        ),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"loader worker \d \(process \d+\), at picture 5 .* has died"),
        (lambda: os._exit(3), r"loader worker \d \(process \d+\), at picture 5 .* has died"),
        (lambda: refused("</torch_7_1>: No space left on device (28)"), r"no room in shared memory"),
    ],
    ids=["hangs", "is killed", "exits", "has no shared memory"],
)
def test_worker_that_hangs_or_dies_is_named(deed: Callable, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Treacherous, "deed", staticmethod(deed), raising=False)
    source = Treacherous(np.zeros((8, 8, 8, 3), np.uint8), [0] * 8, ["x"])
    batches = SequentialBatches(np.arange(8), 2)
    loader = build_loader(ViewDataset(source, 8, []), batches, 2, torch.device("cpu"), timeout=2)
    started, before = time.monotonic(), living_children()
    with pytest.raises(UserError, match=said):
        list(read_batches(loader))
    assert time.monotonic() - started < 30
    deadline = time.monotonic() + 20
    while (left := living_children() - before) and time.monotonic() < deadline:
        time.sleep(0.1)  # a terminated process takes a while to go on a busy machine
    assert not left  # no worker is left behind


def test_a_bus_error_is_a_lack_of_shared_memory() -> None:
    said = (
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of"
    )
    with pytest.raises(UserError, match="no room in shared memory"), report_dead_workers():
        raise RuntimeError(f"{said} shared memory. Please try to raise your shared memory limit.")


def test_a_worker_that_dies_while_the_network_computes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch notices it in a signal handler, which raises in whatever line is running."""
    monkeypatch.setattr(Treacherous, "deed", staticmethod(lambda: time.sleep(60)), raising=False)
    source = Treacherous(np.zeros((8, 8, 8, 3), np.uint8), [0] * 8, ["x"])
    loader = build_loader(ViewDataset(source, 8, []), SequentialBatches(np.arange(8), 2), 1, torch.device("cpu"), 60)

    def compute() -> None:
        before = living_children()
        batches = read_batches(loader)
        next(batches)
        (worker,) = living_children() - before
        os.kill(int(worker), signal.SIGKILL)
        for _ in range(1000):
            time.sleep(0.01)  # stands for the network

    with pytest.raises(UserError, match=r"loader worker.* has died; the usual reason"), report_dead_workers():
        compute()
