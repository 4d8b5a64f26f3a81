"""The whole report, made by the command from run folders: what it says is checked against numbers by hand."""

import base64
import json
import re
import subprocess
import sys

import pytest
import yaml
from PIL import Image

from foundation.errors import UserError
from reporting.compose import write_report
from reporting.runs import read_runs


def test_all_kinds_of_runs_make_one_report(tmp_path, detection, linear, pretraining, write, make_report, capsys):
    few = {"kind": "finetune", "config": "tiny", "init": "random", "seed": 1, "fraction": 0.01, "images": 3, "top1": 9}
    transfer = {
        "kind": "transfer",
        "init": "random",
        "seed": 0,
        "encoder": "resnet18",
        "data": "/a/b/flowers",
        "top1": 7,
    }
    page = make_report(
        pretraining,
        linear("random", 1, linear_top1=20.0),
        linear("corinfomax", 1, linear_top1=50.0),
        write(tmp_path / "few", few),
        write(tmp_path / "transfer", transfer),
        detection("random", 1, 10.0),
        detection("corinfomax", 1, 14.0),
    )
    assert page.files == {"report.md", "report.html", "transfer.png", "curves.png", "predictions.png", "worst.png"}
    for name in ("transfer", "curves", "predictions"):
        assert min(Image.open(page.folder / f"{name}.png").size) > 150
    assert re.findall(r"^## (.*)", page.markdown, re.M) == [
        *("Pretraining", "Frozen encoder", "Fine-tuning with labels", "Frozen encoder on other images"),
        *("Detection and segmentation", "Training", "Scenes", "Runs"),
    ]
    assert page.rows("pretraining")[0] == [
        *("pretraining", "corinfomax", "", "", "4", "20", "8.0 → 5.0", "20.0 → 35.2", "150")
    ]
    assert "tiny, 1 % of the labels (3 images)" in page.markdown
    assert "resnet18 on flowers. All numbers in percent" in page.markdown
    assert page.rows("initialisation", "resnet18 on flowers")[0] == ["initialisation", "seeds", "runs", "top-1"]
    assert str(page.folder) in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_a_full_disk_leaves_the_last_report(linear, tmp_path, files_up_to):
    found, folder = read_runs([linear("random", 1, linear_top1=20.0)]), tmp_path / "page"
    write_report(found, "old", folder)
    before = (folder / "report.html").read_bytes()
    with files_up_to(2000), pytest.raises(UserError, match="cannot write the report"):
        write_report(found, "new", folder)
    assert (folder / "report.html").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"report.md", "report.html"}


@pytest.mark.usefixtures("no_pictures")
def test_seeds_are_averaged_with_their_sample_deviation(detection, make_report):
    folders = [detection("random", seed, ap) for seed, ap in ((3, 12.0), (1, 10.0), (2, 11.0))]
    folders += [detection("corinfomax", seed, ap) for seed, ap in ((1, 20.0), (2, 23.0))]
    page = make_report(*folders)
    # random: mean 11, deviation 1. corinfomax: mean 21.5, deviation 3/√2 = 2.12. Difference: 10.5 ± √(1 + 4.5) = 2.35.
    assert page.rows("random")[0] == [
        *("random", "1, 2, 3", "3", "11.0 ± 1.0", "22.0 ± 2.0", "5.5 ± 0.5", "9.0 ± 1.0", "20.0 ± 2.0", "")
    ]
    assert page.rows("corinfomax")[0][:4] == ["corinfomax", "1, 2", "2", "21.5 ± 2.1"]
    assert page.rows("corinfomax − random")[0][3] == "+10.5 ± 2.3"
    assert "Box AP: 21.5 ± 2.1 from corinfomax (2 runs), 11.0 ± 1.0 from random (3 runs): a difference of +10.5" in (
        page.markdown
    )
    assert "more than the spread (2.3); every run of corinfomax is above every run of random." in page.markdown


@pytest.mark.usefixtures("no_pictures")
def test_a_difference_within_the_spread_is_called_that(linear, make_report):
    folders = [linear("random", seed, knn_top1=value) for seed, value in ((1, 20.0), (2, 24.0))]
    folders += [linear("corinfomax", seed, knn_top1=value) for seed, value in ((1, 21.0), (2, 24.0))]
    page = make_report(*folders)
    # 22.5 - 22, against √(8 + 4.5) = 3.54
    assert "a difference of +0.5, within the spread (3.5): these runs do not tell the two apart." in page.markdown
    assert "more than the spread" not in page.markdown


@pytest.mark.usefixtures("no_pictures")
def test_of_single_runs_no_spread_is_claimed(linear, make_report):
    page = make_report(linear("random", 1, knn_top1=30.0), linear("supervised", 1, knn_top1=28.0))
    assert "a difference of −2.0; its spread over seeds was not measured." in page.markdown
    assert "±" not in page.markdown


@pytest.mark.usefixtures("no_pictures")
def test_only_measured_cells_are_filled(linear, make_report):
    page = make_report(linear("random", 1, linear_top1=0.0), linear("corinfomax", 1, knn_top1=40.0))
    assert page.rows("initialisation")[0] == ["initialisation", "seeds", "runs", "linear top-1", "kNN top-1"]
    assert page.rows("random")[0] == ["random", "1", "1", "0.0", ""]
    assert page.rows("corinfomax")[0] == ["corinfomax", "1", "1", "", "40.0"]
    assert page.rows("corinfomax − random")[0][3:] == ["", ""]
    assert "An empty cell was not measured." in page.markdown
    assert "a difference" not in page.markdown


@pytest.mark.usefixtures("no_pictures")
def test_keys_of_a_later_version_are_no_difference_between_initialisations(detection, make_report):
    folders = [detection("random", 1, 10.0), detection("corinfomax", 1, 14.0)]
    config = folders[1] / "config.yaml"
    config.write_text(config.read_text() + "TEST: {PATIENCE: 0}\nDATASETS: {CLASSES: [a, b]}\n")
    assert "also differ" not in make_report(*folders).markdown


@pytest.mark.usefixtures("no_pictures")
def test_variants_of_one_initialisation_are_kept_apart_and_named(detection, make_report):
    page = make_report(
        detection("random", 1, 10.0),
        detection("corinfomax", 1, 14.0, name="low-1"),
        detection("corinfomax", 2, 16.0, name="low-2"),
        detection("corinfomax", 1, 17.0, rate=0.1, name="high"),
    )
    assert page.rows("corinfomax (low-1)")[0][1:4] == ["1, 2", "2", "15.0 ± 1.4"]
    assert page.rows("corinfomax (high)")[0][1:4] == ["1", "1", "17.0"]
    assert page.rows("SOLVER.BASE_LR")[0] == ["SOLVER.BASE_LR", "0.02", "0.02", "0.1"]
    assert "corinfomax (high) and random also differ in SOLVER.BASE_LR" in page.markdown
    assert "corinfomax (low-1) and random also differ" not in page.markdown
    assert "OUTPUT_DIR" not in page.markdown


@pytest.mark.usefixtures("no_pictures")
def test_what_differs_between_runs_of_one_name(detection, change, make_report):
    folders = [change(detection("corinfomax", seed, 14.0), weights=f"seed{seed}.pkl") for seed in (1, 2)]
    path = folders[1] / "config.yaml"
    path.write_text(path.read_text() + "DATALOADER: {NUM_WORKERS: 4}\n")
    page = make_report(*folders)
    assert "Runs that are averaged as repetitions of one another differ in these values too" in page.markdown
    assert page.rows("corinfomax", "Runs that are averaged")[:2] == [
        ["corinfomax", "DATALOADER.NUM_WORKERS", "(none) (seed 1); 4 (seed 2)"],
        ["corinfomax", "weights", "seed1.pkl (seed 1); seed2.pkl (seed 2)"],
    ]


def test_a_detector_without_masks_is_reported_too(detection, make_report):
    folder = detection("random", 1, 10.0)
    results = json.loads((folder / "results.json").read_text())
    del results["results"]["segm"]
    (folder / "results.json").write_text(json.dumps(results))
    path = folder / "predictions" / "coco_instances_results.json"
    (found,) = json.loads(path.read_text())
    del found["segmentation"]
    path.write_text(json.dumps([found]))
    page = make_report(folder)
    assert page.rows("random")[0][3:] == ["10.0", "20.0", "5.0"]
    assert "mask AP" not in page.markdown


def test_runs_on_other_data_are_not_compared(detection, change, make_report):
    folders = [detection("random", 1, 10.0), change(detection("corinfomax", 1, 14.0), train_images=80)]
    page = make_report(*folders)
    assert "a difference" not in page.markdown
    assert "tiny_FPN on 8 images, 40 iterations, evaluated on tiny" in page.markdown
    assert "tiny_FPN on 80 images, 40 iterations, evaluated on tiny" in page.markdown
    assert "predictions-2.png" in page.files


def test_names_are_escaped_and_the_page_needs_no_other_file(detection, make_report):
    folders = [detection("random", 1, 10.0), detection("a<script>|b", 1, 14.0, name="x & y")]
    page = make_report(*folders, arguments=("--title", "<b>T</b> & Co"))
    assert "<title>&lt;b&gt;T&lt;/b&gt; &amp; Co</title>" in page.html
    assert "a&lt;script&gt;|b" in page.html
    assert "<script" not in page.html
    assert "x &amp; y" in page.html
    assert r"| a\<script\>\|b " in page.markdown
    sources = re.findall(r'src="([^"]*)"', page.html)
    assert len(sources) == 4
    for source, name in zip(sources, ("transfer", "curves", "predictions", "worst"), strict=True):
        header, data = source.split(",")
        assert header == "data:image/png;base64"
        assert base64.b64decode(data) == (page.folder / f"{name}.png").read_bytes()
    assert "http" not in page.html


@pytest.mark.usefixtures("no_pictures")
def test_datasets_are_named_without_their_folders(detection, change, dataset, make_report):
    folders = []
    for name in ("/long/way/val.json@/long/way/val", "/long/road/val.json@/long/road/val"):
        folders.append(change(detection("random", len(folders), 10.0), dataset={**dataset, "name": name}))
    page = make_report(folders[0])
    assert "evaluated on val.json. All numbers" in page.markdown
    page = make_report(*folders)  # two of one name are told apart
    assert "evaluated on way. All numbers" in page.markdown
    assert "evaluated on road. All numbers" in page.markdown


@pytest.mark.usefixtures("no_pictures")
def test_ap_of_each_class(detection, change, make_report):
    folders = [detection(init, 1, 10.0) for init in ("random", "corinfomax")]
    for folder, values in zip(folders, ((30.0, 10.0), (31.0, 25.5)), strict=True):
        results = json.loads((folder / "results.json").read_text())["results"]
        results["bbox"] |= {"AP-a<b>&c": values[0], "AP-other": values[1], "AP-none": None}
        change(folder, results=results)
        sizes = [{"name": "a<b>&c", "objects": 7}, {"name": "other", "objects": 0}]
        (folder / "predictions" / "analysis.json").write_text(json.dumps({"bbox": {"classes": sizes}}))
    page = make_report(*folders)
    assert page.rows("other", "## Classes")[0] == ["other", "0", "10.0", "25.5", "+15.5"]
    assert page.rows(r"a\<b\>&c", "## Classes")[0] == [r"a\<b\>&c", "7", "30.0", "31.0", "+1.0"]
    assert page.rows("none", "## Classes")[0] == ["none", "", "", "", ""]
    table = page.markdown[page.markdown.index("## Classes") :]
    assert table.index("| other") < table.index(r"| a\<b\>&c") < table.index("| none")


@pytest.mark.usefixtures("no_pictures")
def test_ap_of_each_class_from_the_analysis(detection, make_report):
    """LVIS and VOC have it there only, with a sentence on what it is."""
    folder = detection("random", 1, 10.0)
    classes = [{"name": name, "objects": 3, "AP": ap} for name, ap in (("cat", 12.5), ("dog", 20.0), ("never", None))]
    content = {task: {"classes": classes, "note": "by COCO's definitions"} for task in ("bbox", "segm")}
    (folder / "predictions" / "analysis.json").write_text(json.dumps(content))
    page = make_report(folder)
    table = page.markdown[page.markdown.index("## Classes") :]
    assert table.count(": by COCO's definitions.") == 1
    assert page.rows("dog", "## Classes")[0] == ["dog", "3", "20.0", "20.0"]
    assert table.index("| dog") < table.index("| cat")
    assert "| never" not in table


@pytest.mark.usefixtures("no_pictures")
def test_ap_by_the_size_of_objects(detection, change, make_report):
    folders = [detection(init, 1, 10.0) for init in ("random", "corinfomax")]
    for folder, small in zip(folders, (1.0, 3.5), strict=True):
        results = json.loads((folder / "results.json").read_text())["results"]
        results["bbox"] |= {"APs": small, "APm": 20.0, "APl": None}
        change(folder, results=results)
    page = make_report(*folders)
    below = "AP by the area of the objects"
    assert page.rows("initialisation", below)[0] == ["initialisation", "box, small (below 32²)", "box, medium"]
    assert page.rows("random", below)[0] == ["random", "1.0", "20.0"]
    assert page.rows("corinfomax − random", below)[0] == ["corinfomax − random", "+2.5", "0.0"]


@pytest.mark.usefixtures("no_pictures")
def test_several_evaluation_sets(tmp_path, detection, write, make_report):
    """An evaluation of a detector on another set belongs to the run that trained the detector."""
    folders = []
    for init, ap in (("random", 10.0), ("corinfomax", 14.0)):
        trained = detection(init, 3, ap)
        results = json.loads((trained / "results.json").read_text())
        results |= {"iterations": 0, "train_images": 0, "init": "model_final", "seed": 0}
        results |= {"weights": str(trained / "model_final.pth"), "dataset": {"name": "/a/other.json@/a/images"}}
        results["results"] = {"bbox": {"AP": ap / 2}}
        folders += [trained, write(tmp_path / f"{init}-other", results)]
    page = make_report(*folders)
    assert page.rows("initialisation", "Box AP, in percent, on several")[0] == ["initialisation", "tiny", "other.json"]
    assert page.rows("random", "Box AP, in percent, on several")[0] == ["random", "10.0", "5.0"]
    assert page.rows("corinfomax", "Box AP, in percent, on several")[0] == ["corinfomax", "14.0", "7.0"]
    assert "on several evaluation sets (tiny_FPN on 8 images, 40 iterations)." in page.markdown
    assert page.rows("random", "evaluated on other.json. All")[0] == ["random", "3", "1", "5.0"]


@pytest.mark.usefixtures("no_pictures")
def test_several_evaluation_sets_of_one_run(detection, change, make_report):
    """`DATASETS.TEST` with two entries: results.json holds the evaluations on the others."""
    folders = []
    for init, ap in (("random", 10.0), ("corinfomax", 14.0)):
        folder = detection(init, 3, ap)
        entry = {"dataset": {"name": "/a/other.json@/a/images"}, "predictions": "predictions_other"}
        entry["results"] = {"bbox": {"AP": ap / 2, "AP-cat": ap / 4}}
        change(folder, evaluations=[entry, "nonsense"])
        (folder / "predictions_other").mkdir()
        sizes = [{"name": "cat", "objects": 7, "AP": ap, "AP50": ap}]
        (folder / "predictions_other" / "analysis.json").write_text(json.dumps({"bbox": {"classes": sizes}}))
        folders.append(folder)
    page = make_report(*folders)
    assert page.rows("initialisation", "Box AP, in percent, on several")[0] == ["initialisation", "tiny", "other.json"]
    assert page.rows("corinfomax", "Box AP, in percent, on several")[0] == ["corinfomax", "14.0", "7.0"]
    assert page.rows("random", "evaluated on other.json. All")[0] == ["random", "3", "1", "5.0"]
    assert page.rows("cat", "AP of each class")[0] == ["cat", "7", "2.5", "3.5", "+1.0"]
    assert len(page.rows(str(folders[0]), "The runs that this page")) == 1


@pytest.mark.usefixtures("no_pictures")
def test_other_data_of_the_same_recipe_is_another_setting(
    tmp_path, detection, change, pretraining, linear, make_report
):
    """Neither detectors nor encoders that were trained on other images are put into one table."""
    other = change(detection("random", 1, 20.0, name="other"), dataset={"name": "other"})
    linears = [change(linear("random", seed, knn_top1=20.0), dataset="folder") for seed in (1, 2)]
    for folder, name in zip(linears, ("cats", "dogs\udcff"), strict=True):  # not UTF-8, as file names may be
        (folder / "config.yaml").write_text(yaml.safe_dump({"DATA": {"ROOT": f"/data/{name}/images"}}))
    page = make_report(detection("random", 1, 10.0), other, *linears)
    assert "on several evaluation sets" not in page.markdown
    assert "tiny on cats, kNN with k = 5. All numbers" in page.markdown
    assert r"tiny on dogs\\udcff, kNN with k = 5. All numbers" in page.markdown  # escaped, and that for Markdown


@pytest.mark.usefixtures("no_pictures")
def test_the_best_checkpoint_and_other_evaluations_stand_beside_the_last(detection, change, make_report):
    best = {"iterations": 30, "metric": "bbox/AP", "value": 12.34, "weights": "model_best.pth"}
    folder = detection("random", 1, 10.0)
    results = json.loads((folder / "results.json").read_text())["results"]
    others = {"bbox_TTA": {"AP": 9.5, "AP50": 21.0, "AP75": 5.0}, "segm_EMA": {"AP": 9.0}}
    page = make_report(change(folder, best=best, results=results | others))
    assert page.rows("random", "The best checkpoint")[0] == ["random", "1", "bbox/AP", "12.3", "30", "10.0"]
    below = "With test-time augmentation"
    assert page.rows("initialisation", below)[0][1:] == [f"box with TTA, {name}" for name in ("AP", "AP50", "AP75")]
    assert page.rows("random", below)[0] == ["random", "9.5 (−0.5)", "21.0 (+1.0)", "5.0 (+0.0)"]
    below = "With the moving average of the weights"
    assert page.rows("initialisation", below)[0][1:] == ["mask with EMA, AP"]
    assert page.rows("random", below)[0] == ["random", "9.0 (+1.0)"]
    assert page.rows("random")[0][3:6] == ["10.0", "20.0", "5.0"]


@pytest.mark.usefixtures("no_pictures")
def test_published_results_stand_beside_those_of_the_recipe(detection, linear, change, make_report):
    page = make_report(
        change(detection("random", 1, 10.0), config="coco_R50_C4"),
        change(linear("corinfomax", 1, linear_top1=71.3), config="cifar100_R18"),
    )
    assert page.rows("MoCo ImageNet-1K")[0] == [
        *("MoCo ImageNet-1K", "He et al. 2020, table 5d", "40.7", "60.5", "44.1", "35.4", "57.3", "37.6")
    ]
    (measured, published) = page.rows("random")[:2]
    assert measured[0:4] == ["random", "1", "1", "10.0"]
    assert published == ["random", "He et al. 2020, table 5d", "35.6", "", "", "31.4", "", ""]
    assert "Linear top-1 of corinfomax, 71.30: within the margin of 71.61 (CorInfoMax, thesis" in page.markdown
    assert page.rows("SimCLR")[0] == ["SimCLR", "thesis Table 5.1", "66.83"]


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
def test_other_tasks_have_their_own_columns(detection, change, make_report, dataset, results, header):
    folder = change(detection("random", 1, 10.0), results=results, dataset={"name": dataset})
    (folder / "predictions" / "coco_instances_results.json").unlink()
    page = make_report(folder)
    assert page.rows("initialisation")[0][3:] == header
    assert "transfer.png" in page.files
    assert "no pictures of scenes, because no run has its coco_instances_results.json." in page.markdown


def test_the_command_starts_without_torch_and_reports_errors_in_one_line(tmp_path, detection):
    """In one process: a report is made with neither torch nor detectron2 imported, and a wrong folder is one line."""
    code = (
        "import sys; from detection import report; report.main(sys.argv[1:4]);"
        " print({'torch', 'detectron2', 'torchvision'} & sys.modules.keys()); sys.argv[1] = 'nowhere'; report.cli()"
    )
    command = [sys.executable, "-c", code, str(detection("random", 1, 10.0)), "--output", str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "set()"
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere is not a folder")
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("no_pictures")
def test_one_run_is_not_counted_as_several(linear, make_report, capsys):
    make_report(linear("random", 1, knn_top1=1.0))
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "1 run read"
    assert last.startswith("The report on 1 run is in")


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, linear, make_report):
    (tmp_path / "report").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write the folder .*: it is a file; choose another --output"):
        make_report(linear("random", 1, knn_top1=1.0))


@pytest.mark.usefixtures("no_pictures")
def test_the_table_of_pretraining_has_no_empty_column_without_a_probe(tmp_path, write, make_report):
    config = {"SEED": 4, "OBJECTIVE": {"NAME": "corinfomax"}, "ENCODER": {"NAME": "resnet18"}, "DATA": {"NAME": "x"}}
    lines = [{"iteration": 9, "total": 8.0, "images_per_second": 100.0}]
    page = make_report(write(tmp_path / "pretraining", config=config, lines=lines))
    assert page.rows("run")[0] == ["run", "objective", "epochs", "batch", "seed", "iterations", "loss", "images/s"]
    assert page.rows("pretraining")[0] == ["pretraining", "corinfomax", "", "", "4", "10", "8.0", "100"]
    assert "online probe" not in page.markdown
