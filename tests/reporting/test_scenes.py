"""Pictures of scenes: the same for all detectors, and what was found, missed and false is seen on them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from reporting import scenes
from reporting.groups import settings
from reporting.runs import read_runs
from reporting.scenes import evenly_spaced

SIZE = 24
BOX = (4, 6, 10, 12)


@pytest.fixture
def sheets(monkeypatch):
    """The arguments of every sheet that is composed: titles, rows of cells, names of the rows."""
    found = []
    compose = scenes.compose_sheet

    def recording(titles, rows, names):
        found.append((titles, rows, names))
        return compose(titles, rows, names)

    monkeypatch.setattr(scenes, "compose_sheet", recording)
    return found


def predict(folder, records):
    (folder / "predictions" / "coco_instances_results.json").write_text(json.dumps(records))
    return folder


def detected(image, box=BOX, score=0.9, category=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def pixels(cell):
    """The drawn photograph of a cell, without the note below it."""
    return np.asarray(cell).astype(int)[: cell.width]


def test_the_scenes_are_the_same_for_all_and_show_what_was_found(detection, make_report, sheets):
    folders = [predict(detection("random", 1, 10.0), []), detection("corinfomax", 1, 14.0)]
    page = make_report(*folders)
    titles, rows, names = sheets[0]
    assert [title for title, _ in titles] == ["ground truth", "random", "corinfomax"]
    assert names == [f"{identity}.jpg" for identity in (10, 30, 40, 50, 70)]
    truth, empty, found = map(pixels, rows[2])  # the detection is in image 40
    scale = len(truth) / SIZE
    x, y, width, height = (round(value * scale) for value in BOX)
    inside = np.s_[y + height // 2 : y + height - 20, x + width // 2 : x + width - 20]
    assert abs(truth[inside] - found[inside]).max() <= 1  # the same mask, from a polygon and from a run-length code
    assert abs(truth[inside] - empty[inside]).mean() > 20
    outside = np.s_[-40:, -40:]
    assert abs(truth[outside] - empty[outside]).max() == 0
    assert "evenly spaced among its 7 images" in page.markdown


def test_the_worst_images_and_those_that_changed(detection, make_report, sheets):
    """random finds the object of 10; corinfomax those of 20, 30 and 40, and has false detections in 10 and 50."""
    apart = (0, 0, 3, 3)
    folders = [
        predict(detection("random", 1, 10.0), [detected(10), detected(10, score=0.2)]),
        predict(
            detection("corinfomax", 1, 14.0),
            [*map(detected, (20, 30, 40)), detected(10, category=2), detected(50, apart), detected(50, apart, 0.8)],
        ),
    ]
    page = make_report(*folders)
    _, worst, changes = sheets
    assert [title for title, _ in worst[0]] == ["ground truth", "corinfomax"]
    assert worst[2] == [f"{identity}.jpg" for identity in (10, 50, 60)]  # each misses one; no other has false ones
    assert changes[2] == [f"{identity}.jpg" for identity in (20, 30, 40, 10)]
    assert "The worst images of corinfomax (seed 1): the 3 with most missed objects" in page.markdown
    assert "corinfomax finds more or fewer objects than random: the 3 with the largest gain, then" in page.markdown
    below = "Two detectors image by image"
    for text, number in (
        *(("images in which corinfomax finds more objects than random", "3"),),
        *(("images in which corinfomax finds fewer objects than random", "1"),),
        *(("images in which both find as many", "3"), ("objects found by both", "0")),
        *(("objects found by corinfomax only", "3"), ("objects found by random only", "1")),
        *(("objects found by neither", "3"), ("false detections of corinfomax", "3")),
        *(("false detections of random", "0"),),
    ):
        assert page.rows(text, below) == [[text, number]], text


def test_the_threshold_with_the_best_f1_is_taken_where_it_was_measured(detection):
    folder = predict(detection("random", 1, 10.0), [detected(10, score=0.3), detected(20, score=0.2)])
    (setting,) = settings(read_runs([folder]).runs)
    assert scenes.load(setting).detectors[0].detections == {}
    best = {"score": 0.25, "precision": 1.0, "recall": 0.5, "f1": 0.67}
    analysis = {"bbox": {"thresholds": {"best": best}}}
    (folder / "predictions" / "analysis.json").write_text(json.dumps(analysis))
    (setting,) = settings(read_runs([folder]).runs)
    (detector,) = scenes.load(setting).detectors
    assert detector.threshold == 0.25
    assert list(detector.detections) == [10]


def test_keypoints_are_drawn_where_they_are_visible(tmp_path, detection, dataset, make_report, sheets):
    folder = detection("random", 1, 10.0)
    make_report(folder)
    path = tmp_path / "instances.json"
    content = json.loads(path.read_text())
    content["categories"][0]["skeleton"] = [[1, 2], [2, 3]]
    for record in content["annotations"]:
        record["keypoints"] = [1, 20, 2, 20, 20, 2, 20, 1, 0]  # a line below the box, and one that is not visible
    path.write_text(json.dumps(content))
    make_report(folder)
    plain, drawn = (pixels(sheets[number][1][0][0]) for number in (0, 2))  # each report has the worst images too
    changed = np.argwhere((plain != drawn).any(axis=2)) * SIZE / len(plain)  # in pixels of the photograph
    assert changed[:, 0].min() > 19.5
    assert changed[:, 0].max() < 21.5
    assert (changed[:, 1].min(), changed[:, 1].max()) == pytest.approx((1.5, 20.5), abs=0.5)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("instances.json", None, "is not on this machine"),
        ("instances.json", "[" * 100_000, "nested more than 100 deep"),
        ("instances.json", '{"images": 5}', "is not in COCO's format"),
        ("scenes/40.jpg", "no image", "an image of the evaluation set cannot be read"),
        ("random-1/predictions/coco_instances_results.json", "{}", "does not hold COCO results"),
        ("random-1/predictions/coco_instances_results.json", "[", "is damaged"),
    ],
)
def test_a_missing_or_damaged_file_costs_the_pictures_only(tmp_path, detection, make_report, file, content, reason):
    folder = detection("random", 1, 10.0)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    page = make_report(folder)
    assert not {"predictions.png", "worst.png"} & page.files
    assert "no pictures of scenes, because" in page.markdown
    assert reason in page.markdown.replace("\\", "")
    assert page.rows("random")[0][3] == "10.0"


def test_huge_masks_and_boxes_are_drawn_without_harm(detection, make_report):
    huge = {"size": [2**31 - 1, 2**31 - 1], "counts": "0"}
    records = [{**detected(40), "segmentation": huge}, detected(40, (-1e6, -1e6, 1e6, 1e6)), detected(40, (0, 0, 0, 0))]
    page = make_report(predict(detection("random", 1, 10.0), records))
    assert Image.open(page.folder / "predictions.png").size[0] < 2000


def test_scenes_are_chosen_by_rule():
    assert evenly_spaced(range(10), 5) == [1, 3, 5, 7, 9]
    assert evenly_spaced([4, 8], 5) == [4, 8]


def test_predictions_of_another_evaluation_are_not_taken(detection):
    folder = detection("random", 1, 10.0)
    (run,) = read_runs([folder]).runs
    own = folder / "predictions"
    assert scenes._prediction_files(run) == [own / "coco_instances_results.json"]
    assert scenes._prediction_files(replace(run, predictions="predictions_lab")) == []
    own.rename(folder / "predictions_EMA")
    assert scenes._prediction_files(run) == []
    (folder / "predictions_EMA").rename(folder / "inference")
    assert scenes._prediction_files(run) == [folder / "inference" / "coco_instances_results.json"]
