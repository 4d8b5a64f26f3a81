"""Measuring a set of images, and joining several."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foundation.errors import UserError
from pretrain.images.paths import locate
from pretrain.images.sources import ArraySource, build_source
from pretrain.images.stream import Streaming
from pretrain.images.survey import sample_indices, survey


def test_pixel_statistics_by_hand() -> None:
    half = np.zeros((4, 6, 3), np.uint8)
    half[:2, :, 0] = 255  # red in the upper half
    found = survey(ArraySource(np.stack([half] * 3), [0] * 3, ["one"]))
    assert (found.count, found.short_side, found.long_side, found.sampled) == (3, 4, 6, 3)
    assert found.mean == [0.5, 0, 0]
    assert found.std == [0.5, 0.02, 0.02]  # never 0, which nothing can be divided by
    assert not found.is_grey
    assert survey(ArraySource(np.full((2, 4, 4), 100, np.uint8), [0, 0], ["one"])).is_grey


def test_damaged_images_are_counted(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    found = survey(build_source("folder", str(tmp_path), "pretrain"))
    assert (found.damaged, found.sampled) == (1, 1)
    (tmp_path / "good.png").unlink()
    with pytest.raises(UserError, match="none of 1 images tried can be read"):
        survey(build_source("folder", str(tmp_path), "pretrain"))


def test_several_folders_are_one_source(photos: Path) -> None:
    parts = [photos / "train" / "square", photos / "val"]
    name, root = locate([str(part) for part in parts])
    source = build_source(name, root, "pretrain")
    separate = [build_source("folder", str(part), "pretrain") for part in parts]
    assert len(source) == 12 + 8
    assert [source.name(i) for i in range(20)] == [one.name(i) for one in separate for i in range(len(one))]
    assert np.array_equal(source.open(13).decode(), separate[1].open(1).decode())
    assert set(source.labels) == {-1}


def test_of_remote_tars_one_is_enough(root: str, site: Any, tmp_path: Path) -> None:
    source = build_source("webdataset", root, "pretrain", streaming=Streaming(str(tmp_path), 1.0))
    assert len(source) == 24
    assert sample_indices(source, 3) == [0, 2, 3]  # of the four in the first tar
    local = ArraySource(np.zeros((9, 2, 2), np.uint8), [0] * 9, ["one"])
    assert sample_indices(local, 3) == [0, 4, 8]


def test_several_tars_are_one_source(folder: Path) -> None:
    tars = sorted((folder / "train").glob("*.tar"))[:3]
    name, root = locate([str(tar) for tar in tars])
    assert name == "webdataset"
    assert len(build_source(name, root, "pretrain")) == 12
    assert locate([str(folder)]) == ("webdataset", str(folder))
    assert locate(["https://h/a.tar", "s3://b/c.tar"]) == ("webdataset", "{https://h/a,s3://b/c}.tar")
    assert len(build_source(*locate([str(folder / "train"), str(folder / "val")]), "pretrain")) == 24 + 8
