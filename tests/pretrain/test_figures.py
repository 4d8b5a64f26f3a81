"""`python pretrain/figures.py`: what is read from a run, and what is drawn of it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pretrain import figures as command
from pretrain import objectives, train
from pretrain.config import get_defaults
from pretrain.evaluation import figures, plots
from pretrain.images.files import FileSource
from pretrain.images.labelled import Subset
from pretrain.images.sources import ArraySource
from tests.pretrain.tiny_encoder import use_tiny_encoder


@pytest.fixture(scope="module")
def pretrained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    output = tmp_path_factory.mktemp("figures") / "run"
    tiny = ["DATA.NAME", "folder", "DATA.ROOT", str(photos), "DATA.IMAGE_SIZE", "32", "DATA.WORKERS", "0"]
    tiny += ["PROJECTOR.DIMS", "[16, 8]", "TRAIN.BATCH_SIZE", "8", "TRAIN.EPOCHS", "2", "TRAIN.PRECISION", "float32"]
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_encoder(patch)
        train.main(["--output", str(output), *tiny, "LOG.PERIOD", "1", "PROBE.EVERY", "1"])
        yield output


def test_every_figure_as_png_and_svg(pretrained: Path, tmp_path: Path) -> None:
    command.main([str(pretrained), "--output", str(tmp_path)])
    drawn = {path.name for path in tmp_path.iterdir() if path.suffix in (".png", ".svg")}
    assert drawn == {f"{name}.{suffix}" for name in figures.NAMES for suffix in ("png", "svg")}
    assert all((tmp_path / name).stat().st_size > 1000 for name in drawn)


def test_a_run_that_logged_nothing_for_a_figure_is_no_error(pretrained: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text((pretrained / "config.yaml").read_text())
    (bare / "metrics.json").write_text(json.dumps({"iteration": 0, "total": 1.0, "epoch": 0.5}) + "\n")
    command.main([str(bare), "--only", "training,information,eigenvalues"])
    assert {path.name for path in (bare / "figures").glob("*.png")} == {"training.png"}


def test_damaged_lines_cost_themselves(pretrained: Path, tmp_path: Path) -> None:
    """The last spectrum that is whole is drawn, and curves leave out what is no number."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text((pretrained / "config.yaml").read_text())
    good = (pretrained / "metrics.json").read_bytes()
    bad = b'5\n{}\n\xff\n{"iteration": 3, "epoch": "x", "total": 1}\n{"iteration": 4, "epoch": 1, "total": [1]}\n'
    (run / "metrics.json").write_bytes(good + bad + b"[" * 100_000)
    spectra = [{"eigenvalues": [[2.0, 1.0], [1.0, 1.0]]}, {}, {"eigenvalues": 3}, {"eigenvalues": [["x"]]}]
    (run / "spectrum.json").write_text("".join(json.dumps({"iteration": 1, **each}) + "\n" for each in spectra) + "5\n")
    command.main([str(run), "--only", "training,information,eigenvalues"])
    assert {path.stem for path in (run / "figures").glob("*.png")} == {"training", "information", "eigenvalues"}
    figure = figures.eigenvalues({"run": run})
    assert figure is not None
    assert figure.axes[0].lines[0].get_ydata().tolist() == [2.0, 1.0]


def test_the_probes_lines_get_the_epoch_of_their_step() -> None:
    lines = [
        {"iteration": 9, "epoch": 1.0, "ldmi": 3.0},
        {"iteration": 9, "knn_top1": 50.0},
        {"iteration": 19, "epoch": 2.0, "ldmi": 4.0},
        {"iteration": 19, "knn_top1": 60.0},
    ]
    assert np.array_equal(plots.series(lines, "ldmi"), [[1, 2], [3, 4]])
    figure = figures.information(lines, dim=8)
    assert figure is not None
    left, right = figure.axes
    assert np.array_equal(left.lines[0].get_xydata(), [[1, 3], [2, 4]])
    assert np.array_equal(right.lines[0].get_xydata(), [[1, 50], [2, 60]])
    assert figures.information([{"iteration": 0, "epoch": 1.0, "total": 2.0}], dim=8) is None


def test_curves_of_collapse_are_drawn_and_no_empty_axis() -> None:
    lines = [{"iteration": 9, "epoch": 1.0, "effective_rank": 5.0, "ldmi": 3.0}]
    panels = {
        axes.get_title(): axes.lines[0].get_xydata().tolist() for axes in plots.training_curves({"a": lines}).axes
    }
    assert panels["effective rank"] == [[1, 5]]
    assert panels["LDMI (nats)"] == [[1, 3]]
    figure = figures.information(lines, dim=8)
    assert figure is not None
    assert [[axes.spines[side].get_visible() for side in ("left", "right")] for axes in figure.axes] == [
        [True, False]
    ] * 2


@pytest.mark.parametrize(("epochs", "marker"), [(1, "o"), (2, "")])
def test_a_curve_of_one_value_is_marked(epochs: int, marker: str) -> None:
    lines = [{"iteration": 9 * epoch, "epoch": epoch, "total": 5.0, "ldmi": 3.0} for epoch in range(1, epochs + 1)]
    training = plots.training_curves({"a": lines}).axes
    drawn = [axes.lines[0] for axes in training]
    information = figures.information(lines, dim=8)
    assert information is not None
    assert {axes.get_xlim()[0] for axes in (*training, *information.axes)} == {0}, "the axis begins with the training"
    drawn.append(information.axes[0].lines[0])
    assert {line.get_marker() for line in drawn if len(line.get_xydata())} == {marker}


def test_ldmi_in_the_scale_of_the_thesis_and_a_linear_probe(tmp_path: Path) -> None:
    lines = [{"iteration": 9, "epoch": 1.0, "ldmi": 3.0}, {"iteration": 9, "linear_top1": 50.0}]
    figure = figures.information(lines, dim=8, ldmi_scale="article")
    assert figure is not None
    left, right = figure.axes
    assert np.array_equal(left.lines[0].get_xydata(), [[1, 4 * 3.0 / 8]])
    assert left.get_ylabel().startswith("4 LDMI / P")
    assert right.get_ylabel() == "linear top-1 (%)"
    both = figures.information(lines, dim=8, ldmi_scale="both")
    assert both is not None
    both.savefig(tmp_path / "both.png")
    (second,) = both.axes[0].child_axes
    assert second.get_ylabel().startswith("4 LDMI / P")
    assert np.allclose(second.get_ylim(), 4 / 8 * np.array(both.axes[0].get_ylim()))


def test_a_linear_probe_during_training(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_encoder(monkeypatch)
    tiny = ["DATA.NAME", "folder", "DATA.ROOT", str(photos), "DATA.IMAGE_SIZE", "32", "DATA.WORKERS", "0"]
    tiny += ["PROJECTOR.DIMS", "[16, 8]", "TRAIN.BATCH_SIZE", "8", "TRAIN.EPOCHS", "2", "TRAIN.PRECISION", "float32"]
    train.main(["--output", str(tmp_path), *tiny, "PROBE.EVERY", "1", "PROBE.KIND", "linear"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [0 <= line["linear_top1"] <= 100 for line in lines if "linear_top1" in line] == [True, True]
    assert "linear top-1" in (tmp_path / "log.txt").read_text()


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
    runs = [tmp_path / name / "seed0" / "pretrain" for name in ("OBJECTIVE.NAME=barlow_twins", "TRAIN.LR=0.1")]
    for folder in runs:
        folder.parent.mkdir(parents=True)
        folder.symlink_to(pretrained)
    drawn = {}
    monkeypatch.setattr(figures.plots, "eigenvalue_spectra", drawn.update)
    command.main([*map(str, runs), "--only", "eigenvalues", "--output", str(tmp_path / "figures")])
    assert list(drawn) == ["Barlow Twins", "TRAIN.LR=0.1"]
    assert objectives.TITLES.keys() == objectives.OBJECTIVES.keys()


def test_of_several_runs_it_is_said_which_figures_show_which(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").symlink_to(pretrained)
    titles = []

    def save(figure: Figure, path: str, **_: object) -> None:
        titles.append(figure.get_suptitle())
        Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", save)
    only = ["--only", "training,information,views", "--output", str(tmp_path / "out")]
    command.main([str(pretrained), str(tmp_path / "other"), *only])
    log = (tmp_path / "out" / "log.txt").read_text()
    assert f"of run, other: training; of run only: information, views; all are written to {tmp_path}/out" in log
    assert titles[::2] == ["", "run", "run"]  # each is saved twice


@pytest.mark.parametrize("classes", [["one", "two"], []])
def test_an_embedding_has_a_title_and_no_image_lies_under_its_border(classes: list[str]) -> None:
    labels = [0, 1] * 4 if classes else [-1] * 8
    images = Subset(ArraySource(np.zeros((8, 4, 4, 3), np.uint8), labels, classes), np.arange(8))
    (axes,) = figures.tsne(torch.eye(8) + 0.1, images, seed=0, name="run").axes
    assert axes.get_title().startswith("t-SNE of the features of 8 images, run")
    for image in axes.images:
        left, right, bottom, top = image.get_extent()
        assert axes.get_xlim()[0] < left
        assert right < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < bottom
        assert top < axes.get_ylim()[1]


def test_a_detector_is_no_pretraining(tmp_path: Path, error_of: Callable[..., str]) -> None:
    (tmp_path / "config.yaml").write_text("SOLVER: {MAX_ITER: 5}\nCUDNN_BENCHMARK: false\n")
    (tmp_path / "metrics.json").write_text("{}\n")
    error = error_of(command.main, [str(tmp_path)])
    assert "is a run of detection/train_net.py, not of pretraining; detection/report.py draws" in error


def test_bad_input_is_one_line(pretrained: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
    assert "not the directory of a pretraining run" in error_of(command.main, [str(tmp_path)])
    assert "--images must be at least 2" in error_of(command.main, [str(pretrained), "--images", "0"])
    assert "'nosuch' is not one of training" in error_of(command.main, [str(pretrained), "--only", "nosuch"])
    moved = [str(pretrained), "--only", "views", "--root", str(tmp_path / "no"), "--output", str(tmp_path)]
    assert "does not exist" in error_of(command.main, moved)


def test_a_flat_folder_without_labels_is_drawn_without_classes(pretrained: Path, photos: Path, tmp_path: Path) -> None:
    flat = str(photos / "train" / "circle")
    command.main([str(pretrained), "--root", flat, "--output", str(tmp_path), "--only", "tsne,neighbours"])
    assert {path.name for path in tmp_path.glob("*.png")} == {"tsne.png", "neighbours.png"}
    log = (tmp_path / "log.txt").read_text()
    assert "there is no folder val: tsne and neighbours show the images of pretraining" in log
    assert "does not exist" not in log
    points = np.array([[0.0, 0.0], [0.001, 0.0], [1.0, 1.0], [0.5, 1.0]])
    assert plots.spread_out(points).tolist() == [0, 2, 3]  # the second is in the cell of the first
    assert [figures._frame(*labels) for labels in [(-1, -1), (1, 1), (1, 2)]] == [
        None,
        plots.FRAME_RIGHT,
        plots.FRAME_WRONG,
    ]


@pytest.mark.parametrize(("labels", "meanings"), [([0, 0, 1], 2), ([0, 0, 0], 1), ([-1, -1, -1], 0)])
def test_a_legend_says_what_frames_mean(labels: list[int], meanings: int) -> None:
    images = Subset(ArraySource(np.zeros((3, 4, 4, 3), np.uint8), labels, ["one", "two"]), np.arange(3))
    sheet = figures.neighbours(torch.eye(3) + 0.1, images)
    texts = [text.get_text() for legend in sheet.legends for text in legend.get_texts()]
    assert texts == ["the class of the query", "another class"][:meanings]


def test_damaged_images_do_not_end_the_command(pretrained: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "train" / "circle", tmp_path / "photos")
    for path in sorted((tmp_path / "photos").iterdir())[:3]:
        path.write_bytes(b"")
    root = ["--root", str(tmp_path / "photos"), "--output", str(tmp_path / "out")]
    command.main([str(pretrained), *root, "--only", "neighbours"])
    assert (tmp_path / "out" / "neighbours.png").is_file()


def test_a_damaged_image_is_white_in_a_sheet(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"")
    images = Subset(FileSource([tmp_path / "1.jpg"], [0], ["one"]), np.array([0]))
    assert (figures.thumbnail(images, 0) == 255).all()


def test_views_are_of_the_classes_that_a_run_was_trained_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "classes.txt").write_text("square\n")
    config = get_defaults()
    config.DATA.NAME, config.DATA.ROOT, config.DATA.CLASSES = "folder", str(photos), str(tmp_path / "classes.txt")
    monkeypatch.setattr(plots, "image_sheet", lambda rows, titles: rows)
    first = FileSource([photos / "train" / "square" / "00.jpg"], [0], ["square"])
    assert np.array_equal(figures.view_pairs(config)[0][0], figures.thumbnail(Subset(first, np.array([0])), 0))
