"""Where images come from: layouts on disk, labels, and what is said when they are not as expected."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.errors import UserError
from pretrain.data import UNLABELED, build_source


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
    assert source.read(0).shape[2] == 3


def test_links_other_files_and_odd_names(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "a" / "b c").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "b c" / "ü.PNG")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "linked").symlink_to(photos / "train" / "circle")
    assert len(build_source("folder", str(tmp_path), "pretrain")) == 13


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
    assert np.array_equal(source.read(1), pixels[784:].reshape(28, 28, 1).repeat(3, 2))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz"):
        build_source("fashion_mnist", str(tmp_path), "train")


def test_errors_name_the_folder(tmp_path: Path) -> None:
    for name, root, message in [
        ("folder", "", "DATA.ROOT is empty"),
        ("folder", str(tmp_path / "gone"), "gone does not exist"),
        ("folder", str(tmp_path), "there is no image below"),
        ("imagenet1k", str(tmp_path), "train does not exist"),
        ("imagenet", str(tmp_path), "is not one of"),
    ]:
        with pytest.raises(UserError) as caught:
            build_source(name, root, "pretrain")
        assert message in str(caught.value)
