"""Runs on remote tars: the same weights as on local ones, and the messages for faults and wrong values."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from foundation.errors import UserError
from pretrain import train
from pretrain.batches.sampler import ShuffledBatches
from pretrain.images import stream
from pretrain.runs import checkpoint
from tests.pretrain.tiny_encoder import use_tiny_encoder

TINY = [
    *("DATA.NAME", "webdataset", "DATA.IMAGE_SIZE", "16", "DATA.WORKERS", "0", "DATA.WORKER_TIMEOUT", "20"),
    *("PROJECTOR.DIMS", "[12, 8]", "TRAIN.BATCH_SIZE", "4", "TRAIN.EPOCHS", "2", "TRAIN.PRECISION", "float32"),
    *("LOG.PERIOD", "2", "TRAIN.WARMUP_EPOCHS", "1", "DATA.WINDOW", "1"),
]


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


@pytest.mark.parametrize(("workers", "room"), [(0, 2), (2, 4)])
def test_a_streamed_run_is_the_run_on_local_tars(
    workers: int,
    room: int,
    finished: Path,
    root: str,
    site,
    tars: dict[str, bytes],
    gigabytes: Callable[..., float],
    write_index: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Weights, covariance and each step's values; in a folder that holds no more than it must."""
    index = write_index()
    place = options(tmp_path, "DATA.CACHE_GB", gigabytes(room), "DATA.ROOT", index, "DATA.WORKERS", workers)
    train.main(["--output", str(tmp_path / "run"), *TINY, *place])
    assert_same_run(tmp_path / "run", finished)
    held = [path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")]
    assert sum(held) <= room * len(tars["train-0.tar"])


def test_a_server_that_fails_in_the_middle_ends_the_run_with_its_checkpoint(
    finished: Path,
    root: str,
    site,
    gigabytes: Callable[..., float],
    write_index: Callable[..., Path],
    tmp_path: Path,
    error_of: Callable,
) -> None:
    index = write_index()
    place = options(tmp_path, "DATA.CACHE_GB", gigabytes(2), "DATA.ROOT", index, "DATA.WORKER_TIMEOUT", 3)
    run = ["--output", str(tmp_path / "run"), "--resume", *TINY, *place, "CHECKPOINT.STEPS", "3"]
    last = tars_of_first_epoch()[-1]
    site.faults[f"/train-{last}.tar"] = ["", "503"]  # it is there when asked for its size
    message = error_of(train.main, run)
    assert message == (
        f"{site.url}/train-{last}.tar cannot be fetched: the server answers 503 Service Unavailable, after 8 attempts; "
        "check the network and the server"
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
    with_index: bool, root: str, site, write_index: Callable[..., Path], tmp_path: Path, error_of: Callable
) -> None:
    place = str(write_index()) if with_index else root
    del site.files["/train-4.tar"]
    message = error_of(train.main, ["--output", str(tmp_path / "run"), *TINY, *options(tmp_path, "DATA.ROOT", place)])
    assert message == f"{site.url}/train-4.tar cannot be fetched: the server answers 404 Not Found; check DATA.ROOT"
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_check_data_and_dry_run(
    root: str, site, gigabytes: Callable[..., float], tmp_path: Path, make_tar: Callable, capsys, error_of: Callable
) -> None:
    place = options(tmp_path, "DATA.CACHE_GB", gigabytes(2), "DATA.WINDOW", 1, "DATA.ROOT", root)
    train.main(["--dry-run", *TINY, *place])
    assert "6 steps; 0 of 24 images are left out" in capsys.readouterr().out
    train.main(["--check-data", *TINY, *place, "DATA.WORKERS", "2"])
    assert "all 24 images can be read" in capsys.readouterr().out
    site.files["/train-1.tar"] = make_tar([("a.jpg", b"<html>"), ("a.cls", b"0")])
    message = error_of(train.main, ["--check-data", *TINY, *place, "DATA.CACHE", str(tmp_path / "fresh")])
    assert message == "1 of 21 images cannot be read; replace or remove those listed above"
    assert f"{site.url}/train-1.tar:a.jpg: not an image" in capsys.readouterr().out


def test_the_probe_of_a_run_uses_its_cache(
    root: str, finished: Path, site, gigabytes: Callable[..., float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CACHE", tmp_path / "default")
    site.files["/val.json"] = b'{"shardlist": [{"url": "val-0.tar"}]}'
    site.files["/train.json"] = b'{"shardlist": [{"url": "train-{0..5}.tar"}]}'
    place = options(tmp_path, "DATA.CACHE_GB", gigabytes(3), "DATA.ROOT", f"{site.url}/{{split}}.json")
    train.main(["--output", str(tmp_path / "run"), *TINY, *place, "PROBE.EVERY", "2", "PROBE.K", "3"])
    assert "knn_top1" in record(tmp_path / "run")[-1]
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["position"]["step"] == 12
    assert not (tmp_path / "default").exists()


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["DATA.ROOT", "https://host/{split}-{3..1}.tar"], r"\{3..1\} in .* does not go from"),
        (["DATA.ROOT", "gs://bucket/a-{0..3}.tar"], "gs://bucket/a-0.tar needs gcsfs: pip install"),
        (["DATA.ROOT", "https://host/a.tar.gz"], "is compressed"),
        (["DATA.ROOT", "/none/train.json"], "/none/train.json cannot be read"),
        (["DATA.ROOT", "/none/{0..3}.tar"], "/none/0.tar does not exist"),
        (["DATA.ROOT", "pipe:cat x", "DATA.CACHE", "/proc/none"], "cannot write /proc/none: .*set DATA.CACHE"),
        (["DATA.NAME", "folder", "DATA.WINDOW", "2"], "DATA.WINDOW is a number of tars, and folder has none"),
        (["DATA.ROOT", "pipe:cat x", "DATA.CACHE_GB", "0"], "DATA.CACHE_GB must be at least"),
    ],
)
def test_wrong_values_are_one_line(pairs: list[str], words: str, tmp_path: Path, error_of: Callable) -> None:
    with pytest.raises(UserError, match=words):
        train.main(["--dry-run", *TINY, *pairs])
    assert os.listdir(tmp_path) == []
