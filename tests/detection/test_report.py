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

from cli.errors import UserError
from detection import report, report_colours
from detection.report_groups import KINDS, Statistic, difference, settings
from detection.report_runs import read_runs
from detection.report_scenes import count_found, decode_mask, evenly_spaced

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
    assert report_colours.of_labels(["corinfomax", "a", "random", "a", "b"]) == {
        **{"random": "#767676", "corinfomax": "#0072b2"},
        **{"a": "#d55e00", "b": "#009e73"},
    }
    assert len(set(report_colours.of_classes(range(10)).values())) == 10


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
    assert rows(markdown, "random")[0][3:] == ["10.0", "20.0", "5.0", "", "", ""]


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
