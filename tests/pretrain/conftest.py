"""A web server on this machine for remote tars, which misbehaves when told to."""

import io
import json
import re
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ETAG = '"one"'


class Site:
    """Files behind `url`.

    `faults` holds for a path what its next requests meet, in turn: an HTTP status, `cut` (half of what is left is
    sent), `hang` (and no more, until the end of the test), or `whole` (a Range is not heeded). The last one stays.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str]] = []  # path, Range
        self.over = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.handle_error = lambda *_: None  # of those who hang up
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def count(self, path: str) -> int:
        """Requests for a whole file, or the rest of one."""
        return sum(1 for asked, part in self.requests if asked == path and part != "bytes=0-0")

    def next_fault(self, path: str) -> str:
        faults = self.faults.get(path, [""])
        return faults.pop(0) if len(faults) > 1 else faults[0]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                part = self.headers.get("Range", "")
                site.requests.append((self.path, part))
                fault = site.next_fault(self.path)
                if fault.isdigit() or self.path not in site.files:
                    self.send_error(int(fault or 404))
                    return
                content = site.files[self.path]
                found = re.fullmatch(r"bytes=(\d+)-(\d*)", part if fault != "whole" else "")
                if found and self.headers.get("If-Range", ETAG) == ETAG:
                    start, end = int(found[1]), int(found[2] or len(content) - 1)
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
                    content = content[start : end + 1]
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", ETAG)
                self.end_headers()
                bad = fault in ("cut", "hang") and part != "bytes=0-0"
                self.wfile.write(content[: len(content) // 2] if bad else content)
                if bad and fault == "hang":
                    self.wfile.flush()
                    site.over.wait(60)

            def do_HEAD(self) -> None:
                self.send_response(200 if self.path in site.files else 404)
                self.send_header("Content-Length", str(len(site.files.get(self.path, b""))))
                self.send_header("ETag", ETAG)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A web server without files, for one test."""
    monkeypatch.setenv("no_proxy", "*")
    site = Site()
    yield site
    site.over.set()
    site.server.shutdown()
    site.server.server_close()


def tar_of(files: Sequence[tuple[str, bytes]]) -> bytes:
    """An uncompressed tar."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture
def make_tar() -> Callable[[Sequence[tuple[str, bytes]]], bytes]:
    """See `tar_of`."""
    return tar_of


@pytest.fixture(scope="session")
def tars(photos: Path) -> dict[str, bytes]:
    """train-0.tar to train-5.tar of four labelled photos each, and val-0.tar of eight. Some 20 kB each."""
    shards = {}
    for split, size in (("train", 4), ("val", 8)):
        photos_of = sorted((photos / split).rglob("*.jpg"), key=lambda path: (path.name, path.parent.name))
        for number in range(len(photos_of) // size):
            files = []
            for i, path in enumerate(photos_of[number * size : (number + 1) * size]):
                files.append((f"{i}.jpg", path.read_bytes()))
                files.append((f"{i}.cls", str(int(path.parent.name == "square")).encode()))
            shards[f"{split}-{number}.tar"] = tar_of(files)
    return shards


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


@pytest.fixture
def gigabytes(tars: dict[str, bytes]) -> Callable[[float], float]:
    """Room for so many of the tars."""
    return lambda count: count * len(tars["train-0.tar"]) / 1e9


@pytest.fixture
def write_index(site: Site, tmp_path: Path) -> Callable[..., Path]:
    """Writes an index of the six tars, with `facts` besides their number of images."""

    def write(name: str = "train.json", **facts: object) -> Path:
        lines = [{"url": f"{site.url}/train-{i}.tar", "nsamples": 4, **facts} for i in range(6)]
        (tmp_path / name).write_text(json.dumps({"shardlist": lines}))
        return tmp_path / name

    return write
