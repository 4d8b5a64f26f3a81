"""Transfer to other sets: mAP on a case worked out by hand, the choice of the regularisation, VOC's layout."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from foundation.errors import UserError
from pretrain import transfer
from pretrain.encoder import build_encoder
from pretrain.evaluation import transfer as protocols
from pretrain.evaluation.transfer import logistic_regression, voc07_svm
from pretrain.images.sources import build_source
from pretrain.images.voc07 import IGNORED, MultiLabelSource, read_voc07
from pretrain.runs.weights import write_encoder


def test_map_by_hand() -> None:
    # Features on a quarter circle: the class is at 0 degrees, the rest at 90, so the score falls with the angle.
    def at(*degrees: float) -> np.ndarray:
        radians = np.radians(degrees)
        return 3 * np.stack([np.cos(radians), np.sin(radians)], axis=1)

    train = at(0, 2, 4, 86, 88, 90)
    train_present = np.array([[1, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1]])
    test = at(10, 30, 50, 70, 80)
    # First class, ranked from 10 to 80 degrees: 1, 0, 1, 0, ignored -> (1/1 + 2/3) / 2.
    # Second class, ranked from 80 to 10 degrees: 0, 1, 0, 0, 1 -> (1/2 + 2/5) / 2.
    test_present = np.array([[1, 1], [0, 0], [1, 0], [0, 1], [IGNORED, 0]])
    found = voc07_svm(train, train_present, test, test_present)
    assert found["ap"] == pytest.approx([100 * (1 + 2 / 3) / 2, 100 * (1 / 2 + 2 / 5) / 2])
    assert found["map"] == pytest.approx(sum(found["ap"]) / 2)


def test_regularisation_is_chosen_on_images_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # One feature tells the class, four are noise. With C = 1e-6 it only learns that class 0 is two in three.
    rng = np.random.default_rng(0)
    labels = np.maximum(np.arange(60) % 6 - 3, 0)
    rows = np.concatenate([labels[:, None] * 4.0 + rng.normal(0, 0.3, (60, 1)), rng.normal(0, 1, (60, 4))], axis=1)
    seen: list[int] = []
    fit = protocols._fit
    monkeypatch.setattr(protocols, "_fit", lambda rows, labels, c: seen.append(len(rows)) or fit(rows, labels, c))
    found = logistic_regression(rows, labels, rows, labels, seed=0, strengths=(1e-6, 1.0, 100.0))
    assert seen == [54, 54, 54, 60]  # a tenth is held out, then all are used
    assert found["held_out"].keys() == {"1e-06", "1", "100"}
    assert found["held_out"]["1e-06"] == pytest.approx(100 * 4 / 6)
    assert found["held_out"][f"{found['c']:g}"] == 100
    assert found["c"] > 1e-6
    assert found["top1"] > 95


@pytest.fixture
def voc(photos: Path, tmp_path: Path) -> Path:
    """VOC's layout with two classes: `circle` in the first half of the images, `square` in the second."""
    root = tmp_path / "VOC2007"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, source in (("trainval", "train"), ("test", "val")):
        images = sorted((photos / source).rglob("*.jpg"))
        names = [f"{split}{i:03d}" for i in range(len(images))]
        for name, path in zip(names, images, strict=True):
            shutil.copy(path, root / "JPEGImages" / f"{name}.jpg")
        for number, label in enumerate(("circle", "square")):
            values = [1 if (i >= len(names) / 2) == bool(number) else -1 for i in range(len(names))]
            values[0] = 0
            lines = [f"{name} {value:2d}\n" for name, value in zip(names, values, strict=True)]
            (root / "ImageSets" / "Main" / f"{label}_{split}.txt").write_text("".join(lines))
    return root


def test_vocs_layout(voc: Path) -> None:
    trainval, test = read_voc07(voc, ("circle", "square"))
    assert (len(trainval), len(test)) == (24, 8)
    assert trainval.present[:, 0].tolist() == [IGNORED] + [1] * 11 + [0] * 12
    assert trainval.present[:, 1].tolist() == [IGNORED] + [0] * 11 + [1] * 12
    assert trainval.name(3).endswith("trainval003.jpg")
    with pytest.raises(UserError, match=r"cat_trainval.txt does not exist"):
        read_voc07(voc, ("circle", "cat"))
    (voc / "JPEGImages" / "test005.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 8 images of test are missing, .*test005.jpg"):
        read_voc07(voc, ("circle", "square"))
    (voc / "ImageSets" / "Main" / "square_test.txt").write_text("other 1\n")
    with pytest.raises(UserError, match=r"square_test.txt names different images"):
        read_voc07(voc, ("circle", "square"))
    (voc / "ImageSets" / "Main" / "circle_test.txt").write_text("other\n")
    with pytest.raises(UserError, match=r"circle_test.txt: each line must be"):
        read_voc07(voc, ("circle", "square"))


@pytest.mark.parametrize(
    ("positives", "said"), [(2, "2 of the 24 images of trainval show 'circle'"), (22, "2 .* lack")]
)
def test_a_class_that_the_folds_cannot_share_is_refused(
    positives: int, said: str, voc: Path, tmp_path: Path, error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.images.voc07.read_voc07", lambda root: read_voc07(root, ("circle",)))
    path = voc / "ImageSets" / "Main" / "circle_trainval.txt"
    names = [line.split()[0] for line in path.read_text().splitlines()]
    path.write_text("".join(f"{name} {1 if i < positives else -1}\n" for i, name in enumerate(names)))
    message = error_of(transfer.main, [*TINY, "--voc07", str(voc), "--output", str(tmp_path / "never")])
    assert re.search(said, message)
    assert "the cross-validation needs 3" in message
    assert not (tmp_path / "never").exists()


TINY = ["--weights", "random", "--encoder", "resnet18", "--image-size", "32", "--workers", "0"]


def test_both_commands(photos: Path, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.images.voc07.read_voc07", lambda root: read_voc07(root, ("circle", "square")))
    transfer.main([*TINY, "--data", str(photos), "--output", str(tmp_path / "a")])
    transfer.main([*TINY, "--voc07", str(voc), "--output", str(tmp_path / "b")])
    a, b = (json.loads((tmp_path / run / "results.json").read_text()) for run in "ab")
    assert (a["kind"], a["init"], a["encoder"]) == ("transfer", "random", "resnet18")
    assert (a["image_size"], a["stem"]) == (32, "imagenet")
    assert 0 <= a["top1"] <= 100
    assert b["ap"].keys() == {"circle", "square"}
    assert b["map"] == pytest.approx(sum(b["ap"].values()) / 2)


@pytest.mark.parametrize(("best", "message"), [(1e-6, True), (1.0, False), (1e4, True)])
def test_a_choice_at_the_end_of_the_grid_is_logged(
    best: float, message: bool, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held_out = {f"{c:g}": 90.0 if c == best else 50.0 for c in protocols.STRENGTHS}
    found = {"top1": 80.0, "c": best, "held_out": held_out}
    monkeypatch.setattr(protocols, "logistic_regression", lambda *_, **__: found)
    caplog.set_level("INFO", "pretrain")
    source = build_source("folder", str(photos), "val")
    rows = np.zeros((len(source), 2)), np.asarray(source.labels)
    protocols.evaluate_folder(source, source, lambda _: rows, 0)
    text = f"C {best:g} is at the end of its grid, 1e-06 to 10000: a better value may lie beyond it; 1 of the 11 values"
    assert (text in caplog.text) == message
    svm = {"map": 50.0, "ap": [40.0, 60.0], "c": [1.0, 1000.0]}
    monkeypatch.setattr(protocols, "voc07_svm", lambda *_: svm)
    some = MultiLabelSource([], [], ["circle", "square"], np.zeros((0, 2)))
    protocols.evaluate_voc07(some, some, lambda _: rows)
    assert "C is at the end of its grid, 0.01 to 1000, for 1 of the classes: square" in caplog.text


def test_crops_are_as_large_as_the_views_of_the_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocols, "evaluate_folder", lambda *_, **__: {"top1": 2.0})
    run = tmp_path / "run"
    run.mkdir()
    encoder = build_encoder("resnet18", "imagenet")
    write_encoder(run, encoder, objective="x", name="resnet18", stem="imagenet", mean=[0.5] * 3, std=[0.2] * 3)
    shutil.copy(run / "encoder.safetensors", tmp_path / "alone.safetensors")
    (run / "config.yaml").write_text("DATA: {IMAGE_SIZE: 48}")
    cases = [
        (run, [], 48),
        (run / "encoder.safetensors", [], 48),
        (run, ["--image-size", "32"], 32),
        (tmp_path / "alone.safetensors", [], 224),
        ("random", ["--encoder", "resnet18"], 224),
    ]
    for number, (weights, more, side) in enumerate(cases):
        output = tmp_path / str(number)
        common = ["--weights", str(weights), "--data", str(photos), "--output", str(output), "--workers", "0"]
        transfer.main([*common, *more])
        assert json.loads((output / "results.json").read_text())["image_size"] == side


def test_results_of_another_evaluation_are_not_replaced(
    photos: Path, tmp_path: Path, error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results.json"
    results.write_text('{"kind": "transfer", "weights": "random", "top1": 1.0}')  # of a version without image_size
    monkeypatch.setattr(protocols, "evaluate_folder", lambda *_, **__: {"top1": 2.0})
    command = ["--encoder", "resnet18", "--image-size", "32", "--workers", "0", "--data", str(photos)]
    transfer.main([*command, "--output", str(tmp_path), "--weights", "random"])
    before = results.read_bytes()
    assert b'"top1": 2.0' in before
    for other in (["--seed", "1"], ["--image-size", "40"]):
        message = error_of(transfer.main, [*command, *other, "--output", str(tmp_path), "--weights", "random"])
        assert "holds the results of another evaluation" in message
    assert results.read_bytes() == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    message = error_of(transfer.main, [*command, "--output", str(tmp_path / "run"), "--weights", "random"])
    assert "holds a run" in message


def test_bad_input_is_one_line(photos: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
    assert "either --data or --voc07" in error_of(transfer.main, TINY)
    assert "either --data or --voc07" in error_of(transfer.main, [*TINY, "--data", "a", "--voc07", "b"])
    assert error_of(transfer.main, [*TINY, "--data", str(tmp_path / "no")]).endswith(
        "/train does not exist; check --data"
    )
    assert "aeroplane_trainval.txt does not exist" in error_of(transfer.main, [*TINY, "--voc07", str(tmp_path)])
    assert "--image-size must be at least 1" in error_of(transfer.main, [*TINY, "--data", "x", "--image-size", "0"])
    assert "--workers must be at least 0" in error_of(transfer.main, [*TINY, "--data", str(photos), "--workers", "-1"])
    assert "--seed must be at least 0" in error_of(transfer.main, [*TINY, "--data", str(photos), "--seed", "-1"])
    assert "--seed must be at most" in error_of(transfer.main, [*TINY, "--data", str(photos), "--seed", str(2**32)])
    shutil.copytree(photos / "val", tmp_path / "few" / "val")
    for folder in (photos / "train").iterdir():
        (tmp_path / "few" / "train" / folder.name).mkdir(parents=True)
        shutil.copy(next(folder.rglob("*.jpg")), tmp_path / "few" / "train" / folder.name)
    assert "one training image only" in error_of(transfer.main, [*TINY, "--data", str(tmp_path / "few")])
    assert "name it with --encoder" in error_of(transfer.main, ["--weights", "random", "--data", str(photos)])
