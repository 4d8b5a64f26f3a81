"""Tars fetched into a bounded folder: faults of servers, removal when the folder is full, and killed fetches."""

import contextlib
import hashlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from foundation.errors import UserError
from pretrain.images.cache import ShardCache, key_of
from pretrain.images.fetch import fetch, measure_objects
from pretrain.images.shards import Shard

fork = multiprocessing.get_context("fork")
PATIENCE = 20.0  # seconds: a connection is given up after one


@pytest.fixture
def shards(site, tars: dict[str, bytes]) -> list[Shard]:
    site.files |= {f"/{name}": content for name, content in tars.items()}
    return [Shard(f"{site.url}/train-{i}.tar") for i in range(6)]


def cache_of(folder: Path, limit: int = 10**9, patience: float = PATIENCE) -> ShardCache:
    return ShardCache(folder / "cache", limit, patience)


def kept(cache: ShardCache, suffix: str = ".tar") -> set[str]:
    return {path.name for path in cache.folder.iterdir() if path.suffix == suffix}


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([""], [""]),
        (["503", "429", ""], ["", "", ""]),
        (["cut", ""], ["", "rest"]),
        (["cut", "cut", "hang", ""], ["", "rest", "rest", "rest"]),
        (["cut", "whole"], ["", "rest"]),  # the rest is asked for, all of it comes
        (["hang", "503", ""], ["", "rest", "rest"]),
    ],
)
def test_faults_that_pass_cost_time_only(
    faults: list[str], requests: list[str], shards: list[Shard], site, tars: dict[str, bytes], tmp_path: Path
) -> None:
    site.faults["/train-0.tar"] = faults
    cache = cache_of(tmp_path)
    assert cache.ensure(shards[0]).read_bytes() == tars["train-0.tar"]
    assert [bool(part) for _, part in site.requests] == [part == "rest" for part in requests]
    assert len(cache.known(shards[0]).images) == 4
    assert not kept(cache, ".part")


@pytest.mark.parametrize(
    ("faults", "words", "requests"),
    [
        (["404"], "the server answers 404 Not Found; check DATA.ROOT", 1),
        (["403"], "the server answers 403", 1),
        (["503"], "the server answers 503 Service Unavailable, after 8 attempts", 8),
        (["hang"], "nothing came for 0.2 s, after 8 attempts", None),
    ],
)
def test_faults_that_stay_end_in_bounded_time(
    faults: list[str], words: str, requests: int | None, shards: list[Shard], site, tmp_path: Path
) -> None:
    site.faults["/train-0.tar"] = faults
    cache, started = cache_of(tmp_path, patience=4), time.monotonic()
    with pytest.raises(UserError, match=f"{shards[0].url} cannot be fetched: {words}"):
        cache.ensure(shards[0])
    # A server that hangs sends half of the rest each time: the attempts without progress count from the last byte on.
    assert requests in (None, site.count("/train-0.tar"))
    assert time.monotonic() - started < 15
    assert not kept(cache) | kept(cache, ".part") | kept(cache, ".json")


def test_a_server_that_always_cuts_short_is_named(
    shards: list[Shard], site, tars: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(tars["train-0.tar"])
    site.faults["/train-0.tar"] = ["cut"]
    cache = cache_of(tmp_path, patience=1)
    with pytest.raises(UserError, match=rf"the connection ended after \d+ of {size} bytes, after 8 attempts"):
        cache.ensure(shards[0])
    assert not kept(cache)


def test_nobody_listens(tmp_path: Path, free_port: int) -> None:
    with pytest.raises(UserError, match=r"127.0.0.1:\d+/a.tar cannot be fetched: .*refused, after 8 attempts"):
        cache_of(tmp_path, patience=1).ensure(Shard(f"http://127.0.0.1:{free_port}/a.tar"))


def test_what_is_not_as_expected_is_refused(
    site, tars: dict[str, bytes], tmp_path: Path, make_tar: Callable[..., bytes]
) -> None:
    good, url = tars["train-0.tar"], f"{site.url}/a.tar"
    md5 = hashlib.md5(good).hexdigest()
    for content, shard, words in [
        (good, Shard(url, size=99), f"{url} has {len(good)} bytes, but 99 were expected"),
        (good, Shard(url, samples=5), f"{url} has 4 images, but its index says 5 samples"),
        (good[:-1] + b"x", Shard(url, md5=md5), f"{url} is damaged or has changed: its MD5 is not {md5}"),
        (good[:700], Shard(url), f"{url} cannot be read as an uncompressed tar"),
        (b"<html>" * 200, Shard(url), f"{url} cannot be read as an uncompressed tar"),
    ]:
        site.files["/a.tar"] = content
        cache = cache_of(tmp_path)
        with pytest.raises(UserError, match=words):
            cache.ensure(shard)
        assert not kept(cache) | kept(cache, ".part") | kept(cache, ".json")
    site.files["/a.tar"] = good
    assert cache.ensure(Shard(url, size=len(good), samples=4, md5=md5)).read_bytes() == good


def test_commands(tars: dict[str, bytes], tmp_path: Path) -> None:
    content = tars["train-0.tar"]
    (tmp_path / "a.tar").write_bytes(content)
    cache = cache_of(tmp_path, patience=2)
    assert cache.ensure(Shard(f"pipe:cat {tmp_path}/a.tar")).read_bytes() == content
    flaky = f"cd {tmp_path}; test -e seen && cat a.tar || {{ touch seen; head -c 99 a.tar; false; }}"
    assert cache.ensure(Shard(f"pipe:{flaky}")).read_bytes() == content
    for command, words in [
        (f"cat {tmp_path}/none.tar", r"the command ends with status 1 \(cat: .*No such file.*\), after 8 attempts"),
        (f"head -c 700 {tmp_path}/a.tar", "cannot be read as an uncompressed tar"),
        (f"echo $$ > {tmp_path}/pid; sleep 60 & wait", "nothing came for 0.1 s, after 8 attempts"),
    ]:
        with pytest.raises(UserError, match=words):
            cache.ensure(Shard(f"pipe:{command}"))
    deadline = time.monotonic() + 10  # a killed process takes a while to end on a busy machine
    while (living := living_in_group(int((tmp_path / "pid").read_text()))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not living


def living_in_group(group: int) -> list[str]:
    """Processes of a group that are more than an entry in the kernel's table."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, own = path.read_text().rpartition(")")[2].split()[:3]
            found += [path.parent.name] if int(own) == group and state != "Z" else []
    return found


def test_a_disk_that_refuses_is_named_at_once(shards: list[Shard], site, tmp_path: Path, files_up_to: Callable) -> None:
    cache = cache_of(tmp_path)
    message = r"cannot write .*train-0.*: File too large; make room, lower DATA.CACHE_GB"
    with files_up_to(8192), pytest.raises(UserError, match=message):
        cache.ensure(shards[0])
    assert site.count("/train-0.tar") == 1
    assert not kept(cache) | kept(cache, ".part")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/cache: Not a directory"):
        cache_of(tmp_path / "file")


def test_a_tar_is_fetched_once_for_all_processes(shards: list[Shard], site, tmp_path: Path) -> None:
    site.faults["/train-0.tar"] = ["503", ""]  # the first is at it for a while
    processes = [fork.Process(target=lambda: cache_of(tmp_path).ensure(shards[0])) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert site.count("/train-0.tar") == 2


def test_a_killed_fetch_leaves_nothing_that_counts(
    shards: list[Shard], site, tars: dict[str, bytes], tmp_path: Path
) -> None:
    site.faults["/train-0.tar"] = ["hang", ""]
    cache = cache_of(tmp_path, limit=3 * len(tars["train-0.tar"]), patience=600)
    process = fork.Process(target=lambda: cache.ensure(shards[0]))
    process.start()
    part = cache.path(shards[0]).with_suffix(".part")
    wait_for(lambda: part.exists() and part.stat().st_size > 0)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert part.exists()
    assert not cache.has(shards[0])
    for shard in shards[1:4]:  # the third needs the room that the rest of the fetch takes
        cache.ensure(shard)
    assert not part.exists()
    assert kept(cache) == {cache.path(shard).name for shard in shards[1:4]}
    assert cache.ensure(shards[0]).read_bytes() == tars["train-0.tar"]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_longest_unused_goes_and_its_index_stays(
    shards: list[Shard], site, tars: dict[str, bytes], tmp_path: Path
) -> None:
    cache = cache_of(tmp_path, limit=3 * len(tars["train-0.tar"]))
    for shard in shards[:3]:
        cache.ensure(shard)
    cache.touch(shards[0])
    images = cache.known(shards[2]).images.lists()
    cache.ensure(shards[3], keep={key_of(shards[1])})  # 2 goes: 1 is older, but to be kept
    assert [cache.has(shard) for shard in shards] == [True, True, False, True, False, False]
    cache.ensure(shards[4], keep={key_of(shard) for shard in shards})  # then all are the same
    assert [cache.has(shard) for shard in shards] == [True, False, False, True, True, False]
    assert [cache.known(shard) is not None for shard in shards] == [True] * 5 + [False]
    assert cache.known(shards[2]).images.lists() == images
    assert images["names"] == "0.jpg\0001.jpg\0002.jpg\0003.jpg"
    with pytest.raises(UserError, match=r"DATA.CACHE_GB allows 20,000; raise it"):
        cache_of(tmp_path / "small", limit=20_000).ensure(shards[0])


def test_the_folder_never_outgrows_its_bound(tars: dict[str, bytes], shards: list[Shard], site, tmp_path: Path) -> None:
    """Four processes and eight tars, of which two and a half fit; half of them of a size that nobody knows before."""
    for name, content in tars.items():
        (tmp_path / name).write_bytes(content)
    limit = int(2.5 * max(map(len, tars.values())))
    places = [*shards[:4], *(Shard(f"pipe:cat {tmp_path}/train-{i}.tar") for i in range(4))]
    cache, sizes, over = cache_of(tmp_path, limit), [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            with cache._lock(".cache", wait=True):
                sizes.append(sum(path.stat().st_size for path in cache.folder.glob("*.[tp]ar*")))
            time.sleep(0.001)

    def work(first: int) -> None:
        for turn in range(3):
            for i in range(8):
                cache.ensure(places[(first + i + turn) % 8])

    watcher = threading.Thread(target=watch)
    processes = [fork.Process(target=work, args=(first,)) for first in (0, 2, 4, 6)]
    for process in processes:
        process.start()
    watcher.start()  # not before: a process forked while this thread holds the lock would hold it to its end
    for process in processes:
        process.join()
    over.set()
    watcher.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert limit / 2 < max(sizes) <= limit
    assert not kept(cache, ".part")


def test_a_record_that_is_damaged_or_of_another_tar(shards: list[Shard], site, tars, tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    record = cache.ensure(shards[0]).with_suffix(".json")
    whole = record.read_bytes()
    for damaged in (whole[:50], b"5", b"{}", b'{"size": 1e400, "images": {}}', whole.replace(b"offsets", b"offzets")):
        record.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{record} is not a usable index of a tar .*; remove this file"):
            cache.known(shards[0])
    record.unlink()
    assert not cache.has(shards[0])
    cache.ensure(shards[0])
    assert record.read_bytes() == whole
    # Another tar behind the same URL, as an index that has been changed says: fetched anew.
    site.files["/train-0.tar"] = tars["val-0.tar"]
    changed = Shard(shards[0].url, size=len(tars["val-0.tar"]), samples=8)
    assert cache.known(changed) is None
    assert cache.ensure(changed).read_bytes() == tars["val-0.tar"]
    assert len(cache.known(changed).images) == 8


@pytest.fixture
def bucket(site, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a bucket whose objects are the files below /bucket/ of the web server."""
    if not importlib.util.find_spec("s3fs"):  # not imported here: see `test_object_stores`
        pytest.skip("s3fs is not installed")
    settings = {"AWS_ENDPOINT_URL": site.url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    return "s3://bucket"


def test_object_stores(bucket: str, site, tars: dict[str, bytes], tmp_path: Path) -> None:
    """Read by another process, so that no thread of the library lives in this one; continued where a read broke off."""
    content = tars["train-0.tar"]
    site.files["/bucket/a.tar"] = content
    threads = threading.active_count()
    assert measure_objects([f"{bucket}/a.tar"], 20) == [len(content)]
    with (tmp_path / "half").open("w+b") as file:
        file.write(content[:1000])
        fetch(f"{bucket}/a.tar", file, size=len(content), stall=20, reserve=lambda _: None)
        file.seek(0)
        assert file.read() == content
    assert [part for _, part in site.requests][-1].startswith("bytes=1000-")
    with pytest.raises(UserError, match=r"s3://bucket/none.tar does not exist; check DATA.ROOT"):
        measure_objects([f"{bucket}/a.tar", f"{bucket}/none.tar"], 20)
    assert threading.active_count() == threads
    assert not {"s3fs", "aiobotocore"} & set(sys.modules)


def test_an_object_store_that_does_not_answer_names_the_time_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.images.remote.check_installed", lambda url: None)
    monkeypatch.setattr("pretrain.images.remote.sizes_command", lambda: ["sleep", "60"])
    with pytest.raises(UserError, match=r"^s3://b/a.tar cannot be fetched: nothing came for 0.2 s, after 3 attempts"):
        measure_objects(["s3://b/a.tar"], 0.01)


def test_an_object_store_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"s3://b/a.tar needs s3fs: pip install 'corinfomax\[remote\]'"):
        measure_objects(["s3://b/a.tar"], 1)
