"""`pretrain/embed.py`: features with names, neighbours, and near-duplicates that were made on purpose."""

import csv
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain import embed
from pretrain.evaluation import embedding
from pretrain.evaluation.embedding import THUMBNAIL, Embedded, near_duplicates
from pretrain.images.sources import ArraySource


def scenes(folder: Path, count: int, seed: int) -> list[Image.Image]:
    """Different smooth pictures, as photographs are smooth."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    pictures = []
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        pictures.append(small.resize((96, 96), Image.Resampling.BICUBIC))
        pictures[-1].save(folder / f"{i}.png")
    return pictures


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Ten pictures; and a test folder of five others, a smaller JPEG of picture 3, and picture 7 a little brighter."""
    pictures = scenes(tmp_path / "own", 10, seed=0)
    scenes(tmp_path / "test", 5, seed=1)
    pictures[3].resize((48, 48)).save(tmp_path / "test" / "copy.jpg", quality=60)
    brighter = np.asarray(pictures[7]).astype(int) + 10
    Image.fromarray(brighter.clip(0, 255).astype(np.uint8)).save(tmp_path / "test" / "frame.png")
    return tmp_path / "own", tmp_path / "test"


def rows(output: Path) -> list[list[str]]:
    with (output / "duplicates.csv").open() as file:
        return list(csv.reader(file))[1:]


def test_features_neighbours_and_duplicates(folders: tuple[Path, Path], tmp_path: Path) -> None:
    own, test = folders
    output = tmp_path / "out"
    common = ["--weights", "random", "--size", "32", "--workers", "0", "--output", str(output)]
    embed.main([str(own), "--against", str(test), *common])
    features = np.load(output / "features.npy")
    assert features.shape == (10, 512)
    assert features.dtype == np.float32
    assert (output / "names.txt").read_text().splitlines() == [str(own / f"{i}.png") for i in range(10)]
    assert {tuple(row[:2]) for row in rows(output)} == {
        (str(own / "3.png"), str(test / "copy.jpg")),
        (str(own / "7.png"), str(test / "frame.png")),
    }
    for name in ("neighbours.png", "duplicates.png"):
        with Image.open(output / name) as image:
            assert image.width > 200
    embed.main([str(own), *common])  # within: none, and what is left from before goes
    assert rows(output) == []
    assert not (output / "duplicates.png").exists()
    assert np.array_equal(np.load(output / "features.npy"), features)


def test_sheets_name_the_files_with_ranks_and_similarities_and_frame_nothing(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of nested folders are not classes that an image could be right or wrong about."""
    for number in range(10):
        name = "2019-08-12_holiday_in_the_mountains.png" if number == 3 else f"{number}.png"
        (tmp_path / "nested" / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(folders[0] / f"{number}.png", tmp_path / "nested" / f"{number % 2}" / name)
    drawn = {}
    monkeypatch.setattr(embedding, "_save", lambda figure, path: drawn.setdefault(path.name, figure))
    common = ["--weights", "random", "--size", "32", "--workers", "0", "--output", str(tmp_path / "out")]
    embed.main([str(tmp_path / "nested"), "--against", str(folders[1]), *common])
    sheet = drawn["neighbours.png"]
    assert not any(spine.get_visible() for axes in sheet.axes for spine in axes.spines.values())
    names = (tmp_path / "out" / "names.txt").read_text().splitlines()
    first, nearest, *_ = [axes.get_xlabel() for axes in sheet.axes]
    assert first == "0/0.png"
    features = torch.from_numpy(np.load(tmp_path / "out" / "features.npy"))
    similar = torch.nn.functional.cosine_similarity(features[:1], features[1:])
    best = Path(names[1 + int(similar.argmax())])
    assert nearest == f"{embedding._shown(str(best))}\n1: {similar.max():.3f}"
    long = embedding._shown("/a/1/2019-08-12_holiday_in_the_mountains.png")
    assert long == "…_the_mountains.png"
    pairs = [axes.get_xlabel() for axes in drawn["duplicates.png"].axes]
    (pair,) = [row for row in rows(tmp_path / "out") if row[1].endswith("copy.jpg")]
    assert f"test/copy.jpg\n{pair[2]}" in pairs
    assert "…2019-08-12_holiday_in_the_mountains.png"[-30:] in "".join(pairs)


def test_a_name_that_is_not_unicode_and_a_full_disk(
    folders: tuple[Path, Path], tmp_path: Path, error_of: Callable, files_up_to: Callable
) -> None:
    odd = os.path.join(os.fsencode(tmp_path), b"one", b"\xe4.png")
    (tmp_path / "one").mkdir()
    shutil.copy(folders[0] / "0.png", odd)
    common = ["--weights", "random", "--size", "32", "--workers", "0", "--output", str(tmp_path / "out")]
    embed.main([str(tmp_path / "one"), "--against", str(tmp_path / "one"), *common])
    assert (tmp_path / "out" / "names.txt").read_bytes() == odd + b"\n"
    assert odd in (tmp_path / "out" / "duplicates.csv").read_bytes()
    with files_up_to(1000):
        assert "out: File too large" in error_of(embed.main, [str(tmp_path / "one"), *common])


def test_damaged_images_are_left_out_and_have_no_duplicates(
    folders: tuple[Path, Path], tmp_path: Path, error_of: Callable
) -> None:
    own, _ = folders
    for damaged in "457":
        (own / f"{damaged}.png").write_bytes(b"")
    output = tmp_path / "out"
    argv = [str(own), "--weights", "random", "--size", "32", "--workers", "0", "--output", str(output)]
    embed.main(argv)
    assert rows(output) == []
    names = (output / "names.txt").read_text().splitlines()
    assert [Path(name).stem for name in names] == list("0123689")
    assert len(np.load(output / "features.npy")) == 7
    log = (output / "log.txt").read_text()
    assert "3 of 10 images cannot be read and are left out" in log
    assert "replaced" not in log
    for path in own.glob("*.png"):
        path.write_bytes(b"")
    assert "cannot be read" in error_of(embed.main, argv)


def test_pairs_within_a_folder_are_named_once() -> None:
    thumbnails = torch.randn(6, 3 * THUMBNAIL**2, generator=torch.Generator().manual_seed(0))
    thumbnails[4] = 2 * thumbnails[1]
    source = ArraySource(np.zeros((6, 4, 4, 3), np.uint8), [0] * 6, ["one"])
    (pair,) = near_duplicates(Embedded(source, torch.eye(6), thumbnails), None, threshold=0.95)
    assert (pair.first, pair.second, pair.similarity) == (1, 4, 0)
    assert pair.correlation == pytest.approx(1, abs=1e-5)


def test_of_many_alike_each_is_in_a_pair() -> None:
    """The last image has duplicates, but each of them has as many nearer ones as are looked at."""
    noise = torch.randn(9, 3 * THUMBNAIL**2, generator=torch.Generator().manual_seed(0))
    thumbnails = noise[0] + 0.01 * noise
    thumbnails[8] = noise[0] + 0.1 * noise[8]
    source = ArraySource(np.zeros((9, 4, 4, 3), np.uint8), [0] * 9, ["one"])
    pairs = near_duplicates(Embedded(source, torch.ones(9, 2), thumbnails), None, threshold=0.95)
    assert {image for pair in pairs for image in (pair.first, pair.second)} == set(range(9))
    assert all(pair.first < pair.second for pair in pairs)
    assert len({(pair.first, pair.second) for pair in pairs}) == len(pairs)


def test_bad_input(folders: tuple[Path, Path], tmp_path: Path, error_of: Callable) -> None:
    own, test = folders
    common = ["--output", str(tmp_path / "out")]
    assert "do not exist" in error_of(embed.main, [str(own), "--weights", "gone.pt", *common])
    assert "there is no folder or tar" in error_of(embed.main, ["gone", "--weights", "random", *common])
    for outside, inside in ((own, test), (test, own)):  # where the next call would take the sheet for a photograph
        argv = [str(outside), "--against", str(inside), "--weights", "random", "--output", str(inside / "sheets")]
        assert f"sheets, among the images of {inside}: choose another folder" in error_of(embed.main, argv)
    assert not (own / "sheets").exists()
    assert not (tmp_path / "out").exists(), "a wrong path leaves no folder"
    for option, value in (("--threshold", "2"), ("--workers", "-1"), ("--size", "-5"), ("--size", "5000")):
        assert option in error_of(embed.main, [str(own), "--weights", "random", option, value])
