"""Tars that are elsewhere are those of a folder: the same images, steps and weights; and what is said of faults."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cli.errors import UserError
from pretrain import build, checkpoint, read_ahead, stream, train
from pretrain.data import UNLABELED, build_source
from pretrain.features import Pipeline, extract
from pretrain.labelled import Subset, build_labelled_splits
from pretrain.loader import SequentialBatches, ShuffledBatches, build_loader, read_batches
from pretrain.prefetch import Prefetcher
from pretrain.stream import StreamedTars, Streaming
from pretrain.supervised import Span, image_batches, training_batches
from pretrain.views import ViewDataset, ViewRecipe

CPU = torch.device("cpu")
TINY = [
    *("DATA.NAME", "webdataset", "DATA.IMAGE_SIZE", "16", "DATA.WORKERS", "0", "DATA.WORKER_TIMEOUT", "20"),
    *("PROJECTOR.DIMS", "[12, 8]", "TRAIN.BATCH_SIZE", "4", "TRAIN.EPOCHS", "2", "TRAIN.PRECISION", "float32"),
    *("LOG.PERIOD", "2", "TRAIN.WARMUP_EPOCHS", "1", "DATA.WINDOW", "1"),
]


def use_tiny_encoder(patch: pytest.MonkeyPatch) -> None:
    def tiny(name: str, stem: str) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    patch.setattr(build, "build_encoder", tiny)
    patch.setattr(build, "feature_dim", lambda name: 8)


@pytest.fixture(autouse=True)
def _tiny_encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_tiny_encoder(monkeypatch)
    logger = logging.getLogger("pretrain")
    before = logger.handlers[:], logger.level
    yield
    logger.handlers[:], logger.level = before


@pytest.fixture(scope="module")
def finished(tars: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tars of a folder."""
    root = tmp_path_factory.mktemp("finished")
    for name, content in tars.items():
        (root / name).write_bytes(content)
    (root / "val-0.tar").unlink()
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_encoder(patch)
        train.main(["--output", str(root / "run"), *TINY, "DATA.ROOT", str(root)])
    return root / "run"


@pytest.fixture
def root(site, tars: dict[str, bytes]) -> str:
    """The six tars of four images, on the server."""
    site.files |= {f"/{name}": content for name, content in tars.items()}
    return f"{site.url}/train-{{0..5}}.tar"


@pytest.fixture
def folder(tars: dict[str, bytes], tmp_path: Path) -> Path:
    """The same, here."""
    for name, content in tars.items():
        (tmp_path / "local" / name.split("-")[0]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name.split("-")[0] / name).write_bytes(content)
    return tmp_path / "local"


def gigabytes(tars: dict[str, bytes], count: float) -> float:
    """Room for so many tars."""
    return count * len(tars["train-0.tar"]) / 1e9


def options(tmp_path: Path, *pairs: object) -> list[str]:
    return ["DATA.CACHE", str(tmp_path / "cache"), *map(str, pairs)]


def assert_same_run(one: Path, two: Path) -> None:
    first, second = (checkpoint.load(run / "checkpoints" / "last.pt") for run in (one, two))
    for part in ("model", "objective"):
        assert all(torch.equal(tensor, second[part][name]) for name, tensor in first[part].items())
    assert first["position"] == second["position"]
    assert record(one) == record(two)


def record(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_share")} for line in lines]


def write_index(path: Path, site, tars: dict[str, bytes], **facts: object) -> Path:
    lines = [{"url": f"{site.url}/train-{i}.tar", "nsamples": 4, **facts} for i in range(6)]
    path.write_text(json.dumps({"shardlist": lines}))
    return path


def test_the_source_is_that_of_the_folder(root: str, folder: Path, site, tmp_path: Path) -> None:
    local = build_source("webdataset", str(folder), "train")
    places = (root.replace("train", "{split}"), f"pipe:cat {folder}/train/train-{{0..5}}.tar #{{split}}")
    for number, place in enumerate((*places, f"{folder}/{{split}}/train-{{0..5}}.tar")):
        streamed = build_source("webdataset", place, "train", streaming=Streaming(str(tmp_path / f"{number}")))
        assert list(streamed.labels) == list(local.labels)
        assert list(streamed.classes) == list(local.classes)
        assert streamed.shards == local.shards == [4] * 6
        assert all(np.array_equal(streamed.read(i), local.read(i)) for i in range(24))
        assert streamed.name(9).endswith("train-2.tar:1.jpg" if number != 1 else "#train:1.jpg")


def test_a_second_start_asks_for_nothing(root: str, site, tars: dict[str, bytes], tmp_path: Path) -> None:
    streaming = Streaming(str(tmp_path / "cache"), gigabytes(tars, 4), window=2)
    source = build_source("webdataset", root, "pretrain", streaming=streaming)
    assert [site.count(f"/train-{i}.tar") for i in range(6)] == [1] * 6
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 4
    site.requests.clear()
    again = build_source("webdataset", root, "pretrain", streaming=streaming)
    assert not site.requests
    assert [again.name(i) for i in range(24)] == [source.name(i) for i in range(24)]
    again.read(0)  # one of two that had to go
    assert site.requests == [("/train-0.tar", "")]


def test_an_index_with_numbers_spares_the_first_look(root: str, site, tars: dict[str, bytes], tmp_path: Path) -> None:
    index = write_index(tmp_path / "train.json", site, tars)
    source = build_source("webdataset", str(index), "pretrain", streaming=Streaming(str(tmp_path / "cache")))
    assert {part for _, part in site.requests} == {"bytes=0-0"}  # sizes, and whether all are there
    assert list(source.labels) == [UNLABELED] * 24
    assert source.name(9) == f"{site.url}/train-2.tar:image 1"
    source.read(9)
    assert source.name(9) == f"{site.url}/train-2.tar:1.jpg"
    site.requests.clear()
    sized = write_index(tmp_path / "sized.json", site, tars, filesize=len(tars["train-0.tar"]))
    build_source("webdataset", str(sized), "pretrain", streaming=Streaming(str(tmp_path / "cache")))
    assert not site.requests


@pytest.mark.parametrize(("workers", "room"), [(0, 2), (2, 4)])
def test_a_streamed_run_is_the_run_on_local_tars(
    workers: int, room: int, finished: Path, root: str, site, tars: dict[str, bytes], tmp_path: Path
) -> None:
    """Weights, covariance and each step's values; in a folder that holds no more than it must."""
    index = write_index(tmp_path / "train.json", site, tars)
    place = options(tmp_path, "DATA.CACHE_GB", gigabytes(tars, room), "DATA.ROOT", index, "DATA.WORKERS", workers)
    train.main(["--output", str(tmp_path / "run"), *TINY, *place])
    assert_same_run(tmp_path / "run", finished)
    held = [path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")]
    assert sum(held) <= room * len(tars["train-0.tar"])


def test_a_server_that_fails_in_the_middle_ends_the_run_with_its_checkpoint(
    finished: Path, root: str, site, tars: dict[str, bytes], tmp_path: Path, error_of: Callable
) -> None:
    index = write_index(tmp_path / "train.json", site, tars)
    place = options(tmp_path, "DATA.CACHE_GB", gigabytes(tars, 2), "DATA.ROOT", index, "DATA.WORKER_TIMEOUT", 3)
    run = ["--output", str(tmp_path / "run"), "--resume", *TINY, *place, "CHECKPOINT.STEPS", "3"]
    last = tars_of_first_epoch()[-1]
    site.faults[f"/train-{last}.tar"] = ["", "503"]  # it is there when asked for its size
    message = error_of(train.main, run)
    assert message == (
        f"{site.url}/train-{last}.tar cannot be fetched: the server answers 503 Service Unavailable, after 8 attempts"
    )
    position = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["position"]
    assert position["step"] == 3
    site.faults.clear()
    train.main([*run, "DATA.WORKERS", "1"])
    assert_same_run(tmp_path / "run", finished)


def tars_of_first_epoch() -> list[int]:
    """The tars of the first epoch with seed 0 and a window of one, in order."""
    batches = ShuffledBatches(24, batch_size=4, seed=0, first_step=0, last_step=6, shards=[4] * 6, window=1)
    return [batch[0][1] // 4 for batch in batches]


@pytest.mark.parametrize("with_index", [False, True])
def test_a_tar_that_is_missing_is_named_before_anything_begins(
    with_index: bool, root: str, site, tars: dict[str, bytes], tmp_path: Path, error_of: Callable
) -> None:
    place = str(write_index(tmp_path / "train.json", site, tars)) if with_index else root
    del site.files["/train-4.tar"]
    message = error_of(train.main, ["--output", str(tmp_path / "run"), *TINY, *options(tmp_path, "DATA.ROOT", place)])
    assert message == f"{site.url}/train-4.tar cannot be fetched: the server answers 404 Not Found; check DATA.ROOT"
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_a_folder_that_is_too_small_is_refused_before_anything_is_fetched(
    root: str, folder: Path, site, tars: dict[str, bytes], tmp_path: Path
) -> None:
    def source(room: float, window: int, place: str = root) -> object:
        streaming = Streaming(str(tmp_path / "cache"), gigabytes(tars, room), window, patience=2)
        return build_source("webdataset", place, "pretrain", streaming=streaming)

    with pytest.raises(UserError, match=r"DATA.WINDOW 0 of 6 tars\); raise it, or .* DATA.WINDOW 2"):
        source(5.9, 0)
    with pytest.raises(UserError, match=r"DATA.WINDOW 3 of 6 tars\); raise it, or .* DATA.WINDOW 1"):
        source(3.9, 3)
    with pytest.raises(UserError, match=r"DATA.WINDOW 1 of 6 tars\); raise it, no DATA.WINDOW fits it"):
        source(1.9, 1)
    assert not any(site.count(f"/train-{i}.tar") for i in range(6))
    with pytest.raises(UserError, match=r"DATA.WINDOW 0 of 6 tars\); raise it, or .* DATA.WINDOW 2"):
        source(4, 0, f"pipe:cat {folder}/train/train-{{0..5}}.tar")  # of commands it is known afterwards
    source(4, 2)
    # The order of training with labels has no windows; one image after the other may be read from any folder.
    few = Streaming(str(tmp_path / "cache"), gigabytes(tars, 2))
    whole = build_source("webdataset", root.replace("train", "{split}"), "train", streaming=few)
    labelled = ViewDataset(Subset(whole, np.arange(20)), 16, [])
    with pytest.raises(UserError, match=r"DATA.WINDOW 0 of 6 tars"):
        build_loader(labelled, ShuffledBatches(20, batch_size=4, seed=0, first_step=0, last_step=5), 0, CPU)
    batches = list(read_batches(build_loader(labelled, SequentialBatches(np.arange(20), 4), 1, CPU)))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(20))


def test_what_comes_next_is_fetched_while_the_present_is_read(
    root: str, site, tars: dict[str, bytes], tmp_path: Path
) -> None:
    index = write_index(tmp_path / "train.json", site, tars)
    streaming = Streaming(str(tmp_path / "cache"), gigabytes(tars, 3), window=1)
    source = build_source("webdataset", str(index), "pretrain", streaming=streaming)
    loader = build_loader(ViewDataset(source, 16, []), SequentialBatches(np.arange(24), 2), 0, CPU)
    batches = read_batches(loader)
    next(batches)  # of the first tar, which has two
    paths = [source.cache.path(shard) for shard in source.places]
    end = time.monotonic() + 20
    while not all(path.exists() for path in paths[:3]):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert not any(path.exists() for path in paths[3:])
    for _ in range(1 + 2 + read_ahead.BEHIND):
        next(batches)  # until the first tar is four batches behind, and goes
    while not paths[3].exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert not paths[0].exists()
    batches.close()
    assert [site.count(f"/train-{i}.tar") for i in range(4)] == [1] * 4


def test_without_the_process_that_reads_ahead_all_is_the_same(
    root: str, site, tars: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Prefetcher._start

    def start_and_kill(self: Prefetcher) -> None:
        start(self)
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    monkeypatch.setattr(Prefetcher, "_start", start_and_kill)
    streaming = Streaming(str(tmp_path / "cache"), gigabytes(tars, 2), window=1)
    source = build_source("webdataset", root, "pretrain", streaming=streaming)
    loader = build_loader(ViewDataset(source, 16, []), SequentialBatches(np.arange(24), 4), 0, CPU)
    assert sum(len(batch.indices) for batch in read_batches(loader)) == 24


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_tar_that_others_remove_is_fetched_by_the_worker_that_reads_it(
    root: str, site, tars: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build_source("webdataset", root, "pretrain", streaming=Streaming(str(tmp_path / "cache")))
    assert isinstance(source, StreamedTars)
    monkeypatch.setattr(read_ahead.ReadAhead, "advance", lambda self: None)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    loader = build_loader(ViewDataset(source, 16, []), SequentialBatches(np.arange(24), 4), 2, CPU)
    assert sum(len(batch.indices) for batch in read_batches(loader)) == 24
    assert [site.count(f"/train-{i}.tar") for i in range(6)] == [2] * 6
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    del site.files["/train-3.tar"]
    loader = build_loader(ViewDataset(source, 16, []), SequentialBatches(np.arange(24), 4), 2, CPU)
    with pytest.raises(UserError) as caught:
        list(read_batches(loader))
    expected = f"{site.url}/train-3.tar cannot be fetched: the server answers 404 Not Found; check DATA.ROOT"
    assert str(caught.value) == expected


def test_check_data_and_dry_run(
    root: str, site, tars: dict[str, bytes], tmp_path: Path, make_tar: Callable, capsys, error_of: Callable
) -> None:
    place = options(tmp_path, "DATA.CACHE_GB", gigabytes(tars, 2), "DATA.WINDOW", 1, "DATA.ROOT", root)
    train.main(["--dry-run", *TINY, *place])
    assert "6 steps; 0 of 24 images are left out" in capsys.readouterr().out
    train.main(["--check-data", *TINY, *place, "DATA.WORKERS", "2"])
    assert "all 24 images can be read" in capsys.readouterr().out
    site.files["/train-1.tar"] = make_tar([("a.jpg", b"<html>"), ("a.cls", b"0")])
    message = error_of(train.main, ["--check-data", *TINY, *place, "DATA.CACHE", str(tmp_path / "fresh")])
    assert message == "1 of 21 images cannot be read; they are listed above"
    assert f"{site.url}/train-1.tar:a.jpg: not an image" in capsys.readouterr().out


def test_features_and_labels_of_a_streamed_set(
    root: str, folder: Path, site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CACHE", tmp_path / "cache")
    site.files["/val.json"] = b'{"shardlist": [{"url": "val-0.tar"}]}'
    site.files["/train.json"] = b'{"shardlist": [{"url": "train-{0..5}.tar"}]}'
    encoder, found = nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), []
    pipeline = Pipeline(16, torch.zeros(3), torch.ones(3), 1, CPU)
    for place in (str(folder), f"{site.url}/{{split}}.json"):
        train_images, val_images = build_labelled_splits("webdataset", place)
        found.append([*extract(encoder, val_images, pipeline, precision="float32")])
        batches = training_batches(24, Span(0, 3, 3), 8, seed=1)
        for images, labels in image_batches(train_images, pipeline, batches, ViewRecipe()):
            found[-1] += [images, labels]
    assert len(found[0]) == 8
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["DATA.ROOT", "https://host/{split}-{3..1}.tar"], r"\{3..1\} in .* does not go from"),
        (["DATA.ROOT", "gs://bucket/a-{0..3}.tar"], "gs:// is not fetched"),
        (["DATA.ROOT", "https://host/a.tar.gz"], "is compressed"),
        (["DATA.ROOT", "/none/train.json"], "/none/train.json cannot be read"),
        (["DATA.ROOT", "/none/{0..3}.tar"], "/none/0.tar does not exist"),
        (["DATA.ROOT", "pipe:cat x", "DATA.CACHE", "/proc/none"], "cannot write /proc/none: .*set DATA.CACHE"),
        (["DATA.NAME", "folder", "DATA.WINDOW", "2"], "DATA.WINDOW is a number of tars, and folder has none"),
        (["DATA.ROOT", "pipe:cat x", "DATA.CACHE_GB", "0"], "DATA.CACHE_GB must be at least"),
    ],
)
def test_wrong_values_are_one_line(pairs: list[str], words: str, tmp_path: Path, error_of: Callable) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=words):
        train.main(["--dry-run", *TINY, *pairs])
    assert time.monotonic() - started < 3
    assert os.listdir(tmp_path) == []
