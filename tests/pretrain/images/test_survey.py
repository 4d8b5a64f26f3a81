"""Measuring a set of images, and joining several."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foundation.errors import UserError
from foundation.images import OpenImage, UnreadableImage
from pretrain.images import survey as surveys
from pretrain.images.paths import locate
from pretrain.images.sources import ArraySource, build_source
from pretrain.images.stream import Streaming
from pretrain.images.survey import check_readable, sample_indices, survey


def test_pixel_statistics_by_hand() -> None:
    half = np.zeros((4, 6, 3), np.uint8)
    half[:2, :, 0] = 255  # red in the upper half
    found = survey(ArraySource(np.stack([half] * 3), [0] * 3, ["one"]))
    assert (found.count, found.short_side, found.long_side, found.sampled) == (3, 4, 6, 3)
    assert found.mean == [0.5, 0, 0]
    assert found.std == [0.5, 0.02, 0.02]  # never 0, which nothing can be divided by
    assert not found.is_grey
    assert survey(ArraySource(np.full((2, 4, 4), 100, np.uint8), [0, 0], ["one"])).is_grey


def test_damaged_images_are_not_measured(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    found = survey(build_source("folder", str(tmp_path), "pretrain"))
    assert (found.count, found.sampled) == (2, 1)
    (tmp_path / "good.png").unlink()
    with pytest.raises(UserError, match="none of 1 images tried can be read"):
        survey(build_source("folder", str(tmp_path), "pretrain"))


class Damaged(ArraySource):
    """One-pixel images, of which every n-th cannot be read."""

    every = 100

    def open(self, index: int) -> OpenImage:
        if index % self.every == 0:
            raise UnreadableImage(f"{index}.jpg: not an image")
        return super().open(index)


def damaged_source(count: int) -> Damaged:
    return Damaged(np.zeros((count, 1, 1), np.uint8), [0] * count, ["one"])


def test_every_image_of_a_small_set_is_tried() -> None:
    source = damaged_source(260)  # of which 0, 100 and 200 are damaged
    with pytest.raises(
        UserError, match=r"^3 of 260 images cannot be read, more than DATA.MAX_UNREADABLE \(0.01\)"
    ) as one:
        check_readable(source, 0.01)
    assert all(f"{index}.jpg: not an image" in str(one.value) for index in (0, 100, 200))
    (line,) = check_readable(source, 3 / 260)
    assert "3 of 260 images cannot be read and are replaced by others" in line
    assert len(check_readable(damaged_source(1), 0.01)) == 1, "a fraction above 0 allows one damaged image"
    with pytest.raises(UserError, match=r"^1 of 1 images cannot be read, more than DATA.MAX_UNREADABLE \(0\)"):
        check_readable(damaged_source(1), 0.0)
    assert check_readable(ArraySource(np.zeros((9, 2, 2), np.uint8), [0] * 9, ["one"]), 0.0) == []


def test_a_large_set_is_judged_by_what_the_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    source = damaged_source(1_000_000)

    def judge(allowed: float) -> list[str]:
        clock = itertools.count()
        monkeypatch.setattr(surveys.time, "monotonic", lambda: next(clock))
        return check_readable(source, allowed, seconds=999)  # 1,000 images, at one a second

    (line,) = judge(0.01)  # about ten damaged ones: within three standard deviations of what is allowed
    assert "of 1,000 images tried (of 1,000,000) cannot be read" in line
    with pytest.raises(UserError, match=r"of 1,000 images tried \(of 1,000,000\) cannot be read, more than"):
        judge(0.001)


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
