"""Images in tars: equal to those in a folder, in all processes; and tars that are damaged, hostile or unusual."""

import io
import logging
import os
import re
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from foundation.errors import UserError
from foundation.images import MAX_BYTES, UnreadableImage, read_rgb
from pretrain.batches.loader import build_loader, read_batches
from pretrain.batches.sampler import SequentialBatches
from pretrain.batches.views import ViewDataset
from pretrain.images.labelled import build_labelled_source
from pretrain.images.paths import locate
from pretrain.images.sources import UNLABELED, build_source
from pretrain.images.tars import OPEN_TARS, TarIndex


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def write_shards(root: Path, files: list[Path], labels: list[str] | None = None) -> Path:
    """Two tars of half of the files each, with labels as WebDataset names them."""
    root.mkdir(parents=True, exist_ok=True)
    half = (len(files) + 1) // 2
    for shard in range(2):
        with tarfile.open(root / f"shard-{shard}.tar", "w") as tar:
            for i in range(shard * half, min((shard + 1) * half, len(files))):
                add(tar, f"part/{i:04d}.jpg", files[i].read_bytes())
                add(tar, f"part/{i:04d}.json", b"{}")
                if labels:
                    add(tar, f"part/{i:04d}.cls", labels[i].encode())
    return root


@pytest.mark.parametrize(("size", "fits"), [(300_000_000, True), (MAX_BYTES + 1, False)])
def test_an_image_of_a_tar_may_be_as_large_as_a_file(photos: Path, tmp_path: Path, size: int, fits: bool) -> None:
    content = next(photos.rglob("*.jpg")).read_bytes()
    entry = tarfile.TarInfo("large.jpg")
    entry.size = size
    with open(tmp_path / "a.tar", "wb") as tar:
        tar.write(entry.tobuf() + content)
        tar.truncate((size // tarfile.BLOCKSIZE + 4) * tarfile.BLOCKSIZE)  # zeros, which take no space
    source = build_source("webdataset", str(tmp_path), "pretrain")
    if fits:
        assert source.open(0).decode().any()
        return
    with pytest.raises(
        UnreadableImage, match=r"large.jpg: 1,073,741,825 bytes are more than the 1,073,741,824 allowed"
    ):
        source.open(0)


def test_a_tar_gives_what_a_folder_gives(photos: Path, tmp_path: Path) -> None:
    folder = build_source("folder", str(photos), "train")
    files = [Path(folder.name(i)) for i in range(len(folder))]
    write_shards(tmp_path / "train", files, [str(label) for label in folder.labels])
    source = build_source("webdataset", str(tmp_path), "train")
    assert list(source.labels) == list(folder.labels)
    assert source.classes == ["0", "1"]
    assert all(np.array_equal(source.open(i).decode(), folder.open(i).decode()) for i in range(len(folder)))
    assert source.name(13) == f"{tmp_path}/train/shard-1.tar:part/0013.jpg"
    loader = build_loader(ViewDataset(source, 16, []), SequentialBatches(np.arange(24), 8), 2, torch.device("cpu"))
    in_workers = torch.cat([batch.images for batch in read_batches(loader)], dim=1)
    own = ViewDataset(folder, 16, [])
    assert torch.equal(in_workers, own.read([(0, i) for i in range(24)]).images)


def test_without_labels_and_with_a_bad_image(photos: Path, tmp_path: Path) -> None:
    files = sorted((photos / "train" / "circle").iterdir())[:3]
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(files[0].read_bytes()[:200])
    source = build_source("webdataset", str(write_shards(tmp_path / "flat", [*files, bad])), "pretrain")
    assert list(source.labels) == [UNLABELED] * 4
    with pytest.raises(UnreadableImage, match=r"shard-1.tar:part/0003.jpg"):
        source.open(3).decode()


def test_a_process_keeps_a_bounded_number_of_tars_open(photos: Path, tmp_path: Path) -> None:
    content = next((photos / "train").rglob("*.jpg")).read_bytes()
    for number in range(OPEN_TARS + 10):
        with tarfile.open(tmp_path / f"{number:03d}.tar", "w") as tar:
            add(tar, "1.jpg", content)
    source = build_source("webdataset", str(tmp_path), "pretrain")
    before = len(os.listdir("/proc/self/fd"))
    for index in [*range(len(source)), 0]:
        assert source._read_bytes(index, 512, 9) == content[:9]
    assert len(os.listdir("/proc/self/fd")) <= before + OPEN_TARS


@pytest.mark.parametrize("name", ["x.tar", "x.json", "x{1..2}"])
def test_a_folder_and_a_tar_are_not_taken_for_a_pattern_or_an_index(name: str, photos: Path, tmp_path: Path) -> None:
    files = sorted((photos / "train").rglob("*.jpg"))
    root = write_shards(tmp_path / name, files)
    assert len(build_source(*locate([str(root)]), "pretrain")) == 24
    assert len(build_source(*locate([str(root / "shard-0.tar")]), "pretrain")) == 12


def test_tars_beside_a_folder_train_without_tars(photos: Path, tmp_path: Path) -> None:
    """It is not known which of the two is meant."""
    root = write_shards(tmp_path / "photos", sorted((photos / "val").rglob("*.jpg")))
    (root / "train").mkdir()
    message = (
        rf"{root} holds tars, and beside them {root}/train, which holds none: .* {root}/shard-0.tar, or {root}/train"
    )
    for build in (lambda: locate([str(root)]), lambda: build_source("webdataset", str(root), "pretrain")):
        with pytest.raises(UserError, match=message):
            build()
    assert len(build_source(*locate([str(root / f"shard-{shard}.tar") for shard in range(2)]), "pretrain")) == 8
    write_shards(root / "train", sorted((photos / "train").rglob("*.jpg")))
    more = write_shards(tmp_path / "more", sorted((photos / "val").rglob("*.jpg")))
    assert len(build_source(*locate([str(root)]), "pretrain")) == 24
    assert len(build_source(*locate([str(root), str(more)]), "pretrain")) == 24 + 8


def test_naming_an_image_takes_no_time_and_memory_for_the_others() -> None:
    names = [f"n/{number:05d}.jpg" for number in range(5000)]
    index = TarIndex.of("\0".join(names), *[[0] * len(names)] * 3)
    assert [index.name(row) for row in (0, 1, 4999)] == [names[0], names[1], names[4999]]
    tracemalloc.start()
    index.name(2500)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000


def test_wrong_tars_are_named(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .tar in"):
        build_source("webdataset", str(tmp_path), "pretrain")
    files = sorted((photos / "train" / "circle").iterdir())[:2]
    write_shards(tmp_path, files)
    whole = (tmp_path / "shard-1.tar").read_bytes()
    for content in (b"not a tar" * 100, whole[:700]):
        (tmp_path / "shard-1.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"shard-1.tar cannot be read as an uncompressed tar"):
            build_source("webdataset", str(tmp_path), "pretrain")


@pytest.mark.parametrize("label", ["dog", "-1", "1.5", "300000000", "", "7" * 5000])
def test_labels_matter_only_where_they_are_used(label: str, photos: Path, tmp_path: Path) -> None:
    files = sorted((photos / "train" / "circle").iterdir())[:2]
    write_shards(tmp_path / "train", files, ["0", label])
    source = build_source("webdataset", str(tmp_path), "pretrain")
    assert list(source.labels) == [UNLABELED] * 2
    with pytest.raises(UserError, match=r"shard-1.tar:part/0001.jpg: its label \(.cls\) is not the number of a class"):
        build_source("webdataset", str(tmp_path), "train")


def test_labels_of_some_images(photos: Path, tmp_path: Path) -> None:
    files = sorted((photos / "train" / "circle").iterdir())[:2]
    write_shards(tmp_path / "train", files)
    with tarfile.open(tmp_path / "train" / "shard-1.tar", "w") as tar:
        add(tar, "1.cls", b" 1\n")
        add(tar, "1.jpg", files[0].read_bytes())
    assert len(build_source("webdataset", str(tmp_path), "pretrain")) == 2
    with pytest.raises(UserError, match=r"others do not: .*shard-0.tar:part/0000.jpg"):
        build_source("webdataset", str(tmp_path), "train")
    write_shards(tmp_path / "train", files)
    with pytest.raises(UserError, match=r"have no labels: each needs a .cls member with the number of its class"):
        build_labelled_source("webdataset", str(tmp_path), "train")


def test_links_in_a_tar(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(logging.getLogger("pretrain"), "propagate", True)
    folder = tmp_path / "files"
    folder.mkdir()
    for number in (1, 2):
        (folder / f"{number}.jpg").write_bytes((photos / "train" / "circle" / f"0{number}.jpg").read_bytes())
    (folder / "1.cls").write_text("1")
    (folder / "2.cls").hardlink_to(folder / "1.cls")
    (folder / "3.cls").write_text("0")
    (folder / "3.jpg").hardlink_to(folder / "1.jpg")
    (folder / "4.jpg").symlink_to("1.jpg")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"./{path.name}")
    source = build_source("webdataset", str(tmp_path / "{split}.tar"), "train")
    assert [Path(source.name(i)).name for i in range(len(source))] == ["1.jpg", "2.jpg", "3.jpg"]
    assert source.labels.tolist() == [1, 1, 0]
    for number in (1, 2, 3):
        expected = folder / f"{number}.jpg"
        assert np.array_equal(source.open(number - 1).decode(), read_rgb(expected))
    assert "1 images of" in caplog.text
    assert "rename ./4.jpg" in caplog.text


def test_images_that_are_ignored_are_counted_and_named(photos: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(logging.getLogger("pretrain"), "propagate", True)
    image = (photos / "train" / "circle" / "00.jpg").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("1.jpg", "v1.0.jpg", "x.input.jpg", "1.png", "d/._1.jpg", "d/.jpg", ".hidden/3.jpg", "2.json"):
            add(tar, name, image)
    source = build_source("webdataset", str(tmp_path), "pretrain")
    assert [source.name(i) for i in range(len(source))] == [f"{tmp_path}/a.tar:1.jpg"]
    assert re.search(r"3 images of .* are ignored, 1 are used: .* rename v1.0.jpg, x.input.jpg, 1.png", caplog.text)


def sparse() -> bytes:
    entry = tarfile.TarInfo("a.jpg")
    entry.type, entry.size = tarfile.GNUTYPE_SPARSE, 0
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 0)
    header[483:495] = b"%011o\0" % (1 << 32)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def pax(records: bytes, repeated: int = 1) -> bytes:
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, len(records)
    body = records + bytes(-len(records) % 512)
    image = tarfile.TarInfo("a.jpg")
    image.size = 5
    return (entry.tobuf() + body) * repeated + image.tobuf() + b"hello".ljust(512, b"\0") + bytes(1024)


def with_a_long_header() -> bytes:
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    return entry.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (sparse(), "a.jpg is stored as a sparse file; write the tar without --sparse"),
        (pax(b"13 size=-512\n"), "cannot be read as an uncompressed tar"),
        (pax(b"15 mtime=12345\n", repeated=5000), "too many extended headers in a row"),
        (with_a_long_header(), "a header of 8,589,934,592 bytes is larger than the 1,048,576 allowed"),
        (tarfile.TarInfo("a.jpg").tobuf()[:100], "cannot be read as an uncompressed tar"),
    ],
    ids=["sparse", "negative size", "chained headers", "long name", "cut"],
)
def test_hostile_tars_are_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path}/a.tar.*{words}"):
        build_source("webdataset", str(tmp_path), "pretrain")


def test_a_named_pipe_is_not_a_tar(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    for root in (str(tmp_path), f"{tmp_path}/a.tar"):
        with pytest.raises(UserError, match=rf"{tmp_path}/a.tar .*is not a file"):
            build_source("webdataset", root, "pretrain")
