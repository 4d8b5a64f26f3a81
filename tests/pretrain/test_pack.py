"""`pretrain/pack.py`: what is in the tars, that it goes on where it stopped, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foundation.signals import INTERRUPTED, STOPPED
from pretrain import pack
from pretrain.images import packing
from pretrain.images.paths import locate
from pretrain.images.sources import UNLABELED, build_source

OPTIONS = ["--side", "32", "--images", "10", "--workers", "0"]


def run(source: Path, target: Path, *more: str) -> None:
    pack.main([str(source), str(target), *OPTIONS, *more])


@pytest.fixture
def packed(photos: Path, tmp_path: Path) -> Path:
    run(photos, tmp_path / "packed")
    return tmp_path / "packed"


def test_splits_labels_and_pixels(packed: Path, photos: Path) -> None:
    for split, tars in (("train", 3), ("val", 1)):
        before, after = (
            build_source("folder", str(photos), split),
            build_source("webdataset", str(packed), split),
        )
        assert len(list((packed / split).glob("*.tar"))) == tars
        assert list(after.labels) == list(before.labels)
        for i in range(len(before)):
            one, other = before.open(i).decode(), after.open(i).decode()
            height, width = one.shape[:2]
            if min(height, width) <= 32:  # the same file
                assert np.array_equal(one, other)
            else:
                assert min(other.shape[:2]) == 32
                assert other.shape[0] / other.shape[1] == pytest.approx(height / width, rel=0.03)
                assert np.abs(packing.resize_to(one, 32).astype(int) - other).mean() < 8  # noise, as JPEG keeps it
    assert (packed / "classes.txt").read_text() == "circle\nsquare\n"
    assert (packed / "train" / "names.tsv").read_text().splitlines()[13] == "000000013\ttrain/square/01.jpg"


def test_the_index_names_the_tars_as_widsindex_does(packed: Path) -> None:
    index = json.loads((packed / "train.json").read_text())
    assert index["wids_version"] == 1
    assert [shard["nsamples"] for shard in index["shardlist"]] == [10, 10, 4]
    sizes = [(packed / shard["url"]).stat().st_size for shard in index["shardlist"]]
    assert [shard["filesize"] for shard in index["shardlist"]] == sizes
    assert len(build_source("webdataset", str(packed / "train.json"), "pretrain")) == 24
    assert locate([str(packed)]) == ("webdataset", str(packed))
    with tarfile.open(packed / "train" / "train-000002.tar") as tar:
        assert tar.getnames()[:2] == ["000000020.jpg", "000000020.cls"]


def test_it_goes_on_where_it_was_interrupted(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(photos / "train" / "circle", flat)
    for path in (photos / "train" / "square").iterdir():
        shutil.copy(path, flat / f"s{path.name}")
    target, whole = tmp_path / "packed", tmp_path / "whole"
    verify, written = packing._verify, []

    def interrupt(tar: Path, labels: list[int]) -> None:
        written.append(tar.name)
        if len(written) == 2:
            raise KeyboardInterrupt
        verify(tar, labels)

    monkeypatch.setattr(packing, "_verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(flat, target)
    assert [path.name for path in target.glob("*.tar")] == ["images-000000.tar"]
    run(flat, target)
    assert written == ["images-000000.new", "images-000001.new", "images-000001.new", "images-000002.new"]
    run(flat, whole)
    for tar in whole.glob("*.tar"):
        assert tar.read_bytes() == (target / tar.name).read_bytes()
    with tarfile.open(target / "images-000000.tar") as tar:
        assert all(name.endswith(".jpg") for name in tar.getnames())  # no labels, so no .cls


def test_it_goes_on_where_it_was_killed_within_the_first_tar(photos: Path, packed: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys; from pretrain import pack; from pretrain.images import packing\n"
        "packing._verify = lambda *_: os._exit(9)\n"
        "pack.main(sys.argv[1:])"
    )
    target = tmp_path / "killed"
    arguments = [str(photos), str(target), *OPTIONS]
    assert subprocess.run([sys.executable, "-c", program, *arguments], check=False).returncode == 9
    assert list(target.rglob("*.new"))
    run(photos, target)
    assert not list(target.rglob("*.new"))
    for tar in packed.rglob("*.tar"):
        assert tar.read_bytes() == (target / tar.relative_to(packed)).read_bytes()


SLOW = """
import sys, time
from pretrain import pack
from pretrain.images import packing
encode = packing.encode
def slow(data, name, form):
    time.sleep(60 if "square" in name else 0)
    return encode(data, name, form)
packing.encode = slow
pack.cli()
"""


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_leaves_what_is_packed_and_no_draft(
    number: signal.Signals, workers: str, packed: Path, photos: Path, tmp_path: Path
) -> None:
    """To all processes, and twice, as by a scheduler or by Ctrl-C in a terminal; in the second of three tars."""
    target, folder = tmp_path / "stopped", tmp_path / "stopped" / "train"
    command = [sys.executable, "-c", SLOW, str(photos), str(target), *OPTIONS, "--workers", workers]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not ((folder / "train-000000.tar").exists() and (folder / "train-000001.new").exists()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for _ in range(2):
            os.killpg(process.pid, number)
            time.sleep(0.1)
        _, said = process.communicate(timeout=20)
    assert process.returncode == (INTERRUPTED if number == signal.SIGINT else STOPPED)
    lines = [line for line in said.decode().splitlines() if "tars are packed" not in line]
    interrupted = ["interrupted"] if number == signal.SIGINT else []
    assert lines == [f"{number.name} received: stopping now; the same command continues", *interrupted]
    assert [path.name for path in target.rglob("*.tar")] == ["train-000000.tar"]
    assert not list(target.rglob("*.new"))
    run(photos, target)
    for tar in packed.rglob("*.tar"):
        assert tar.read_bytes() == (target / tar.relative_to(packed)).read_bytes()


def test_a_signal_when_all_is_packed_is_ignored(
    photos: Path, tmp_path: Path, signal_at_line: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    signal_at_line("4 tars in", signal.SIGTERM)
    run(photos, tmp_path / "packed")
    assert "received" not in capfd.readouterr().err


def test_class_folders_without_splits_keep_their_labels(photos: Path, tmp_path: Path) -> None:
    run(photos / "val", tmp_path / "packed")
    with tarfile.open(tmp_path / "packed" / "images-000000.tar") as tar:
        labels = [tar.extractfile(entry).read() for entry in tar if entry.name.endswith(".cls")]
    assert labels == [b"0"] * 4 + [b"1"] * 4


def test_damaged_images_are_left_out_and_listed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 50), (80 * i, 0, 0)).save(source / f"{i}.png")
    (source / "1.png").write_bytes(b"no image")
    os.mkfifo(source / "pipe.png")  # which nobody writes to
    run(source, tmp_path / "packed")
    after = build_source("webdataset", str(tmp_path / "packed"), "pretrain")
    assert [int(after.open(i).decode()[0, 0, 0]) // 75 for i in range(len(after))] == [0, 2]
    damaged = (tmp_path / "packed" / "damaged.txt").read_text()
    assert damaged == f"{source}/1.png: not an image\n{source}/pipe.png: not a file\n"


def test_names_that_are_not_unicode_and_an_image_too_long_for_a_jpeg(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "packed"
    classes = [source / os.fsdecode(b"cl\xff"), source / "a"]
    for folder in classes:
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 50)).save(folder / "1.png")
    damaged = classes[0] / os.fsdecode(b"\xfe.png")
    damaged.write_bytes(b"")
    Image.new("L", (65501, 1)).save(classes[1] / "strip.png")
    run(source, target)
    assert (target / "classes.txt").read_bytes() == b"a\ncl\xff\n"
    assert (target / "damaged.txt").read_bytes().splitlines() == [
        os.fsencode(f"{classes[1]}/strip.png: a JPEG holds 65500 pixels a side, not 65501; cut it in pieces"),
        os.fsencode(f"{damaged}: empty file"),
    ]
    assert (target / "names.tsv").read_bytes().splitlines()[2] == b"000000002\tcl\xff/1.png"


def test_a_packing_does_not_go_on_with_other_files(photos: Path, tmp_path: Path, error_of: Callable) -> None:
    source, target = tmp_path / "source", tmp_path / "packed"
    shutil.copytree(photos / "train", source)
    run(source, target)
    state = json.loads((target / "packing.json").read_text())
    (source / "circle" / "00.jpg").rename(source / "square" / "99.jpg")  # as many as before, but other classes
    assert "have other names than when" in error_of(
        pack.main, [str(source), str(target), "--side", "32", "--images", "10"]
    )
    del state["names"]  # as earlier versions wrote it
    (target / "packing.json").write_text(json.dumps(state))
    run(source, target)


def test_a_full_disk_is_one_line_and_leaves_no_draft(
    photos: Path, tmp_path: Path, error_of: Callable, files_up_to: Callable
) -> None:
    target = tmp_path / "packed"
    with files_up_to(2000):
        message = error_of(pack.main, [str(photos / "train"), str(target), "--workers", "0"])
    assert "File too large" in message
    assert not list(target.glob("images*"))


def test_a_tar_is_not_held_in_memory(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    (tmp_path / "source").mkdir()
    for i in range(20):
        Image.fromarray(noise).save(tmp_path / "source" / f"{i}.jpg", quality=95)
    pack.main([str(tmp_path / "source"), str(tmp_path / "packed"), "--workers", "0"])
    tar = tmp_path / "packed" / "images-000000.tar"
    tracemalloc.start()
    packing._verify(tar, [UNLABELED] * 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < tar.stat().st_size / 2


def test_several_processes_write_the_same(packed: Path, photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "two", "--workers", "2")
    for tar in packed.rglob("*.tar"):
        assert tar.read_bytes() == (tmp_path / "two" / tar.relative_to(packed)).read_bytes()


def test_what_is_refused(
    packed: Path, photos: Path, tmp_path: Path, error_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "holds another packing" in error_of(pack.main, [str(photos), str(packed), "--side", "64", "--workers", "0"])
    assert "--side must be from 16" in error_of(pack.main, [str(photos), str(packed), "--side", "4"])
    program = (
        "import pathlib, sys; from foundation import locks; locks.hold(pathlib.Path(sys.argv[1])); print(); input()"
    )
    busy = str(tmp_path / "busy")
    command = [sys.executable, "-c", program, busy]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert "another process is running in" in error_of(pack.main, [str(photos), busy])
        other.communicate(b"\n")
    assert "gone is not a folder" in error_of(pack.main, [str(tmp_path / "gone"), str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
    (packed / "packing.json").unlink()
    before = sorted(packed.iterdir())
    assert "is not of a packing; choose a new folder" in error_of(pack.main, [str(photos), str(packed)])
    assert sorted(packed.iterdir()) == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    assert "run holds config.yaml" in error_of(pack.main, [str(photos), str(tmp_path / "run")])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert "no image" in error_of(pack.main, [str(tmp_path / "packed" / "val"), str(tmp_path / "new")])
    monkeypatch.setattr(packing, "encode", lambda data, name, form: data[:200])  # as a bad disk might leave it
    message = error_of(pack.main, [str(photos), str(tmp_path / "bad"), "--workers", "0"])
    assert "does not read back" in message
    assert not list((tmp_path / "bad").rglob("*.tar"))
