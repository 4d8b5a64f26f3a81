"""The cache folder: whole or not at all, made once, and never something else by mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from foundation.errors import UserError
from shapes import Recipe, ensure_rendered
from shapes.cache import default_root
from shapes.recipe import VERSION


@pytest.fixture
def copied(rendered, tmp_path):
    return shutil.copytree(rendered, tmp_path / "copy")


def test_a_finished_folder_is_returned_untouched_and_at_once(rendered, small):
    before = (rendered / "dataset.json").stat().st_mtime_ns
    start = time.perf_counter()
    assert ensure_rendered(rendered, recipe=small) == rendered
    assert time.perf_counter() - start < 0.1
    assert (rendered / "dataset.json").stat().st_mtime_ns == before


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CORINFOMAX_CACHE", str(tmp_path))
    assert default_root(0) == tmp_path / f"shapes-{VERSION}"
    assert default_root(3) == tmp_path / f"shapes-{VERSION}-seed3"
    monkeypatch.delenv("CORINFOMAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root(0) == tmp_path / ".cache" / "corinfomax" / f"shapes-{VERSION}"


def test_an_empty_folder_is_filled(small, tmp_path):
    (tmp_path / "empty").mkdir()
    recipe = replace(small, unlabeled=1, scenes_train=1, scenes_val=1, objects_train=1)
    root = ensure_rendered(tmp_path / "empty", processes=1, progress=False, recipe=recipe)
    assert (root / "dataset.json").is_file()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda root: (root / "dataset.json").unlink(), "dataset.json"),
        (lambda root: (root / "dataset.json").write_text("{"), "dataset.json"),
        (lambda root: (root / "dataset.json").write_text("[1]"), "dataset.json"),
        (lambda root: (root / "unlabeled/000003.jpg").unlink(), "unlabeled holds 5 pictures instead of 6"),
        (lambda root: shutil.rmtree(root / "objects/val/star"), "objects/val holds 7 pictures instead of 8"),
        (lambda root: (root / "scenes/annotations/instances_val.json").unlink(), "instances_val.json"),
    ],
)
def test_an_incomplete_folder_is_an_error_that_names_it(copied, small, spoil, named):
    spoil(copied)
    with pytest.raises(UserError, match=named) as error:
        ensure_rendered(copied, recipe=small)
    assert str(copied) in str(error.value)
    assert copied.is_dir(), "nothing of the user's is deleted"


def test_another_version_seed_or_recipe_is_an_error(copied, small):
    with pytest.raises(UserError, match="seed is 0, not 1"):
        ensure_rendered(copied, seed=1, recipe=small)
    with pytest.raises(UserError, match="recipe"):
        ensure_rendered(copied, recipe=replace(small, scene_objects=2))
    card = json.loads((copied / "dataset.json").read_text())
    (copied / "dataset.json").write_text(json.dumps({**card, "version": "0"}))
    with pytest.raises(UserError, match="version is '0'"):
        ensure_rendered(copied, recipe=small)


def test_a_file_in_its_place_is_an_error(tmp_path, small):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        ensure_rendered(tmp_path / "file", recipe=small)
    with pytest.raises(UserError, match=r"cannot be written.*; name a folder with 100 MB"):
        ensure_rendered(tmp_path / "file" / "below", recipe=small)


RENDER = """
from pathlib import Path
from shapes import Recipe, ensure_rendered
recipe = Recipe(unlabeled={unlabeled}, objects_train=1, objects_val=1, scenes_train=1, scenes_val=1,
                object_side=32, scene_sides=(48, 48))
print(ensure_rendered(Path({root!r}), processes={processes}, progress=False, recipe=recipe))
"""


def _start(root, unlabeled, processes=1):
    code = RENDER.format(root=str(root), unlabeled=unlabeled, processes=processes)
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def _wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_path_that_the_file_system_refuses_is_an_error(tmp_path, small):
    with pytest.raises(UserError, match=r"cannot be written to .*: File name too long; name a folder"):
        ensure_rendered(tmp_path / ("a" * 300), recipe=small)


def test_a_killed_rendering_leaves_nothing_and_the_next_one_cleans_up(tmp_path):
    root = tmp_path / "set"
    process = _start(root, unlabeled=100_000, processes=2)
    try:
        _wait_until(lambda: any(tmp_path.glob(".set.partial-*/*/unlabeled/*.jpg")))
        os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must notice
    finally:
        process.kill()
        process.wait()
    assert not root.exists()
    recipe = Recipe(1, 1, 1, 1, 1, object_side=32, scene_sides=(48, 48))
    ensure_rendered(root, processes=1, progress=False, recipe=recipe)
    assert not list(tmp_path.glob(".set.partial-*"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["set"]


def test_processes_that_call_at_once_share_one_rendering(tmp_path):
    root = tmp_path / "set"
    processes = [_start(root, unlabeled=30) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert len(list((root / "unlabeled").glob("*.jpg"))) == 30
    assert not list(tmp_path.glob(".set.partial-*"))
