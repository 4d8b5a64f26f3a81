"""`--dry-run` and `--check-data`: what they print, that they leave no run behind, and what they refuse."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain import train
from pretrain.plan import text_curve

SETTINGS = [
    *("DATA.NAME", "folder", "DATA.IMAGE_SIZE", "32", "TRAIN.BATCH_SIZE", "10", "PROJECTOR.DIMS", "[16, 8]"),
    *("TRAIN.EPOCHS", "10", "TRAIN.WARMUP_EPOCHS", "1", "TRAIN.WARMUP_LR", "0.003", "TRAIN.LR", "0.5"),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_dry_run_says_what_a_recipe_comes_to(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun would
    train.main(["--dry-run", *SETTINGS, "DATA.ROOT", str(photos), "TRAIN.MICRO_BATCH", "2", "DATA.WORKERS", "0"])
    printed = capsys.readouterr().out
    lines = {line[:18].strip(): line[18:] for line in printed.splitlines()}
    assert "  BATCH_SIZE: 10\n" in printed
    assert lines["batch"] == "10 = 2 process(es) x 5, each in 3 pass(es)"
    assert lines["epoch"] == "2 steps; 4 of 24 images are left out, others each time"
    assert lines["steps"] == "20 of 20 (10 epochs)"
    # Warm-up is one epoch, so two steps: from 0.003 half way to 0.5.
    assert lines["first"] == "0.003 (step 0)"
    assert lines["last of warm-up"] == "0.2515 (step 1)"
    assert lines["first after it"] == "0.5 (step 2)"
    assert lines["middle"].endswith("(step 10)")
    assert lines["last"] == "1e-06 (step 19)"
    # ResNet-18 without its classifier has 11,176,512 parameters; 512 x 16, two of BatchNorm's, 16 x 8 and 8.
    assert lines["parameters"] == "11,184,872 (encoder 11,176,512, projector 8,360)"
    assert lines["memory"].startswith("134.3 MB")
    assert not (tmp_path / "output").exists()


def test_a_curve_shows_its_shape() -> None:
    assert text_curve(lambda step: step / 7, 8, width=8) == "▁▂▃▄▅▆▇█"
    assert text_curve(lambda step: 0.0, 8, width=4) == "▁▁▁▁"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_check_data_lists_every_bad_file(
    workers: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, error_of: Callable
) -> None:
    arguments = ["--check-data", *SETTINGS, "DATA.WORKERS", workers, "DATA.ROOT"]
    train.main([*arguments, str(photos)])
    assert "all 24 images can be read" in capsys.readouterr().out
    folder = tmp_path / "images"
    folder.mkdir()
    for path in (photos / "train" / "circle").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "00.jpg").write_bytes(b"")
    (folder / "07.jpg").write_text("<html>")
    (folder / "11.jpg").write_bytes((folder / "11.jpg").read_bytes()[:300])
    assert error_of(train.main, [*arguments, str(folder)]) == "3 of 12 images cannot be read; they are listed above"
    listed = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines() if ".jpg" in line]
    assert listed == [str(folder / name) for name in ("00.jpg", "07.jpg", "11.jpg")]
    assert not (tmp_path / "output").exists()
