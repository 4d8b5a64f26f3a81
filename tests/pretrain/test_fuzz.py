"""Mutated files, by a fixed seed, before the readers of pretraining: a result or one line, in bounded time and memory.

The counts of the slow ones are in docs/reliability.md.
"""

import contextlib
import gzip
import json
import random
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from fvcore.common.config import CfgNode

from foundation.config import load_config
from foundation.errors import UserError
from foundation.images import UnreadableImage
from pretrain.config import get_defaults, validate
from pretrain.images.cache import ShardCache
from pretrain.images.labelled import read_list
from pretrain.images.shards import Shard, list_shards
from pretrain.images.sources import build_source, read_class_list
from pretrain.images.tars import index_tar
from pretrain.images.voc07 import read_voc07
from pretrain.runs.folder import plain, read_results
from pretrain.runs.metrics import JsonLines

SECONDS = 3  # for each file
MEMORY = 1 << 30  # bytes more than before
TOKENS = [
    *(b"-1", b"0", b"1e13", b"1e999", b"Infinity", b"NaN", b"null", b"true", b"5", b"{}", b"[]", b'""', b"\xff", b"\0"),
    *(b"9" * 30, b"9" * 6000, b"[" * 100_000, b'{"a":' * 20_000, b"{0..99999}" * 3, b"pipe:false", b"../" * 50, b"\n"),
    *(b"&a [*a, *a]", b"_BASE_: x.yaml\n", b"2024-99-99", b"!!python/object:os.system x", b"\xef\xbb\xbf"),
]


class TooLong(BaseException):
    """Not an Exception, so that no reader catches it."""


def mutations(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Changed copies: bits, cuts, repetitions, and values that readers have had trouble with."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            place, length = rng.randrange(len(changed) + 1), rng.randrange(64)
            kind = rng.randrange(6)
            if kind == 0 and changed:
                changed[place - 1] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del changed[place:]
            elif kind == 2:
                del changed[place : place + length]
            elif kind == 3:
                changed[place:place] = changed[place : place + length] * rng.choice((1, 50))
            elif kind == 4:
                changed[place : place + rng.choice((0, length))] = rng.choice(TOKENS)
            else:
                words = [i for i, byte in enumerate(changed[:2000]) if byte in b":,[ \n"]
                start = rng.choice(words) + 1 if words else 0
                end = next((i for i in range(start, len(changed)) if changed[i] in b",}]\n"), len(changed))
                changed[start:end] = rng.choice(TOKENS)
        yield bytes(changed)


def read_tar(path: Path) -> None:
    index_tar(path, str(path))
    source = build_source("webdataset", str(path), "pretrain")
    for index in range(min(len(source), 5)):
        with contextlib.suppress(UnreadableImage):
            source.open(index).decode()


def resume_record(path: Path) -> None:
    JsonLines(path, 5).close()


def read_index(path: Path) -> None:
    list_shards(str(path), "pretrain", 0.01)


def read_cached(path: Path) -> None:
    shard = Shard("https://host/a.tar")
    cache = ShardCache(path.parent, 10**9, 1)
    cache.path(shard).with_suffix(".json").write_bytes(path.read_bytes())
    cache.known(shard)


def read_config(path: Path) -> None:
    config = load_config(get_defaults(), str(path), "pretrain")
    validate(config)
    plain(CfgNode(config))


def read_voc(path: Path) -> None:
    place = path.parent / "ImageSets" / "Main"
    place.mkdir(parents=True, exist_ok=True)
    (path.parent / "JPEGImages").mkdir(exist_ok=True)
    for number in range(1, 4):
        (path.parent / "JPEGImages" / f"{number:06d}.jpg").touch()
    for split in ("trainval", "test"):
        (place / f"cat_{split}.txt").write_bytes(path.read_bytes())
    read_voc07(path.parent, ["cat"])


def read_idx(path: Path) -> None:
    for stem in ("train", "t10k"):
        (path.parent / f"{stem}-images-idx3-ubyte.gz").write_bytes(path.read_bytes())
        (path.parent / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8 + 3)))
    build_source("fashion_mnist", str(path.parent), "train")


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "tar": ("a.tar", read_tar),
    "index of tars": ("a.json", read_index),
    "index of a tar": ("a.json", read_cached),
    "metrics.json": ("metrics.json", resume_record),
    "results.json": ("results.json", lambda path: read_results(path.parent)),
    "config.yaml": ("config.yaml", read_config),
    "list of classes": ("classes.txt", lambda path: read_class_list(str(path))),
    "list of files": ("list.txt", lambda path: read_list(str(path), "", "")),
    "list of VOC": ("list.txt", read_voc),
    "Fashion-MNIST": ("a.gz", read_idx),
}


@pytest.fixture
def whole(tars: dict[str, bytes]) -> dict[str, bytes]:
    """A good file for each reader."""
    lines = [{"iteration": step, "total": 1.5, "epoch": 0.5, "learning_rate": 0.1} for step in range(6)]
    shards = [{"url": f"https://host/{i}.tar", "nsamples": 4, "filesize": 20480, "md5sum": "0f"} for i in range(3)]
    columns = {"offsets": [512, 2048], "sizes": [100, 200], "labels": [0, 1]}
    return {
        "tar": tars["train-0.tar"],
        "index of tars": json.dumps({"shardlist": shards, "base_path": "https://host/"}).encode(),
        "index of a tar": json.dumps({"size": 20480, "images": {"names": "0.jpg\0001.jpg", **columns}}).encode(),
        "metrics.json": b"".join(json.dumps(line).encode() + b"\n" for line in lines),
        "results.json": json.dumps({"kind": "linear", "top1": 71.5, "sweep": [{"lr": 0.1}]}, indent=2).encode(),
        "config.yaml": yaml.safe_dump(plain(get_defaults()), sort_keys=False).encode(),
        "list of classes": b"# classes\nn01440764\nn01443537  # a shark\n",
        "list of files": b"n01440764_1.JPEG\nn01440764_2.JPEG\n",
        "list of VOC": b"000001  1\n000002 -1\n000003  0\n",
        "Fashion-MNIST": gzip.compress(bytes(16 + 784 * 3)),
    }


@pytest.fixture
def bounds() -> Iterator[None]:
    """Raise `TooLong` after `SECONDS`, from when the timer is set, and MemoryError beyond `MEMORY`."""

    def too_long(*_: object) -> None:
        raise TooLong

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("count", [25, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_gives_a_result_or_one_line(
    name: str, count: int, whole: dict[str, bytes], tmp_path: Path, bounds: None
) -> None:
    file, read = READERS[name]
    refused = 0
    for number, content in enumerate(mutations(whole[name], count, seed=count)):
        path = tmp_path / file
        path.write_bytes(content)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            read(path)
        except UserError as error:
            refused += bool(str(error))
        except BaseException as error:
            (tmp_path / "culprit").write_bytes(content)
            raise AssertionError(f"mutation {number} of {count}: {type(error).__name__}: {error}") from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    if count > 1000:
        print(f"{name}: {count} files, {refused} refused")
