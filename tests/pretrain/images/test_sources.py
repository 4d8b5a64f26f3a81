"""Sources of images: layouts on disk, labels, and the messages when they are not as expected."""

import errno
import gzip
import logging
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision
from filelock import FileLock, Timeout
from PIL import Image

from foundation.errors import UserError
from pretrain.images.files import find_images
from pretrain.images.labelled import build_labelled_source
from pretrain.images.sources import UNLABELED, build_source, hidden_in, read_class_list


def test_folder_with_classes(photos: Path) -> None:
    source = build_source("folder", str(photos), "train")
    assert source.classes == ["circle", "square"]
    assert list(source.labels) == [0] * 12 + [1] * 12
    assert len(build_source("imagenet1k", str(photos), "val")) == 8
    assert len(build_source("folder", str(photos), "pretrain")) == 24  # train/ where there is one


def test_flat_folder_is_unlabeled(photos: Path) -> None:
    source = build_source("folder", str(photos / "train" / "circle"), "pretrain")
    assert len(source) == 12
    assert set(source.labels) == {UNLABELED}
    assert source.open(0).decode().shape[2] == 3


def test_links_other_files_and_odd_names(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "a" / "b c").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "b c" / "ü.PNG")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "linked").symlink_to(photos / "train" / "circle")
    assert len(build_source("folder", str(tmp_path), "pretrain")) == 13


def test_hidden_files_and_links_to_a_parent_are_left_out(tmp_path: Path, photos: Path) -> None:
    shutil.copytree(photos / "train", tmp_path / "train")
    expected = [Path("train", name, f"{i:02d}.jpg") for name in ("circle", "square") for i in range(12)]
    for name in (
        ".ipynb_checkpoints/00.jpg",
        "circle/.ipynb_checkpoints/00.jpg",
        "circle/._00.jpg",
        "circle/Thumbs.db",
    ):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"x")
    (tmp_path / "train" / "circle" / "up").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "square" / "self").symlink_to(tmp_path / "train" / "square")
    (tmp_path / "train" / "square" / "broken").symlink_to(tmp_path / "nothing")
    (tmp_path / "train" / "square" / "loop").symlink_to("loop")
    source = build_source("folder", str(tmp_path), "train")
    assert [Path(source.name(i)).relative_to(tmp_path) for i in range(len(source))] == expected
    assert source.classes == ["circle", "square"]


def test_a_folder_that_cannot_be_read_is_named(photos: Path, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    scan, closed = os.scandir, photos / "train" / "circle"

    def scandir(path: str):
        if path == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(logging.getLogger("pretrain"), "propagate", True)
    assert len(build_source("folder", str(photos), "pretrain")) == 12
    assert f"{closed}: Permission denied; its images are left out" in caplog.text


def test_pictures_of_kinds_that_are_not_read_are_named(tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture):
    for name in ("1.HEIC", "2.heic", "3.avif", "notes.txt", "._4.heic"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"convert its files to JPEG or PNG: 2 \.heic, 1 \.avif"):
        build_source("folder", str(tmp_path), "pretrain")
    shutil.copy(next(photos.rglob("*.jpg")), tmp_path)
    for _ in range(2):
        assert len(build_source("folder", str(tmp_path), "pretrain")) == 1
    assert caplog.text.count("left out (2 .heic, 1 .avif); convert them to JPEG") == 1


def test_hidden_images_and_folders_are_counted(tmp_path: Path, photos: Path) -> None:
    one = next(photos.rglob("*.jpg"))
    for name in ("a/1.jpg", "a/.2.jpg", "b/3.jpg", "b/.ipynb_checkpoints/4.jpg", ".old/5.jpg", "b/.notes"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(one, tmp_path / name)
    source = build_source("folder", str(tmp_path), "pretrain")
    assert (len(source), hidden_in(source)) == (2, (1, 2))
    joined = build_source("folder", f"{{{tmp_path}/a,{tmp_path}/b}}", "pretrain")
    assert (len(joined), hidden_in(joined)) == (2, (1, 1))
    assert hidden_in(build_source("folder", str(photos), "pretrain")) == (0, 0)


def test_a_loose_image_beside_class_folders(tmp_path: Path, photos: Path) -> None:
    shutil.copytree(photos / "train", tmp_path / "train")
    shutil.copy(photos / "train" / "circle" / "00.jpg", tmp_path / "train" / "loose.jpg")
    assert len(build_source("folder", str(tmp_path), "pretrain")) == 25  # which uses no labels
    with pytest.raises(UserError, match=r"train/loose.jpg lies beside the class folders .*; move it into one"):
        build_labelled_source("folder", str(tmp_path), "train")


def test_the_order_is_that_of_sorted_paths(tmp_path: Path) -> None:
    names = ["b.jpg", "a/z.png", "a/b/c.jpg", "a-b/a.jpg", "a/a.jpg", "ü/ü.jpg", "c/1.jpg", "A/x.JPG", "b.jpg.d/y.gif"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / os.fsdecode(b"\xff.jpg")).touch()
    paths = find_images(tmp_path)
    expected = sorted(path for path in tmp_path.rglob("*.*") if path.is_file())
    assert list(paths) == expected
    assert [paths[-1], *paths[2:4]] == [expected[-1], *expected[2:4]]
    with pytest.raises(IndexError):
        paths[len(expected)]
    classes, labels = paths.top_folders()
    assert [classes[i] for i in labels] == [
        path.parent.relative_to(tmp_path).parts[0] if path.parent != tmp_path else "" for path in expected
    ]
    assert list(find_images(tmp_path, ["c", "a"])) == [path for path in expected if path.parts[-2] in "abc"]


def test_tiny_imagenet_as_downloaded(tmp_path: Path) -> None:
    for name in ("n01", "n02"):
        (tmp_path / "train" / name / "images").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "images" / f"{name}_0.JPEG")
    (tmp_path / "val" / "images").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / "images" / f"val_{i}.JPEG")
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn02\t0\t0\t7\t7\nval_1.JPEG\tn01\t0\t0\t7\t7\n")
    assert list(build_source("tiny_imagenet", str(tmp_path), "train").labels) == [0, 1]
    assert list(build_source("tiny_imagenet", str(tmp_path), "val").labels) == [1, 0]
    annotations.write_text("val_0.JPEG\tn99\n")
    with pytest.raises(UserError, match=r"val_annotations.txt: 'n99'"):
        build_source("tiny_imagenet", str(tmp_path), "val")


def test_fashion_mnist_as_published(tmp_path: Path) -> None:
    pixels = np.arange(2 * 28 * 28, dtype=np.uint8)
    for stem in ("train", "t10k"):
        header = struct.pack(">4i", 2051, 2, 28, 28)
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">2i", 2049, 2) + b"\x09\x03")
        )
    source = build_source("fashion_mnist", str(tmp_path), "val")
    assert list(source.labels) == [9, 3]
    assert np.array_equal(source.open(1).decode(), pixels[784:].reshape(28, 28, 1).repeat(3, 2))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz"):
        build_source("fashion_mnist", str(tmp_path), "train")


def test_errors_name_the_folder(tmp_path: Path) -> None:
    for name, root, message in [
        ("folder", "", "DATA.ROOT is empty: DATA.NAME folder needs the folder of its images"),
        ("folder", str(tmp_path / "gone"), "gone does not exist"),
        ("folder", str(tmp_path), "there is no image below"),
        ("imagenet1k", str(tmp_path), "train does not exist"),
        ("imagenet", str(tmp_path), "is not one of"),
    ]:
        with pytest.raises(UserError) as caught:
            build_source(name, root, "pretrain")
        assert message in str(caught.value)


def class_folders(root: Path, names: list[str]) -> Path:
    for name in names:
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(root / split / name / "a.jpg")
    return root


def test_classes_by_a_list(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data", ["n1", "n2", "n3"])
    listed = tmp_path / "mine.txt"
    listed.write_text("# two of them\nn3\nn1  # with a remark\n\n")
    source = build_source("folder", str(root), "train", str(listed))
    assert source.classes == ["n1", "n3"]  # by name, as always: the same labels whatever the order of the list
    assert list(source.labels) == [0, 1]
    assert len(build_source("imagenet1k", str(root), "pretrain", str(listed))) == 2
    for text, message in [
        ("n1\nn4\nn5\n", "2 of the 3 classes of DATA.CLASSES are not below"),
        ("n1\nn1\n", "names 'n1' twice"),
        ("# none\n", "names no class"),
    ]:
        listed.write_text(text)
        with pytest.raises(UserError, match=message):
            build_source("folder", str(root), "train", str(listed))
    with pytest.raises(UserError, match=r"neither a file nor a list of this project \(imagenet100\)"):
        build_source("folder", str(root), "train", "imagenet10")
    with pytest.raises(UserError, match="shapes has none"):
        build_source("shapes", "", "train", str(listed))


def test_imagenet100_is_chosen_from_a_full_imagenet(tmp_path: Path) -> None:
    names = list(read_class_list("imagenet100"))
    assert len(set(names)) == 100
    assert all(re.fullmatch(r"n\d{8}", name) for name in names)
    assert (names[0], names[-1]) == ("n02869837", "n02090622")
    root = str(class_folders(tmp_path, [*names, "n99999998", "n99999999"]))
    for source in (build_source("imagenet100", root, "train"), build_source("folder", root, "val", "imagenet100")):
        assert source.classes == sorted(names)
    assert len(build_source("imagenet1k", root, "pretrain").classes) == 102
    (tmp_path / "train" / names[7]).rename(tmp_path / "gone")
    with pytest.raises(UserError, match=f"1 of the 100 classes .* {names[7]}"):
        build_source("imagenet100", root, "pretrain", "imagenet100")


def test_one_process_downloads_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    class Fake:
        data, targets, classes = np.zeros((2, 32, 32, 3), np.uint8), [0, 1], ["a", "b"]

        def __init__(self, root: Path, train: bool, download: bool = False) -> None:
            if not download and not held:
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            try:
                FileLock(root / ".cifar10.lock").acquire(timeout=0)
                held.append(False)
            except Timeout:
                held.append(True)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    assert len(build_source("cifar10", str(tmp_path), "train")) == 2
    assert len(build_source("cifar10", str(tmp_path), "train")) == 2  # it is there now
    assert held == [True, False]


def test_names_that_browsers_give_to_jpegs(tmp_path: Path, photos: Path) -> None:
    shutil.copy(photos / "train" / "circle" / "00.jpg", tmp_path / "download.jfif")
    assert len(build_source("folder", str(tmp_path), "pretrain")) == 1
