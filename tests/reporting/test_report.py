"""The report on run directories made here: what it says is checked against numbers worked out by hand."""

import base64
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco_mask

from detection import report
from foundation.canvas import class_colours
from foundation.config import config_folder
from foundation.errors import UserError
from reporting.diagnosis import error_cost, label_curves, leading
from reporting.figures import label_colours
from reporting.groups import KINDS, Statistic, difference, settings
from reporting.published import of_recipe
from reporting.runs import read_runs
from reporting.scenes import count_found, decode_mask, evenly_spaced

SIZE = 24  # pixels of a side of the tiny images
BOX = (4, 6, 10, 12)  # x, y, width, height of the one object in each of them


def square():
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    x, y, width, height = BOX
    mask[y : y + height, x : x + width] = 1
    return mask


def run_length_code():
    code = coco_mask.encode(np.asfortranarray(square()))
    return {"size": code["size"], "counts": code["counts"].decode()}


@pytest.fixture
def dataset(tmp_path):
    """Seven scenes in COCO's format, with ids that are neither dense nor in order."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    ids = [70, 10, 20, 30, 40, 50, 60]
    for identity in ids:
        Image.new("RGB", (SIZE, SIZE), (identity, 90, 120)).save(folder / f"{identity}.jpg")
    x, y, width, height = BOX
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": SIZE, "height": SIZE} for i in ids],
        "categories": [{"id": 1, "name": "a<b>&c"}, {"id": 2, "name": "other"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": list(BOX), "segmentation": [polygon], "iscrowd": 0}
            for i in ids
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return {"name": "tiny", "image_root": str(folder), "annotations": str(path)}


def write(folder, results=None, config=None, lines=()):
    folder.mkdir(parents=True)
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if lines:
        (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def detection(tmp_path, dataset):
    """Makes detection runs: detection(init, seed, box AP, rate=...)."""

    def make(init, seed, ap, rate=0.02, name=None):
        folder = tmp_path / (name or f"{init}-{seed}")
        segm = {"AP": ap - 2, "AP50": 2 * ap - 2, "AP75": None}
        results = {
            "kind": "detection",
            "config": "tiny_FPN",
            "weights": "" if init == "random" else f"{init}.pkl",
            "init": init,
            "seed": seed,
            "iterations": 40,
            "train_images": 8,
            "dataset": dataset,
            "results": {"bbox": {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2}, "segm": segm},
        }
        config = {"SEED": seed, "OUTPUT_DIR": str(folder), "SOLVER": {"BASE_LR": rate}}
        lines = [{"iteration": i, "total_loss": 3.0 - i / 20} for i in (19, 39)] + [{"iteration": 40, "bbox/AP": ap}]
        write(folder, results, config, lines)
        found = {"image_id": 40, "category_id": 1, "bbox": list(BOX), "score": 0.9, "segmentation": run_length_code()}
        (folder / "predictions").mkdir()
        (folder / "predictions" / "coco_instances_results.json").write_text(json.dumps([found]))
        return folder

    return make


@pytest.fixture
def linear(tmp_path):
    def make(init, seed, **accuracies):
        results = {"kind": "linear", "config": "tiny", "init": init, "dataset": "shapes", "seed": seed, "k": 5}
        return write(tmp_path / f"linear-{init}-{seed}", results | accuracies)

    return make


@pytest.fixture
def pretraining(tmp_path):
    config = {"SEED": 4, "OBJECTIVE": {"NAME": "corinfomax"}, "ENCODER": {"NAME": "resnet18"}, "DATA": {"NAME": "x"}}
    lines = [
        {"iteration": 9, "total": 8.0, "big_bang": 6.0, "learning_rate": 0.1, "images_per_second": 100.0},
        {"iteration": 9, "knn_top1": 20.0},
        {"iteration": 19, "total": 5.0, "big_bang": 4.0, "learning_rate": 0.2, "images_per_second": 200.0},
        {"iteration": 19, "knn_top1": 35.25},
    ]
    return write(tmp_path / "pretraining", config=config, lines=lines)


def make_report(tmp_path, *folders, title=()):
    output = tmp_path / "report"
    report.main([*map(str, folders), "--output", str(output), *title])
    return output


def rows(markdown, first):
    """The cells of the table rows that begin with a word."""
    lines = [line for line in markdown.splitlines() if line.startswith(f"| {first} ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_all_kinds_of_runs_make_one_report(tmp_path, detection, linear, pretraining, capsys):
    few = {"kind": "finetune", "config": "tiny", "init": "random", "seed": 1, "fraction": 0.01, "images": 3, "top1": 9}
    folders = [
        pretraining,
        linear("random", 1, linear_top1=20.0),
        linear("corinfomax", 1, linear_top1=50.0),
        write(tmp_path / "few", few),
        detection("random", 1, 10.0),
        detection("corinfomax", 1, 14.0),
    ]
    output = make_report(tmp_path, *folders)
    assert {path.name for path in output.iterdir()} == {
        *("report.md", "report.html", "transfer.png", "curves.png", "predictions.png")
    }
    for name in ("transfer", "curves", "predictions"):
        assert min(Image.open(output / f"{name}.png").size) > 300
    markdown = (output / "report.md").read_text()
    headings = re.findall(r"^## (.*)", markdown, re.M)
    assert headings == [
        *("Pretraining", "Frozen encoder", "Fine-tuning on few labels", "Detection and segmentation"),
        *("Training", "Scenes", "Runs"),
    ]
    assert rows(markdown, "pretraining")[0] == [
        *("pretraining", "corinfomax", "", "", "4", "20", "8.0 → 5.0", "20.0 → 35.2", "150")
    ]
    assert "tiny, 1 % of the labels (3 images)" in markdown
    assert str(output) in capsys.readouterr().out


def test_seeds_are_averaged_with_their_sample_deviation(tmp_path, detection):
    folders = [detection("random", seed, ap) for seed, ap in ((3, 12.0), (1, 10.0), (2, 11.0))]
    folders += [detection("corinfomax", seed, ap) for seed, ap in ((1, 20.0), (2, 23.0))]
    markdown = (make_report(tmp_path, *folders) / "report.md").read_text()
    # random: mean 11, deviation 1. corinfomax: mean 21.5, deviation 3/√2 = 2.12. Difference: 10.5 ± √(1 + 4.5) = 2.35.
    assert rows(markdown, "random")[0] == [
        *("random", "1, 2, 3", "3", "11.0 ± 1.0", "22.0 ± 2.0", "5.5 ± 0.5", "9.0 ± 1.0", "20.0 ± 2.0", "")
    ]
    assert rows(markdown, "corinfomax")[0][:4] == ["corinfomax", "1, 2", "2", "21.5 ± 2.1"]
    assert rows(markdown, "corinfomax −")[0][3] == "+10.5 ± 2.3"
    assert (
        "Box AP: 21.5 ± 2.1 from corinfomax (2 runs), 11.0 ± 1.0 from random (3 runs): a difference of +10.5"
        in markdown
    )
    assert "more than the spread (2.3); every run of corinfomax is above every run of random." in markdown


def test_a_difference_within_the_spread_is_called_that(tmp_path, linear):
    folders = [linear("random", seed, knn_top1=value) for seed, value in ((1, 20.0), (2, 24.0))]
    folders += [linear("corinfomax", seed, knn_top1=value) for seed, value in ((1, 21.0), (2, 24.0))]
    markdown = (make_report(tmp_path, *folders) / "report.md").read_text()
    # 22.5 - 22, against √(8 + 4.5) = 3.54
    assert "a difference of +0.5, within the spread (3.5): these runs do not tell the two apart." in markdown
    assert "more than the spread" not in markdown


def test_of_single_runs_no_spread_is_claimed(tmp_path, linear):
    markdown = (
        make_report(tmp_path, linear("random", 1, knn_top1=30.0), linear("supervised", 1, knn_top1=28.0)) / "report.md"
    ).read_text()
    assert "a difference of −2.0, of which the spread over seeds was not measured." in markdown
    assert "±" not in markdown


def test_only_measured_cells_are_filled(tmp_path, linear):
    markdown = (
        make_report(tmp_path, linear("random", 1, linear_top1=0.0), linear("corinfomax", 1, knn_top1=40.0))
        / "report.md"
    ).read_text()
    assert rows(markdown, "random")[0] == ["random", "1", "1", "0.0", "", "", ""]
    assert rows(markdown, "corinfomax")[0] == ["corinfomax", "1", "1", "", "", "40.0", ""]
    assert rows(markdown, "corinfomax −")[0][3:] == ["", "", "", ""]
    assert "An empty cell was not measured." in markdown
    assert "a difference" not in markdown


def test_variants_of_one_initialisation_are_kept_apart_and_named(tmp_path, detection):
    folders = [
        detection("random", 1, 10.0),
        detection("corinfomax", 1, 14.0, name="low-1"),
        detection("corinfomax", 2, 16.0, name="low-2"),
        detection("corinfomax", 1, 17.0, rate=0.1, name="high"),
    ]
    markdown = (make_report(tmp_path, *folders) / "report.md").read_text()
    assert rows(markdown, "corinfomax (low-1)")[0][1:4] == ["1, 2", "2", "15.0 ± 1.4"]
    assert rows(markdown, "corinfomax (high)")[0][1:4] == ["1", "1", "17.0"]
    assert rows(markdown, "SOLVER.BASE_LR")[0] == ["SOLVER.BASE_LR", "0.02", "0.02", "0.1"]
    assert "corinfomax (high) and random also differ in SOLVER.BASE_LR" in markdown
    assert "corinfomax (low-1) and random also differ" not in markdown
    assert "OUTPUT_DIR" not in markdown


def test_a_colour_belongs_to_a_name():
    assert label_colours(["corinfomax", "a", "random", "a", "b"]) == {
        **{"random": "#767676", "corinfomax": "#0072b2"},
        **{"a": "#d55e00", "b": "#009e73"},
    }
    assert len(set(class_colours(range(10)).values())) == 10


def test_a_detector_without_masks_is_reported_too(tmp_path, detection):
    folder = detection("random", 1, 10.0)
    results = json.loads((folder / "results.json").read_text())
    del results["results"]["segm"]
    (folder / "results.json").write_text(json.dumps(results))
    path = folder / "predictions" / "coco_instances_results.json"
    (found,) = json.loads(path.read_text())
    del found["segmentation"]
    path.write_text(json.dumps([found]))
    markdown = (make_report(tmp_path, folder) / "report.md").read_text()
    assert rows(markdown, "random")[0][3:] == ["10.0", "20.0", "5.0"]
    assert "mask AP" not in markdown


def test_runs_on_other_data_are_not_compared(tmp_path, detection):
    folders = [detection("random", 1, 10.0), detection("corinfomax", 1, 14.0)]
    path = folders[1] / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"train_images": 80}))
    output = make_report(tmp_path, *folders)
    markdown = (output / "report.md").read_text()
    assert "a difference" not in markdown
    assert "40 iterations on 8 images" in markdown
    assert "40 iterations on 80 images" in markdown
    assert (output / "predictions-2.png").is_file()


def test_names_are_escaped_and_the_page_needs_no_other_file(tmp_path, detection):
    folders = [detection("random", 1, 10.0), detection("a<script>|b", 1, 14.0, name="x & y")]
    output = make_report(tmp_path, *folders, title=("--title", "<b>T</b> & Co"))
    page = (output / "report.html").read_text()
    assert "<title>&lt;b&gt;T&lt;/b&gt; &amp; Co</title>" in page
    assert "a&lt;script&gt;|b" in page
    assert "<script" not in page
    assert "x &amp; y" in page
    assert r"| a\<script\>\|b " in (output / "report.md").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 3
    for source, name in zip(sources, ("transfer", "curves", "predictions"), strict=True):
        header, data = source.split(",")
        assert header == "data:image/png;base64"
        assert base64.b64decode(data) == (output / f"{name}.png").read_bytes()
    assert "http" not in page


def test_the_scenes_are_the_same_for_all_and_show_what_was_found(tmp_path, detection, dataset):
    folders = [detection("random", 1, 10.0), detection("corinfomax", 1, 14.0)]
    (folders[0] / "predictions" / "coco_instances_results.json").write_text("[]")
    output = make_report(tmp_path, *folders)
    sheet = np.asarray(Image.open(output / "predictions.png").convert("RGB")).astype(int)
    columns = [sheet[:, 34 + column * (460 + 14) :][:, :460] for column in range(3)]
    truth, empty, found = (column[46 + 2 * (460 + 30 + 14) :][:460] for column in columns)  # image 40, the middle one
    x, y, width, height = (value * 460 // SIZE for value in BOX)
    inside = np.s_[y + height // 2 : y + height - 20, x + width // 2 : x + width - 20]
    assert abs(truth[inside] - found[inside]).max() <= 1  # the same mask, from a polygon and from a run-length code
    assert abs(truth[inside] - empty[inside]).mean() > 20
    outside = np.s_[400:460, 400:460]
    assert abs(truth[outside] - empty[outside]).max() == 0
    assert "evenly spaced among the 7" in (output / "report.md").read_text()


def test_keypoints_are_drawn_where_they_are_visible(tmp_path, detection, dataset):
    folder = detection("random", 1, 10.0)
    plain = np.asarray(Image.open(make_report(tmp_path, folder) / "predictions.png").convert("RGB")).astype(int)
    path = tmp_path / "instances.json"
    content = json.loads(path.read_text())
    content["categories"][0]["skeleton"] = [[1, 2], [2, 3]]
    for record in content["annotations"]:
        record["keypoints"] = [1, 20, 2, 20, 20, 2, 20, 1, 0]  # a line below the box, and one that is not visible
    path.write_text(json.dumps(content))
    drawn = np.asarray(Image.open(make_report(tmp_path, folder) / "predictions.png").convert("RGB")).astype(int)
    changed = np.argwhere((plain != drawn).any(axis=2)[46 : 46 + 460, 34 : 34 + 460]) * SIZE / 460  # in pixels of it
    assert changed[:, 0].min() > 19.5
    assert changed[:, 0].max() < 21.5
    assert (changed[:, 1].min(), changed[:, 1].max()) == pytest.approx((1.5, 20.5), abs=0.5)


def test_a_missing_dataset_costs_the_picture_only(tmp_path, detection, dataset):
    folder = detection("random", 1, 10.0)
    (tmp_path / "instances.json").unlink()
    output = make_report(tmp_path, folder)
    assert not (output / "predictions.png").exists()
    assert "no picture of scenes, since" in (output / "report.md").read_text()


def test_scenes_are_chosen_by_rule():
    assert evenly_spaced(range(10), 5) == [1, 3, 5, 7, 9]
    assert evenly_spaced([4, 8], 5) == [4, 8]


def test_an_object_is_found_once_and_by_its_class():
    def box(category, left, score=1.0):
        return {"category_id": category, "bbox": [left, 0, 10, 10], "score": score}

    assert count_found([box(1, 0)], [box(1, 2), box(1, 0)]) == 1
    assert count_found([box(1, 0)], [box(2, 0)]) == 0
    assert count_found([box(1, 0)], [box(1, 3)]) == 1  # IoU 7/13 = 0.54
    assert count_found([box(1, 0)], [box(1, 4)]) == 0  # IoU 6/14 = 0.43
    assert count_found([box(1, 0), box(1, 1)], [box(1, 0, 0.6), box(1, 1, 0.9)]) == 2


def test_masks_of_every_spelling_decode():
    x, y, width, height = BOX
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    counts = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], square().T.ravel(), [2]])))).tolist()
    for spelling in ([polygon], run_length_code(), {"size": [SIZE, SIZE], "counts": counts}):
        np.testing.assert_array_equal(decode_mask(spelling, SIZE, SIZE), square())
    assert decode_mask(None, SIZE, SIZE) is None


def test_a_resumed_run_replaces_what_the_killed_one_wrote(tmp_path):
    lines = [{"iteration": i, "total": float(i)} for i in (0, 10, 20, 30)]
    lines += [{"iteration": 20, "total": 7.0}, {"iteration": 20, "knn_top1": 1.0}]
    folder = write(tmp_path / "run", config={"SEED": 0}, lines=lines)
    with (folder / "metrics.json").open("a") as file:
        file.write('{"iteration": 30, "tot')
    (run,) = read_runs([folder])
    assert run.series("total") == {0: 0.0, 10: 10.0, 20: 7.0}
    assert run.series("knn_top1") == {20: 1.0}


def test_the_baseline_comes_first_and_a_directory_counts_once(linear):
    folders = [linear("corinfomax", 1, knn_top1=1.0), linear("random", 1, knn_top1=1.0)]
    (setting,) = settings(read_runs([*folders, folders[0]]))
    assert setting.kind is KINDS["linear"]
    assert [(group.label, len(group.runs)) for group in setting.groups] == [("random", 1), ("corinfomax", 1)]


def test_the_spread_of_a_difference_needs_both():
    assert difference(Statistic((1.0, 3.0)), Statistic((5.0,))).spread is None
    assert difference(Statistic((1.0, 3.0)), Statistic((5.0, 7.0))).spread == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "linear", ', "is damaged"),
        ("[1]", "must hold a JSON object"),
        ('{"kind": "poem", "init": "random"}', "kind must be one of linear, finetune, detection, not 'poem'"),
        ('{"kind": "linear"}', "init must name the initialisation"),
        ('{"kind": "linear", "init": "random", "knn_top1": "high"}', "knn_top1 must be a number, not 'high'"),
    ],
)
def test_damaged_results_are_named(tmp_path, content, message):
    folder = write(tmp_path / "run")
    (folder / "results.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(str(folder / "results.json"))) as error:
        make_report(tmp_path, folder)
    assert message in str(error.value)


def test_directories_without_a_run_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a directory"):
        make_report(tmp_path, tmp_path / "nowhere")
    with pytest.raises(UserError, match="there is no run in"):
        make_report(tmp_path, write(tmp_path / "empty"))
    unfinished = write(tmp_path / "unfinished", config={}, lines=[{"iteration": 1, "total_loss": 1.0}])
    with pytest.raises(UserError, match=r"without results\.json: finish it with --resume"):
        make_report(tmp_path, unfinished)
    assert not (tmp_path / "report").exists()


def test_predictions_of_another_dataset_are_refused(tmp_path, detection):
    folder = detection("random", 1, 10.0)
    path = folder / "predictions" / "coco_instances_results.json"
    path.write_text(path.read_text().replace('"category_id": 1', '"category_id": 9'))
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: the dataset has no category 9"):
        make_report(tmp_path, folder)


def test_the_command_starts_without_torch_and_reports_errors_in_one_line(tmp_path):
    code = "import sys; from detection import report; print({'torch', 'detectron2'} & sys.modules.keys()); report.cli()"
    command = [sys.executable, "-c", code, str(tmp_path / "nowhere"), "--output", str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "set()\n"
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def change(folder, **fields):
    """Other entries in results.json."""
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def analysis(precision, cost, task="bbox"):
    """As the evaluator writes it, for one task."""
    recall = [0.0, 0.5, 1.0]
    curve = {"recall": recall, "0.5": [precision] * 3, "0.75": [precision / 2] * 3, "mean": [precision / 2] * 3}
    kinds = ("classification", "localisation", "both", "duplicate", "background", "missed")
    return {
        task: {
            "summary": {"AP": 10.0},
            "classes": [{"name": "a<b>&c", "objects": 7, "AP": 10.0}, {"name": "other", "objects": 0, "AP": None}],
            "precision_recall": curve,
            "errors": dict.fromkeys(kinds, cost),
            "counts": dict.fromkeys(kinds, 3),
        }
    }


def analyse(folder, *arguments, **keywords):
    (folder / "predictions" / "analysis.json").write_text(json.dumps(analysis(*arguments, **keywords)))
    return folder


def test_what_lies_behind_the_ap(tmp_path, detection):
    folders = [analyse(detection("random", seed, 10.0), 0.5, cost) for seed, cost in ((1, 4.0), (2, 6.0))]
    folders.append(analyse(detection("corinfomax", 1, 14.0), 0.8, 2.0))
    output = make_report(tmp_path, *folders)
    markdown = (output / "report.md").read_text()
    assert {"precision.png", "errors.png"} <= {path.name for path in output.iterdir()}
    table = markdown[markdown.index("Boxes: by how many points AP50 would rise") :]
    assert rows(table, "random")[0] == ["random", *["5.0 ± 1.4"] * 6]
    assert rows(table, "corinfomax")[0] == ["corinfomax", *["2.0"] * 6]
    (setting,) = settings(read_runs(folders))
    (task,) = (task for task, _ in setting.tasks if task.name == "bbox")
    assert error_cost(setting.groups[0], task, "missed").values == (4.0, 6.0)
    assert error_cost(setting.groups[0], task, "other") is None


def test_precision_over_recall_is_drawn_where_it_was_measured(tmp_path, detection):
    """The mean of two runs is seen at its height, in its colour; a run without analysis draws nothing."""
    folders = [analyse(detection("corinfomax", seed, 10.0), precision, 1.0) for seed, precision in ((1, 0.3), (2, 0.5))]
    output = make_report(tmp_path, *folders, detection("random", 1, 9.0))
    picture = np.asarray(Image.open(output / "precision.png").convert("RGB")).astype(int)
    blue = (abs(picture - [0x00, 0x72, 0xB2]).max(axis=2) < 3)[:, : picture.shape[1] // 3]
    long_rows = np.flatnonzero(blue.sum(axis=1) > 200)
    assert long_rows.size  # a horizontal line
    grey = abs(picture - 0x76).max(axis=2) < 3
    assert grey.sum() < 20_000  # of the legend only


def test_runs_without_analysis_need_none(tmp_path, detection):
    output = make_report(tmp_path, detection("random", 1, 10.0))
    assert not {"precision.png", "errors.png"} & {path.name for path in output.iterdir()}
    assert "Errors by kind" not in (output / "report.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ('{"bbox": 1}', "must hold a JSON object for each task"),
        ('{"bbox": {"precision_recall": {"recall": [0, 1]}}}', "needs a list of numbers '0.5'"),
    ],
)
def test_a_damaged_analysis_is_named(tmp_path, detection, content, message):
    folder = detection("random", 1, 10.0)
    path = folder / "predictions" / "analysis.json"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        make_report(tmp_path, folder)
    assert message in str(error.value)


def test_ap_of_each_class(tmp_path, detection):
    folders = [analyse(detection(init, 1, 10.0), 0.5, 1.0) for init in ("random", "corinfomax")]
    for folder, values in zip(folders, ((30.0, 10.0), (31.0, 25.5)), strict=True):
        results = json.loads((folder / "results.json").read_text())["results"]
        results["bbox"] |= {"AP-a<b>&c": values[0], "AP-other": values[1], "AP-none": None}
        change(folder, results=results)
    markdown = (make_report(tmp_path, *folders) / "report.md").read_text()
    table = markdown[markdown.index("## Classes") :]
    assert rows(table, "other")[0] == ["other", "0", "10.0", "25.5", "+15.5"]
    assert rows(table, r"a\<b\>&c")[0] == [r"a\<b\>&c", "7", "30.0", "31.0", "+1.0"]
    assert rows(table, "none")[0] == ["none", "", "", "", ""]
    assert table.index("| other") < table.index(r"| a\<b\>&c") < table.index("| none")


def test_ap_over_the_number_of_labels(tmp_path, detection):
    folders = []
    for images, factor in ((8, 1.0), (80, 2.0), (800, 3.0)):
        for init, base in (("random", 5.0), ("corinfomax", 10.0)):
            for seed in (1, 2):
                folder = detection(init, seed, base * factor + seed, name=f"{init}-{images}-{seed}")
                folders.append(change(folder, train_images=images))
    longer = detection("random", 1, 99.0, name="longer")
    folders.append(change(longer, train_images=8, iterations=80))
    output = make_report(tmp_path, *folders)
    markdown = (output / "report.md").read_text()
    assert (output / "labels.png").is_file()
    table = markdown[markdown.index("Box AP, in percent: tiny_FPN evaluated on tiny") :]
    assert rows(table, "training images")[0] == ["training images", "8", "80", "800"]
    assert rows(table, "random")[0] == ["random", "99.0", "11.5 ± 0.7", "16.5 ± 0.7"]
    assert rows(table, "corinfomax")[0] == ["corinfomax", "", "21.5 ± 0.7", "31.5 ± 0.7"]
    assert not (output / "predictions-2.png").exists()  # scenes of the most images only
    found = settings(read_runs(folders))
    assert [setting.conditions[2:] for setting in found] == [(8, 40), (8, 80), (80, 40), (800, 40)]
    assert [setting.conditions[2] for setting in leading(found)] == [800]
    assert label_curves(found[:1]) == []
    assert leading(found[:1]) == found[:1]


def test_published_results_stand_beside_those_of_the_recipe(tmp_path, detection):
    folder = change(detection("random", 1, 10.0), config="coco_R50_C4")
    markdown = (make_report(tmp_path, folder) / "report.md").read_text()
    assert rows(markdown, "MoCo ImageNet-1K")[0] == [
        *("MoCo ImageNet-1K", "He et al. 2020, table 5d", "40.7", "60.5", "44.1", "35.4", "57.3", "37.6")
    ]
    (measured, published) = rows(markdown, "random")[:2]
    assert measured[0:4] == ["random", "1", "1", "10.0"]
    assert published == ["random", "He et al. 2020, table 5d", "35.6", "", "", "31.4", "", ""]


def test_every_published_row_of_the_recipes_is_read():
    """The numbers that a head lists and those that are read are as many."""
    folder = config_folder("detection")
    counts = {path.stem: len(of_recipe(path.stem)) for path in folder.glob("*.yaml")}
    for name, count in counts.items():
        text = (folder / f"{name}.yaml").read_text()
        assert count == len(re.findall(r"^# {3,}\S.*? {2,}\d\d\.\d\b", text, re.M)), name
    assert counts["voc_R50_C4_24k"] == 12
    assert counts["shapes_R18_FPN"] == 0
    voc = {row.label: row for row in of_recipe("voc_R50_C4_24k")}
    assert voc["MoCo, 200 epochs"].source == voc["supervised ImageNet-1K"].source
    assert voc["VICReg"].values == {("bbox", "AP50"): 82.4}
    (keypoints,) = of_recipe("coco_keypoints_R50_FPN")
    assert keypoints.values == {("bbox", "AP"): 53.6, ("keypoints", "AP"): 64.0}
    assert of_recipe("../detection/coco_R50_C4") == of_recipe(None) == of_recipe("mine") == []


@pytest.mark.parametrize(
    ("dataset", "results", "header"),
    [
        ("voc_2007_test", {"bbox": {"AP": 1.0, "AP50": 2.0, "AP75": 3.0}}, ["box AP50", "box AP", "box AP75"]),
        (
            *("coco_val", {"bbox": {"AP": 1.0, "AP50": 2.0}, "keypoints": {"AP": 3.0, "AP50": 4.0}}),
            ["box AP", "box AP50", "keypoint AP", "keypoint AP50"],
        ),
        ("cityscapes", {"segm": {"AP": 1.0, "AP50": 2.0}}, ["mask AP", "mask AP50"]),
        ("voc_2012_sem_seg", {"sem_seg": {"mIoU": 1.0, "fwIoU": 2.0, "IoU-cat": 5.0}}, ["semantic mIoU"]),
        ("lvis", {"bbox": {"AP": 1.0, "AP75": None, "APr": 2.0}}, ["box AP", "box AP75", "box APr"]),
    ],
)
def test_other_tasks_have_their_own_columns(tmp_path, detection, dataset, results, header):
    folder = change(detection("random", 1, 10.0), results=results, dataset={"name": dataset})
    (folder / "predictions" / "coco_instances_results.json").unlink()
    output = make_report(tmp_path, folder)
    markdown = (output / "report.md").read_text()
    assert rows(markdown, "initialisation")[0][3:] == header
    assert (output / "transfer.png").is_file()
    assert "no picture of scenes, since no run has its coco" in markdown.replace("\\", "")


def test_a_folder_of_runs_stands_for_all_in_it(tmp_path, detection, pretraining):
    detection("random", 1, 10.0, name="all/seed1")
    detection("random", 2, 12.0, name="all/seed2")
    runs = read_runs([tmp_path / "all", tmp_path / "all" / "seed2", pretraining])
    assert [run.path.name for run in runs] == ["seed1", "seed2", "pretraining"]


def test_bookkeeping_and_keys_of_another_version_do_not_tell_runs_apart(linear):
    folders = [linear("random", seed, knn_top1=1.0) for seed in (1, 2, 3)]
    configs = [{"LOG": {"WANDB": ""}, "A": 1}, {"LOG": {"WANDB": "mine"}, "A": 1}, {"A": 1, "B": 2}]
    for folder, config in zip(folders, configs, strict=True):
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (setting,) = settings(read_runs(folders))
    assert [(group.label, len(group.runs)) for group in setting.groups] == [("random", 3)]
    (folders[0] / "config.yaml").write_text(yaml.safe_dump({"A": 3}))
    (setting,) = settings(read_runs(folders))
    assert [len(group.runs) for group in setting.groups] == [1, 2]
