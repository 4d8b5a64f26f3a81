"""Saving and finding checkpoints, whatever happens to the process and to the files."""

import errno
import logging
import os
import pathlib
import pickle

import pytest
import torch

pytest.importorskip("detectron2")

from detection import train_net
from detection.training import checkpoints
from detection.training.checkpoints import SafeCheckpointer
from foundation import files
from foundation.errors import UserError


class Killed(BaseException):
    """What ends a process at that very line, with nothing cleaned up."""


@pytest.fixture
def saver(tmp_path):
    """Gives a function that saves a model with a certain weight."""
    model = torch.nn.Linear(1, 1)
    checkpointer = SafeCheckpointer(model, str(tmp_path), keep=2)

    def save(name, weight):
        torch.nn.init.constant_(model.weight, weight)
        checkpointer.save(name, iteration=int(weight))

    return save


def weight_of(path):
    return torch.load(path, weights_only=True)["model"]["weight"].item()


def newest(folder):
    return checkpoints.newest_intact(folder).name


def test_the_newest_two_stay_and_the_final_one(saver, tmp_path):
    for number in range(4):
        saver(f"model_{number:07}", number)
    saver("model_final", 3)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("model_0000002.pth", "model_0000002.sha256", "model_0000003.pth", "model_0000003.sha256"),
        *("model_final.pth", "model_final.sha256", "last_checkpoint"),
    }
    assert newest(tmp_path) == "model_final.pth"
    assert weight_of(tmp_path / "model_0000002.pth") == 2


def test_no_number_to_keep_keeps_all(tmp_path):
    checkpointer = SafeCheckpointer(torch.nn.Linear(1, 1), str(tmp_path), keep=0)
    for number in range(5):
        checkpointer.save(f"model_{number:07}")
    assert len(list(tmp_path.glob("*.pth"))) == 5


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, empty, lambda path: path.unlink()])
def test_a_damaged_checkpoint_is_passed_over(damage, saver, tmp_path, caplog):
    saver("model_0000000", 0)
    saver("model_0000001", 1)
    damage(tmp_path / "model_0000001.pth")
    logging.getLogger("detection").propagate = True
    assert newest(tmp_path) == "model_0000000.pth"
    if (tmp_path / "model_0000001.pth").exists():
        assert "model_0000001.pth is damaged (its content does not match its sha256)" in caplog.text


@pytest.mark.parametrize("damage", [cut, empty])
def test_without_a_digest_a_checkpoint_counts_if_it_can_be_read(damage, saver, tmp_path):
    saver("model_0000000", 0)
    saver("model_0000001", 1)
    (tmp_path / "model_0000001.sha256").unlink()
    assert newest(tmp_path) == "model_0000001.pth"
    damage(tmp_path / "model_0000001.pth")
    assert newest(tmp_path) == "model_0000000.pth"


def test_if_all_are_damaged_training_does_not_begin_anew(saver, tmp_path):
    assert checkpoints.newest_intact(tmp_path) is None
    saver("model_0000000", 0)
    saver("model_0000001", 1)
    for path in tmp_path.glob("*.pth"):
        flip(path)
    with pytest.raises(UserError, match="holds no intact checkpoint: move the folder away to start again"):
        checkpoints.newest_intact(tmp_path)


def test_an_empty_tag_is_no_loss(saver, tmp_path):
    saver("model_0000000", 0)
    saver("model_0000001", 1)
    empty(tmp_path / "last_checkpoint")
    assert newest(tmp_path) == "model_0000001.pth"
    (tmp_path / "last_checkpoint").unlink()
    assert newest(tmp_path) == "model_0000001.pth"


def test_the_newest_is_found_by_its_iteration_and_not_by_the_tag(saver, tmp_path):
    """A process that is killed between a checkpoint and its tag leaves the name of an older one."""
    saver("model_0000001", 1)
    saver("model_final", 1)
    tag = tmp_path / "last_checkpoint"
    for name in ("model_final.pth", "model_0000001.pth"):  # of one iteration
        tag.write_text(name)
        assert newest(tmp_path) == name
    saver("model_0000003", 3)  # of a run that was made longer
    tag.write_text("model_final.pth")
    assert newest(tmp_path) == "model_0000003.pth"
    saver("model_final", 4)
    tag.write_text("model_0000003.pth")
    assert newest(tmp_path) == "model_final.pth"
    cut(tmp_path / "model_final.pth")
    assert newest(tmp_path) == "model_0000003.pth"


@pytest.mark.parametrize("name", ["model_0000001", "model_0000000"], ids=["a new file", "the same file again"])
def test_killed_at_any_moment_of_a_save(name, saver, tmp_path, monkeypatch):
    """A process is killed at the first, second, ... call to the system of a save; then the run is continued."""
    calls = {"left": 0}

    def counted(call):
        def wrapped(*arguments, **options):
            if calls["left"] == 0:
                raise Killed
            calls["left"] -= 1
            return call(*arguments, **options)

        return wrapped

    saver("model_0000000", 7)
    for owner, call in ((os, "replace"), (os, "fsync"), (type(tmp_path), "open"), (type(tmp_path), "unlink")):
        monkeypatch.setattr(owner, call, counted(getattr(owner, call)))
    kills = 0
    while True:
        calls["left"] = kills
        try:
            saver(name, 8)
            break
        except Killed:
            kills += 1
        calls["left"] = -1
        found = checkpoints.newest_intact(tmp_path)
        assert weight_of(found) in (7, 8)
        assert checkpoints.damage(found) is None
    assert kills > 8
    calls["left"] = -1
    assert weight_of(checkpoints.newest_intact(tmp_path)) == 8


def test_a_full_disk_is_an_error_and_the_earlier_checkpoint_stays(saver, tmp_path):
    saver("model_0000000", 0)
    (tmp_path / "model_0000001.pth.tmp").symlink_to("/dev/full")
    said = r"model_000000\d.pth cannot be saved: No space left on device \(\d+ MB free, 1 MB needed\); "
    with pytest.raises(UserError, match=f"{said}earlier checkpoints are untouched"):
        saver("model_0000001", 1)
    assert newest(tmp_path) == "model_0000000.pth"
    assert not list(tmp_path.glob("*.tmp"))
    for each in tmp_path.iterdir():
        each.unlink()
    (tmp_path / "model_0000000.pth.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"{said}there is no checkpoint before it: make room, and begin again"):
        saver("model_0000000", 0)


def test_what_was_not_written_as_meant_is_an_error(saver, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "sha256_of", lambda path: "of something else")
    with pytest.raises(UserError, match="the file read back is not what was written"):
        saver("model_0000000", 0)
    assert not checkpoints.exists(tmp_path)


def test_the_final_checkpoint_is_a_link_to_the_numbered_one_of_its_iteration(saver, tmp_path, monkeypatch):
    saver("model_0000003", 3)
    saver("model_final", 3)
    numbered, final = tmp_path / "model_0000003.pth", tmp_path / "model_final.pth"
    assert final.samefile(numbered)
    assert checkpoints.damage(final) is None
    saver("model_0000004", 4)
    saver("model_0000005", 5)
    assert not numbered.exists()
    assert weight_of(final) == 3

    def unsupported(source, target):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", unsupported)
    saver("model_final", 5)
    assert weight_of(final) == 5
    assert final.stat().st_nlink == 1


def test_rotation_removes_its_own_old_files_only(saver, tmp_path):
    own = ["model_best.pth", "model_keep.pth", "model_0000000_good.pth", "model_7.pth", "other_0000000.pth"]
    for name in own:
        (tmp_path / name).write_bytes(b"the user's")
    for number in range(4):
        saver(f"model_{number:07}", number)
    there = {path.name for path in tmp_path.glob("*.pth")}
    assert there == {*own, "model_0000002.pth", "model_0000003.pth"}


def test_rotation_does_not_count_damaged_files(tmp_path):
    """Two damaged newer checkpoints above an intact one: the intact one is what a run can be resumed from."""
    model = torch.nn.Linear(1, 1)
    every = SafeCheckpointer(model, str(tmp_path), keep=0)
    for number in (0, 1, 7, 8):
        every.save(f"model_{number:07}", iteration=number)
    for number in (7, 8):
        flip(tmp_path / f"model_{number:07}.pth")
    SafeCheckpointer(model, str(tmp_path), keep=2).save("model_0000002", iteration=2)
    there = {path.name for path in tmp_path.glob("*.pth")}
    assert there == {f"model_{number:07}.pth" for number in (1, 2, 7, 8)}
    assert newest(tmp_path) == "model_0000002.pth"


class Program:
    """What a pickle can make of itself: a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize(
    "name", ["x.pkl", "../x.pkl", "/{}/x.pkl", "x.pth", "../model_0000001.pth", "model_0000001.pth"]
)
@pytest.mark.parametrize("digest", [True, False])
def test_a_run_folder_of_unknown_origin_runs_no_code(name, digest, tiny_overrides, tmp_path):
    folder, trace = tmp_path / "run", tmp_path / "code has run"
    folder.mkdir()
    name = name.format(tmp_path)
    path = folder / name
    path.write_bytes(pickle.dumps({"model": Program(trace)}))
    if digest:
        path.with_suffix(".sha256").write_text(files.sha256_of(path))
    (folder / "last_checkpoint").write_text(name)
    where = ["--config", "shapes_R18_FPN", "--num-gpus", "0", "--output", str(folder), "--resume"]
    with pytest.raises(UserError, match=r"holds no intact checkpoint|is not a checkpoint"):
        train_net.main([*where, *tiny_overrides])
    assert not trace.exists()


def test_a_checkpoint_of_another_program_is_refused_by_its_name(saver, tmp_path):
    checkpoints.write(tmp_path / "model_0000000.pth", {"model": {"weight": torch.zeros(2, 2)}, "iteration": 0})
    with pytest.raises(UserError, match=r"model_0000000\.pth is not a checkpoint of this run"):
        SafeCheckpointer(torch.nn.Linear(1, 1), str(tmp_path), keep=2).resume(tmp_path / "model_0000000.pth")


def test_drafts_of_killed_processes_are_removed(tmp_path):
    drafts = ["model_final.pth.new", "model_0000003.pth.tmp", "model_best.pth.tmp", "model_0000003.sha256.tmp"]
    for name in [*drafts, "mine.tmp", "model_0000003.pth"]:
        (tmp_path / name).touch()
    checkpoints.remove_drafts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.tmp", "model_0000003.pth"}
