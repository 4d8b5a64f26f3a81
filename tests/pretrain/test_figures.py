"""`python pretrain/figures.py`: what is read from a run, and what is drawn of it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain import figures, train
from pretrain.evaluation import plots


@pytest.fixture(scope="module")
def pretrained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("figures") / "run"
    tiny = ["DATA.NAME", "folder", "DATA.ROOT", str(photos), "DATA.IMAGE_SIZE", "32", "DATA.WORKERS", "0"]
    tiny += ["PROJECTOR.DIMS", "[16, 8]", "TRAIN.BATCH_SIZE", "8", "TRAIN.EPOCHS", "2", "TRAIN.PRECISION", "float32"]
    train.main(["--output", str(output), *tiny, "LOG.PERIOD", "1", "PROBE.EVERY", "1"])
    return output


def test_every_figure_as_png_and_svg(pretrained: Path, tmp_path: Path) -> None:
    figures.main([str(pretrained), "--output", str(tmp_path)])
    drawn = {path.name for path in tmp_path.iterdir() if path.suffix in (".png", ".svg")}
    assert drawn == {f"{name}.{suffix}" for name in figures.NAMES for suffix in ("png", "svg")}
    assert all((tmp_path / name).stat().st_size > 1000 for name in drawn)


def test_a_run_that_logged_nothing_for_a_figure_is_no_error(pretrained: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text((pretrained / "config.yaml").read_text())
    (bare / "metrics.json").write_text(json.dumps({"iteration": 0, "total": 1.0, "epoch": 0.5}) + "\n")
    figures.main([str(bare), "--only", "training,information,eigenvalues"])
    assert {path.name for path in (bare / "figures").glob("*.png")} == {"training.png"}


def test_the_probes_lines_get_the_epoch_of_their_step() -> None:
    lines = [
        {"iteration": 9, "epoch": 1.0, "ldmi": 3.0},
        {"iteration": 9, "knn_top1": 50.0},
        {"iteration": 19, "epoch": 2.0, "ldmi": 4.0},
        {"iteration": 19, "knn_top1": 60.0},
    ]
    assert np.array_equal(plots.series(lines, "ldmi"), [[1, 2], [3, 4]])
    figure = figures.information(lines)
    assert figure is not None
    left, right = figure.axes
    assert np.array_equal(left.lines[0].get_xydata(), [[1, 3], [2, 4]])
    assert np.array_equal(right.lines[0].get_xydata(), [[1, 50], [2, 60]])
    assert figures.information([{"iteration": 0, "epoch": 1.0, "total": 2.0}]) is None


def test_eigenvalues_are_those_of_the_run(pretrained: Path) -> None:
    figure = figures.eigenvalues({"run": pretrained})
    assert figure is not None
    (axes,) = figure.axes
    state = torch.load(pretrained / "checkpoints" / "last.pt", weights_only=True)
    expected = torch.linalg.eigvalsh(state["objective"]["covariance"][0]).flip(0)
    assert np.allclose(axes.lines[0].get_ydata(), expected.numpy(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("dims", "scale"), [((32, 64), "linear"), ((32, 1024), "log")])
def test_spectra_of_very_different_dimensions_are_all_seen(dims: tuple[int, int], scale: str) -> None:
    (axes,) = figures.plots.eigenvalue_spectra({str(dim): np.ones(dim) for dim in dims}).axes
    assert axes.get_xscale() == scale


def test_runs_of_a_sweep_are_told_apart(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tmp_path / name / "seed0" / "pretrain" for name in ("vicreg", "simclr")]
    for folder in runs:
        folder.parent.mkdir(parents=True)
        folder.symlink_to(pretrained)
    drawn = {}
    monkeypatch.setattr(figures.plots, "eigenvalue_spectra", drawn.update)
    figures.main([*map(str, runs), "--only", "eigenvalues", "--output", str(tmp_path / "figures")])
    assert list(drawn) == ["vicreg", "simclr"]


def test_bad_input_is_one_line(pretrained: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
    assert "not the directory of a pretraining run" in error_of(figures.main, [str(tmp_path)])
    assert "'nosuch' is not one of training" in error_of(figures.main, [str(pretrained), "--only", "nosuch"])
    moved = [str(pretrained), "--only", "views", "--root", str(tmp_path / "no"), "--output", str(tmp_path)]
    assert "does not exist" in error_of(figures.main, moved)
