"""Labelled splits of a dataset and fractions of them: counts by hand, lists, and wrong input."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from foundation.errors import UserError
from pretrain.images import labelled
from pretrain.images.labelled import Subset, build_labelled_splits, class_balanced, listed, read_list
from pretrain.images.sources import build_source


def test_counts_of_a_fraction_in_each_class() -> None:
    labels = [0] * 100 + [1] * 50 + [2] * 3
    chosen = class_balanced(labels, 0.1, seed=0)
    assert np.bincount(np.asarray(labels)[chosen]).tolist() == [10, 5, 1]  # of 3 a tenth is none: one stays
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert np.bincount(np.asarray(labels)[class_balanced(labels, 0.25, seed=0)]).tolist() == [25, 13, 1]
    assert class_balanced(labels, 1.0, seed=0).tolist() == list(range(153))


def test_a_fraction_depends_on_the_seed_alone_and_grows() -> None:
    labels = list(range(4)) * 50
    few, more = class_balanced(labels, 0.1, seed=3), class_balanced(labels, 0.3, seed=3)
    assert np.array_equal(few, class_balanced(labels, 0.1, seed=3))
    assert not np.array_equal(few, class_balanced(labels, 0.1, seed=4))
    assert set(few) < set(more)


def test_any_labelled_folder_is_split_for_monitoring(photos: Path, tmp_path: Path) -> None:
    reference, queries = labelled.split_labelled_folder(str(photos))  # by its own train/ and val/
    assert (len(reference), len(queries)) == (24, 8)
    reference, queries = labelled.split_labelled_folder(str(photos / "train"))  # 12 images of each of two classes
    assert np.bincount(reference.labels).tolist() == [10, 10]
    assert np.bincount(queries.labels).tolist() == [2, 2]
    names = [{part.name(i) for i in range(len(part))} for part in (reference, queries)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 24
    with pytest.raises(UserError, match=r"PROBE\.ROOT: .*no labels"):
        labelled.split_labelled_folder(str(photos / "train" / "circle"))
    shutil.copytree(photos / "train" / "circle", tmp_path / "only" / "circle")
    with pytest.raises(UserError, match="has one class only, 'circle'"):
        labelled.split_labelled_folder(str(tmp_path / "only"))
    for name in ("circle", "square"):
        (tmp_path / "few" / name).mkdir(parents=True)
        for i in range(2):
            shutil.copy(photos / "train" / name / f"{i:02d}.jpg", tmp_path / "few" / name)
    with pytest.raises(UserError, match="a class of three or more"):
        labelled.split_labelled_folder(str(tmp_path / "few"))


def test_a_subset_keeps_images_and_labels(photos: Path) -> None:
    source = build_source("folder", str(photos), "train")
    subset = Subset(source, np.array([20, 3]))
    assert len(subset) == 2
    assert subset.labels.tolist() == [1, 0]
    assert subset.classes == ["circle", "square"]
    assert subset.name(0) == source.name(20)
    assert np.array_equal(subset.open(1).decode(), source.open(3).decode())


def test_files_by_list(photos: Path, tmp_path: Path) -> None:
    # The files of both classes have the same names here, so make them unique, as those of ImageNet are.
    for path in sorted((photos / "train").rglob("*.jpg")):
        target = tmp_path / "train" / path.parent.name / f"{path.parent.name}_{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    source = build_source("folder", str(tmp_path), "train")
    chosen = listed(source, ["square_02.jpg", "circle_11.jpg"], "list.txt")
    assert [Path(source.name(i)).name for i in chosen] == ["circle_11.jpg", "square_02.jpg"]
    with pytest.raises(UserError, match=r"list.txt names 1 file, of 2 in all, .* for example nothere.jpg"):
        listed(source, ["square_02.jpg", "nothere.jpg"], "list.txt")
    with pytest.raises(UserError, match=r"list.txt names no file; give one file name a line"):
        listed(source, [], "list.txt")
    with pytest.raises(UserError, match=r"list.txt names circle_11.jpg more than once"):
        listed(source, ["circle_11.jpg", "square_02.jpg", "circle_11.jpg"], "list.txt")
    with pytest.raises(UserError, match=r"list.txt names 02.jpg, but 2 training images are called so"):
        listed(build_source("folder", str(photos), "train"), ["02.jpg"], "list.txt")


def test_a_list_must_be_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "list.txt"
    file.write_text("a.JPEG\nb.JPEG\n\n")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert read_list(str(file), "", digest) == ["a.JPEG", "b.JPEG"]
    with pytest.raises(UserError, match="not the file expected"):
        read_list(str(file), "", "0" * 64)
    with pytest.raises(UserError, match=r"does not exist; it is published at https://x/y"):
        read_list(str(tmp_path / "no.txt"), "https://x/y", digest)
    monkeypatch.setattr(labelled, "LIST_CACHE", tmp_path / "cache")
    assert read_list("", file.as_uri(), digest) == ["a.JPEG", "b.JPEG"]
    assert read_list("", "file:///gone", digest) == ["a.JPEG", "b.JPEG"]  # kept from the first time
    with pytest.raises(UserError, match="cannot fetch file:///gone"):
        read_list("", "file:///gone", "1" * 64)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text("a.JP")  # a process that was killed left half of it
    assert read_list("", file.as_uri(), digest) == ["a.JPEG", "b.JPEG"]
    assert kept.read_bytes() == file.read_bytes()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(labelled, "LIST_CACHE", tmp_path / "file" / "cache")  # where nothing can be kept
    assert read_list("", file.as_uri(), digest) == ["a.JPEG", "b.JPEG"]


def test_splits_must_have_the_same_classes(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "a")
    (tmp_path / "a" / "val" / "square").rename(tmp_path / "a" / "val" / "triangle")
    with pytest.raises(UserError, match=r"differ: 'square', 'triangle' are in one of them only"):
        build_labelled_splits("folder", str(tmp_path / "a"))
    shutil.copytree(photos / "train" / "circle", tmp_path / "b" / "train")
    shutil.copytree(photos / "val", tmp_path / "b" / "val")
    with pytest.raises(UserError, match="have no labels: one folder per class is expected"):
        build_labelled_splits("folder", str(tmp_path / "b"))
    for split in ("train", "val"):
        shutil.copytree(photos / split / "circle", tmp_path / "c" / split / "circle")
    with pytest.raises(UserError, match="one class only, 'circle'"):
        build_labelled_splits("folder", str(tmp_path / "c"))
