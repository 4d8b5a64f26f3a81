"""Run folders and a tiny dataset, and the report that is made from them."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco_mask

from detection import report
from foundation.errors import UserError
from reporting import compose, figures

SIZE = 24  # pixels of a side of the tiny images
BOX = (4, 6, 10, 12)  # x, y, width, height of the one object in each of them


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


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch):
    """Drawing takes most of the time of these tests."""
    monkeypatch.setattr(figures, "DPI", 60)


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests of what the page says: nothing is drawn."""

    def refuse(setting):
        raise UserError("no pictures in this test")

    monkeypatch.setattr(compose.scenes, "load", refuse)
    for name in ("transfer", "curves", "precision", "thresholds", "errors", "confusion"):
        monkeypatch.setattr(compose, f"draw_{name}", lambda *arguments: False)


@pytest.fixture(scope="session")
def write():
    """Writes a run folder: write(folder, results, config, lines of metrics.json)."""

    def write(folder, results=None, config=None, lines=()):
        folder.mkdir(parents=True)
        if results is not None:
            (folder / "results.json").write_text(json.dumps(results))
        if config is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
        if lines:
            (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write


@pytest.fixture(scope="session")
def change():
    """Changes entries of a run's results.json: change(folder, key=value, ...)."""

    def change(folder, **fields):
        path = folder / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    return change


@pytest.fixture(scope="session")
def square():
    """The mask of the object in each image, (SIZE, SIZE)."""
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    x, y, width, height = BOX
    mask[y : y + height, x : x + width] = 1
    return mask


@pytest.fixture(scope="session")
def run_length_code(square):
    code = coco_mask.encode(np.asfortranarray(square))
    return {"size": code["size"], "counts": code["counts"].decode()}


@pytest.fixture
def detection(tmp_path, dataset, write, run_length_code):
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
        config = {"SEED": seed, "OUTPUT_DIR": str(folder), "SOLVER": {"BASE_LR": rate, "MAX_ITER": 40}}
        lines = [{"iteration": i, "total_loss": 3.0 - i / 20} for i in (19, 39)] + [{"iteration": 40, "bbox/AP": ap}]
        write(folder, results, config, lines)
        found = {"image_id": 40, "category_id": 1, "bbox": list(BOX), "score": 0.9, "segmentation": run_length_code}
        (folder / "predictions").mkdir()
        (folder / "predictions" / "coco_instances_results.json").write_text(json.dumps([found]))
        return folder

    return make


@pytest.fixture
def linear(tmp_path, write):
    def make(init, seed, **accuracies):
        results = {"kind": "linear", "config": "tiny", "init": init, "dataset": "shapes", "seed": seed, "k": 5}
        return write(tmp_path / f"linear-{init}-{seed}", results | accuracies)

    return make


@pytest.fixture
def pretraining(tmp_path, write):
    config = {"SEED": 4, "OBJECTIVE": {"NAME": "corinfomax"}, "ENCODER": {"NAME": "resnet18"}, "DATA": {"NAME": "x"}}
    lines = [
        {"iteration": 9, "total": 8.0, "big_bang": 6.0, "learning_rate": 0.1, "images_per_second": 100.0},
        {"iteration": 9, "knn_top1": 20.0},
        {"iteration": 19, "total": 5.0, "big_bang": 4.0, "learning_rate": 0.2, "images_per_second": 200.0},
        {"iteration": 19, "knn_top1": 35.25},
    ]
    return write(tmp_path / "pretraining", config=config, lines=lines)


class Page:
    """A report that was written."""

    def __init__(self, folder):
        self.folder = folder
        self.markdown = (folder / "report.md").read_text()
        self.html = (folder / "report.html").read_text()
        self.files = {path.name for path in folder.iterdir()}

    def rows(self, first, after=""):
        """The cells of the table rows that begin with a word, below some text."""
        lines = self.markdown[self.markdown.index(after) :].splitlines()
        found = [line for line in lines if line.startswith("|") and line[1:].split("|")[0].strip() == first]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


@pytest.fixture
def make_report(tmp_path):
    """Runs the command: make_report(folder, ..., arguments=[...])."""

    def make(*folders, arguments=()):
        output = tmp_path / "report"
        report.main([*map(str, folders), "--output", str(output), *arguments])
        return Page(output)

    return make
