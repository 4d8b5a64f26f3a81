"""Remote tars as a source of images: equal to those of a folder; when they are fetched, and faults."""

import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from foundation.errors import UserError
from pretrain.batches import read_ahead
from pretrain.batches.draws import Augmentation
from pretrain.batches.loader import build_loader, read_batches
from pretrain.batches.sampler import SequentialBatches, ShuffledBatches
from pretrain.batches.views import ViewDataset
from pretrain.config import build_streaming
from pretrain.evaluation.config import get_linear_defaults
from pretrain.evaluation.features import Pipeline, extract, random_views
from pretrain.evaluation.supervised import training_batches
from pretrain.images.cache import ShardCache
from pretrain.images.labelled import Subset, build_labelled_splits
from pretrain.images.prefetch import Prefetcher
from pretrain.images.shards import Shard
from pretrain.images.sources import UNLABELED, build_source
from pretrain.images.stream import StreamedTars, Streaming
from pretrain.training.schedule import StepRange

CPU = torch.device("cpu")


def test_the_source_is_that_of_the_folder(root: str, folder: Path, site, tmp_path: Path) -> None:
    local = build_source("webdataset", str(folder), "train")
    places = (root.replace("train", "{split}"), f"pipe:cat {folder}/train/train-{{0..5}}.tar #{{split}}")
    for number, place in enumerate((*places, f"{folder}/{{split}}/train-{{0..5}}.tar")):
        streamed = build_source("webdataset", place, "train", streaming=Streaming(str(tmp_path / f"{number}")))
        assert list(streamed.labels) == list(local.labels)
        assert list(streamed.classes) == list(local.classes)
        assert streamed.shards == local.shards == [4] * 6
        assert all(np.array_equal(streamed.open(i).decode(), local.open(i).decode()) for i in range(24))
        assert streamed.name(9).endswith("train-2.tar:1.jpg" if number != 1 else "#train:1.jpg")


def test_a_second_start_asks_for_nothing(root: str, site, gigabytes: Callable[..., float], tmp_path: Path) -> None:
    streaming = Streaming(str(tmp_path / "cache"), gigabytes(4), window=2)
    source = build_source("webdataset", root, "pretrain", streaming=streaming)
    assert [site.count(f"/train-{i}.tar") for i in range(6)] == [1] * 6
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 4
    site.requests.clear()
    again = build_source("webdataset", root, "pretrain", streaming=streaming)
    assert not site.requests
    assert [again.name(i) for i in range(24)] == [source.name(i) for i in range(24)]
    again.open(0).decode()  # one of two that had to go
    assert site.requests == [("/train-0.tar", "")]


def test_an_index_with_numbers_spares_the_first_look(
    root: str, site, tars: dict[str, bytes], write_index: Callable[..., Path], tmp_path: Path
) -> None:
    index = write_index()
    source = build_source("webdataset", str(index), "pretrain", streaming=Streaming(str(tmp_path / "cache")))
    assert {part for _, part in site.requests} == {"bytes=0-0"}  # sizes, and whether all are there
    assert list(source.labels) == [UNLABELED] * 24
    assert source.name(9) == f"{site.url}/train-2.tar:image 1"
    source.open(9).decode()
    assert source.name(9) == f"{site.url}/train-2.tar:1.jpg"
    site.requests.clear()
    sized = write_index("sized.json", filesize=len(tars["train-0.tar"]))
    build_source("webdataset", str(sized), "pretrain", streaming=Streaming(str(tmp_path / "cache")))
    assert not site.requests


def test_a_folder_that_is_too_small_is_refused_before_anything_is_fetched(
    root: str, folder: Path, site, gigabytes: Callable[..., float], tmp_path: Path
) -> None:
    def source(room: float, window: int, place: str = root) -> object:
        streaming = Streaming(str(tmp_path / "cache"), gigabytes(room), window, patience=2)
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
    few = Streaming(str(tmp_path / "cache"), gigabytes(2))
    whole = build_source("webdataset", root.replace("train", "{split}"), "train", streaming=few)
    labelled = ViewDataset(Subset(whole, np.arange(20)), 16, [])
    with pytest.raises(UserError, match=r"DATA.WINDOW 0 of 6 tars"):
        build_loader(labelled, ShuffledBatches(20, batch_size=4, seed=0, first_step=0, last_step=5), 0, CPU)
    batches = list(read_batches(build_loader(labelled, SequentialBatches(np.arange(20), 4), 1, CPU)))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(20))


def test_what_comes_next_is_fetched_while_the_present_is_read(
    root: str, site, gigabytes: Callable[..., float], write_index: Callable[..., Path], tmp_path: Path
) -> None:
    index = write_index()
    streaming = Streaming(str(tmp_path / "cache"), gigabytes(3), window=1)
    source = build_source("webdataset", str(index), "pretrain", streaming=streaming)
    loader = build_loader(ViewDataset(source, 16, []), SequentialBatches(np.arange(24), 2), 0, CPU)
    batches = read_batches(loader)
    next(batches)  # of the first tar, which has two
    paths = [source.cache.path(shard) for shard in source.places]
    wait_for(lambda: all(path.exists() for path in paths[:3]))
    assert not any(path.exists() for path in paths[3:])
    for _ in range(1 + 2 + read_ahead.BEHIND):
        next(batches)  # until the first tar is four batches behind, and goes
    wait_for(lambda: paths[3].exists())
    assert not paths[0].exists()
    batches.close()
    assert [site.count(f"/train-{i}.tar") for i in range(4)] == [1] * 4


@pytest.mark.slow
def test_processes_that_share_the_folder_fetch_for_each_other(
    site, tmp_path: Path, make_tar: Callable[..., bytes]
) -> None:
    """Two, in step as in training, with room for two windows; each of them is ten batches long."""
    pixels = io.BytesIO()
    Image.new("RGB", (8, 8)).save(pixels, "PNG")
    content = make_tar([(f"{i}.png", pixels.getvalue()) for i in range(40)])
    site.files |= {f"/{i}.tar": content for i in range(5)}
    lines = [{"url": f"{site.url}/{i}.tar", "nsamples": 40} for i in range(5)]
    (tmp_path / "i.json").write_text(json.dumps({"shardlist": lines}))
    streaming = Streaming(str(tmp_path / "cache"), 2 * len(content) / 1e9, window=1)
    fork = multiprocessing.get_context("fork")
    step = fork.Barrier(2)

    def read(rank: int) -> None:
        source = build_source("webdataset", str(tmp_path / "i.json"), "pretrain", streaming=streaming)
        batches = ShuffledBatches(
            200,
            batch_size=4,
            seed=0,
            first_step=0,
            last_step=100,
            rank=rank,
            world_size=2,
            shards=source.shards,
            window=1,
        )
        for _ in read_batches(build_loader(ViewDataset(source, 8, []), batches, rank, CPU)):
            step.wait(60)

    processes = [fork.Process(target=read, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    # Two epochs of five tars; each by itself would fetch 20. Some come twice, where one process is ahead of the other.
    assert 10 <= sum(site.count(f"/{i}.tar") for i in range(5)) <= 15


def test_without_the_process_that_reads_ahead_all_is_the_same(
    root: str, site, gigabytes: Callable[..., float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Prefetcher._start

    def start_and_kill(self: Prefetcher) -> None:
        start(self)
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    monkeypatch.setattr(Prefetcher, "_start", start_and_kill)
    streaming = Streaming(str(tmp_path / "cache"), gigabytes(2), window=1)
    source = build_source("webdataset", root, "pretrain", streaming=streaming)
    loader = build_loader(ViewDataset(source, 16, []), SequentialBatches(np.arange(24), 4), 0, CPU)
    assert sum(len(batch.indices) for batch in read_batches(loader)) == 24


def test_the_process_that_reads_ahead_ends_with_the_one_that_is_killed(root: str, site, tmp_path: Path) -> None:
    site.faults["/train-0.tar"] = ["hang"]
    shards = [Shard(f"{site.url}/train-{i}.tar") for i in range(2)]
    prefetcher = Prefetcher(ShardCache(tmp_path / "cache", 10**6, patience=600), shards)
    told, tell = os.pipe()
    reader = os.fork()
    if reader == 0:
        try:
            prefetcher.want([0, 1])
            os.write(tell, str(prefetcher._process.pid).encode())
            time.sleep(60)
        finally:
            os._exit(0)
    ahead = int(os.read(told, 20))
    wait_for(lambda: site.count("/train-0.tar") == 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(ahead, number)  # as a scheduler does, to all of a job: the others still read
    wait_for(lambda: (tmp_path / "cache").is_dir() and len(list((tmp_path / "cache").glob("*.tar"))) == 1)
    assert running(ahead)
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
    wait_for(lambda: not running(ahead))


def running(process: int) -> bool:
    """Whether a process is more than an entry in the kernel's table."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_tar_that_others_remove_is_fetched_by_the_worker_that_reads_it(
    root: str, site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_features_and_labels_of_a_streamed_set(root: str, folder: Path, site, tmp_path: Path) -> None:
    site.files["/val.json"] = b'{"shardlist": [{"url": "val-0.tar"}]}'
    site.files["/train.json"] = b'{"shardlist": [{"url": "train-{0..5}.tar"}]}'
    encoder, found = nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), []
    pipeline = Pipeline(16, torch.zeros(3), torch.ones(3), 1, CPU)
    config = get_linear_defaults()
    config.DATA.CACHE = str(tmp_path / "cache")
    for place in (str(folder), f"{site.url}/{{split}}.json"):
        train_images, val_images = build_labelled_splits("webdataset", place, build_streaming(config))
        found.append([*extract(encoder, val_images, pipeline, precision="float32")])
        batches = training_batches(24, StepRange(0, 3, 3, 3), 8, seed=1)
        for images, labels in random_views(train_images, pipeline, batches, Augmentation()):
            found[-1] += [images, labels]
    assert len(found[0]) == 8
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 7


def test_an_index_cannot_claim_more_images_than_a_tar_holds(root: str, site, write_index, tmp_path: Path) -> None:
    index = write_index(nsamples=50_000_000)  # of six tars: an order of 300 million images takes 2.4 GB
    with pytest.raises(UserError, match=r"train-0.tar cannot hold 50,000,000 images in \d\d,\d\d\d bytes"):
        build_source("webdataset", str(index), "pretrain", streaming=Streaming(str(tmp_path / "cache"), 1.0))
