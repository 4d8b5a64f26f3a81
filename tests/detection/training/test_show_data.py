"""The sheet of training images: the images that a run reads first, as it reads them."""

import dataclasses
import itertools

import numpy
import pytest
from PIL import Image

pytest.importorskip("detectron2")

from detection import config as configs
from detection import train_net
from detection.data import loading, training_data
from detection.evaluation import pictures
from detection.training import show_data
from foundation.errors import UserError


def test_a_sheet_shows_what_the_model_gets(tiny_overrides, tmp_path, capsys, monkeypatch):
    cells = []
    draw = pictures.draw_cell
    monkeypatch.setattr(pictures, "draw_cell", lambda *cell: cells.append(cell) or draw(*cell))
    fixed = ["--config", "shapes_R18_FPN", "--num-gpus", "0", "--output", str(tmp_path / "run")]
    train_net.main([*fixed, "--show-data", "5", *tiny_overrides])
    assert "training_images.png" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["training_images.png"]
    sheet = Image.open(tmp_path / "run" / "training_images.png")
    assert min(sheet.size) > 500  # five cells in two rows
    config, _ = configs.for_one_process(configs.load("shapes_R18_FPN", [*tiny_overrides, "MODEL.DEVICE", "cpu"]))
    images = training_data.read(config)
    config.MODEL.DEVICE = "cuda"  # of the model; the images are drawn on the CPU
    assert show_data.draw(config, images, 1).size[0] > 400
    config.MODEL.DEVICE = "cpu"
    batches = iter(training_data.build_batches(config, images, loading.ProcessBatch(), config.SEED, workers=0))
    records = {(record["file_name"], position): record for position in range(2) for record in next(batches)}
    for photograph, overlays, note in cells[:2]:
        record = next(each for (name, _), each in records.items() if note.startswith(name.rpartition("/")[2]))
        assert (numpy.asarray(photograph) == record["image"].numpy().transpose(1, 2, 0)).all()
        assert [overlay.box for overlay in overlays] == [tuple(b) for b in record["instances"].gt_boxes.tensor.tolist()]
        assert {overlay.text for overlay in overlays} == {"rectangle", "triangle"}
        for overlay in overlays:  # a rectangle fills its box, a triangle half of it
            left, top, right, bottom = overlay.box
            filled = overlay.mask.sum() / ((right - left) * (bottom - top))
            assert filled == pytest.approx(1.0 if overlay.text == "rectangle" else 0.5, abs=0.1)


@pytest.mark.parametrize(("processes", "passes"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_images_have_the_order_in_which_a_run_reads_them(processes, passes, tiny_overrides, monkeypatch):
    """Two of four images are wide, and come into other batches than the tall ones: batches of 4, 2, 2 and 1."""
    pairs = ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATION", str(passes)]
    config, _ = configs.for_one_process(configs.load("shapes_R18_FPN", [*tiny_overrides, *pairs]))
    config.MODEL.DEVICE = "cpu"
    images = dataclasses.replace(training_data.read(config), wide=[True, False, False, True])
    shown = []
    monkeypatch.setattr(show_data.pictures, "training_sheet", lambda config, records: shown.extend(records))
    show_data.draw(config, images, 7, processes)
    shares = [loading.ProcessBatch(passes, processes, rank) for rank in range(processes)]
    ranks = [training_data.build_batches(config, images, each, config.SEED, workers=0) for each in shares]
    batches = itertools.islice(zip(*ranks, strict=True), 8)
    read = [record for together in batches for batch in together for record in batch]
    assert len(shown) == 7
    for one, other in zip(shown, read, strict=False):
        assert one["file_name"] == other["file_name"]
        assert (one["image"] == other["image"]).all()


def test_a_number_that_cannot_be_drawn(tiny_overrides, tmp_path):
    fixed = ["--config", "shapes_R18_FPN", "--num-gpus", "0", "--output", str(tmp_path / "run")]
    with pytest.raises(UserError, match="--show-data must be 1 to 100 images, not 0"):
        train_net.main([*fixed, "--show-data", "0", *tiny_overrides])
