"""What is behind the AP: precision and recall, kinds of errors, score thresholds, confusions; whole and damaged."""

import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from reporting import diagnosis, figures
from reporting.analysis import TASKS, confusion, score_text
from reporting.diagnosis import draw_confusion, error_cost
from reporting.figures import label_colours
from reporting.groups import settings
from reporting.runs import read_runs


def analysis(precision=0.5, cost=1.0):
    """As the evaluator writes it, for boxes."""
    recall = [0.0, 0.5, 1.0]
    curve = {"recall": recall, "0.5": [precision] * 3, "0.75": [precision / 2] * 3, "mean": [precision / 2] * 3}
    kinds = ("classification", "localisation", "both", "duplicate", "background", "missed")
    best = {"score": 0.5, "precision": precision, "recall": 0.25, "f1": 0.4}
    return {
        "bbox": {
            "summary": {"AP": 10.0},
            "classes": [{"name": "a<b>&c", "objects": 7, "AP": 10.0}, {"name": "other", "objects": 0, "AP": None}],
            "precision_recall": curve,
            "errors": dict.fromkeys(kinds, cost),
            "counts": dict.fromkeys(kinds, 3),
            "thresholds": {
                "best": best,
                "classes": [{"name": "a<b>&c", **best}, {"name": "other", "score": None}],
                "curve": {"score": recall, "precision": [precision] * 3, "recall": [0.5] * 3, "f1": [0.4] * 3},
            },
            "confusion": {"names": ["a<b>&c", "other", "background"], "counts": [[5, 1, 1], [0, 0, 0], [2, 3, 0]]},
        }
    }


@pytest.fixture
def analysed(detection):
    def make(init, seed, content):
        folder = detection(init, seed, 10.0)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "predictions" / "analysis.json").write_text(text)
        return folder

    return make


def test_what_lies_behind_the_ap(analysed, make_report):
    folders = [analysed("random", seed, analysis(0.5, cost)) for seed, cost in ((1, 4.0), (2, 6.0))]
    folders.append(analysed("corinfomax", 1, analysis(0.8, 2.0)))
    page = make_report(*folders)
    assert {"precision.png", "errors.png", "thresholds.png", "confusion.png"} <= page.files
    below = "Boxes: by how many points AP50 would rise"
    assert page.rows("random", below)[0] == ["random", *["5.0 ± 1.4"] * 6]
    assert page.rows("corinfomax", below)[0] == ["corinfomax", *["2.0"] * 6]
    below = "Boxes: the score threshold with the best F1"
    assert page.rows("corinfomax", below)[:2] == [
        ["corinfomax", "all", "0.5000", "0.80", "0.25", "0.40"],
        ["corinfomax", r"a\<b\>&c", "0.5000", "0.80", "0.25", "0.40"],
    ]
    (setting,) = settings(read_runs(folders).runs)
    assert error_cost(setting.groups[0], TASKS[0], "missed").values == (4.0, 6.0)
    assert error_cost(setting.groups[0], TASKS[0], "other") is None
    names, counts = confusion(setting.runs[0], TASKS[0])
    assert (names[-1], counts.tolist()) == ("background", [[5, 1, 1], [0, 0, 0], [2, 3, 0]])


def test_confusions_of_masks_where_boxes_were_not_evaluated(analysed, tmp_path):
    found = settings(read_runs([analysed("random", 1, {"segm": analysis()["bbox"]})]).runs)
    assert draw_confusion(found, tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").exists()


@pytest.mark.parametrize("groups", [("random",), ("random", "corinfomax")])
def test_confusion_matrices_fill_their_figure(groups, analysed, tmp_path, monkeypatch):
    """Neither empty margins beside one matrix, nor a gap between the heading and two."""
    found, drawn = settings(read_runs([analysed(group, 1, analysis()) for group in groups]).runs), []
    draw = diagnosis._draw_matrix
    monkeypatch.setattr(diagnosis, "_draw_matrix", lambda axes, *rest: drawn.append(axes) or draw(axes, *rest))
    assert draw_confusion(found, tmp_path / "confusion.png")
    figure = drawn[0].figure.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [axes.get_tightbbox(renderer) for axes in drawn]
    width, height = figure.bbox.size
    assert sum(box.width for box in boxes) > 0.85 * width
    heading = min(text.get_window_extent(renderer).y0 for part in figure.subfigs for text in [part._suptitle])
    assert heading - max(box.y1 for box in boxes) < 0.08 * height


def test_cells_of_a_confusion_matrix_say_what_they_count():
    axes = Figure().subplots()
    diagnosis._draw_matrix(axes, ["a", "b", "background"], np.array([[5, 1, 2], [0, 0, 0], [2, 6, 0]]))
    written = {tuple(text.get_position()): text.get_text() for text in axes.texts}  # (column, row)
    # The second class has no objects, which is not a row of zeros.
    assert written == {(0, 0): "62", (1, 0): "12", (2, 0): "25", (1, 1): "no objects", (0, 2): "25", (1, 2): "75"}
    (image,) = axes.images
    assert image.get_array().mask.tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("detected as (cells: % of the row)", "ground truth")


def test_precision_over_recall_is_drawn_where_it_was_measured(analysed, detection, make_report, monkeypatch):
    """The mean of two runs is seen at its height, in its colour; a run without analysis draws nothing."""
    monkeypatch.setattr(figures, "DPI", 200)
    folders = [analysed("corinfomax", seed, analysis(value)) for seed, value in ((1, 0.3), (2, 0.5))]
    page = make_report(*folders, detection("random", 1, 9.0))
    picture = np.asarray(Image.open(page.folder / "precision.png").convert("RGB")).astype(int)
    blue = (abs(picture - [0x00, 0x72, 0xB2]).max(axis=2) < 3)[:, : picture.shape[1] // 3]
    long_rows = np.flatnonzero(blue.sum(axis=1) > 200)
    assert long_rows.size  # a horizontal line
    grey = abs(picture - 0x76).max(axis=2) < 3
    assert grey.sum() < 20_000  # of the legend only


def test_runs_without_analysis_need_none(detection, make_report):
    page = make_report(detection("random", 1, 10.0))
    assert not {"precision.png", "errors.png", "thresholds.png", "confusion.png"} & page.files
    assert "Errors by kind" not in page.markdown


DAMAGED = [
    "{",
    "[" * 100_000,
    "[]",
    '{"bbox": 1}',
    '{"bbox": {"precision_recall": {"recall": [0, 1]}, "errors": {"missed": "x"}, "classes": [1, {"name": 2}]}}',
    '{"bbox": {"precision_recall": {"recall": [0, 1], "0.5": [1], "mean": "x", "0.75": [1, null]}}}',
    '{"bbox": {"thresholds": {"best": {"score": "x"}, "classes": [5, {"name": 1}], "curve": {"score": [0]}}}}',
    '{"bbox": {"confusion": {"names": ["a", "background"], "counts": [[1, 2], [3]]}}}',
    '{"bbox": {"confusion": {"names": ["a", "background"], "counts": [[1, -2], [3, 0]]}}}',
]


def test_a_damaged_analysis_costs_itself(analysed, make_report):
    folders = [analysed(f"damaged{number}", 1, content) for number, content in enumerate(DAMAGED)]
    page = make_report(*folders, analysed("corinfomax", 1, analysis()))
    assert {"precision.png", "errors.png", "thresholds.png", "confusion.png"} <= page.files
    for number in range(len(DAMAGED)):
        assert page.rows(f"damaged{number}")[0][3] == "10.0"
    assert page.rows("damaged4", "Boxes: by how many points")[0] == ["damaged4", *[""] * 6]


@pytest.mark.usefixtures("no_pictures")
def test_a_damaged_analysis_is_named_once(analysed, make_report, caplog):
    folder = analysed("random", 1, "{")
    make_report(folder)
    make_report(folder)
    (record,) = caplog.records
    assert record.getMessage().startswith(str(folder / "predictions" / "analysis.json"))


def test_a_printed_threshold_keeps_what_the_exact_one_keeps():
    """Of a detection with a score of 0.0852, 0.09 would leave nothing."""
    assert [score_text(score) for score in (0.0852, 0.5, 0.08528, 1.0)] == ["0.0852", "0.5000", "0.0852", "1.0000"]


def test_the_best_threshold_is_marked_on_the_curves(analysed, tmp_path, monkeypatch):
    found, axes_of = settings(read_runs([analysed("random", 1, analysis())]).runs), []
    draw = diagnosis._draw_runs
    monkeypatch.setattr(diagnosis, "_draw_runs", lambda axes, *rest: axes_of.append(axes) or draw(axes, *rest))
    assert diagnosis.draw_thresholds(found, label_colours(["random"]), tmp_path / "thresholds.png")
    marked = [axes.lines[-1].get_xydata().tolist() for axes in axes_of]
    assert marked == [[[0.5, 0.5]], [[0.5, 0.25]], [[0.5, 0.4]]]
