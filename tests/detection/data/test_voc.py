"""The reader of VOC's layout: what it converts and what it refuses; and the evaluation with what it reads."""

import json

import numpy
import pytest
import torch

pytest.importorskip("detectron2")

from detection import config as configs
from detection.checks import preflight
from detection.data import voc
from detection.evaluation.evaluators import VOCEvaluator
from foundation.errors import UserError
from tests.detection import formats

# isort: split
from detectron2.data import DatasetCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

OBJECT = (
    "<object><name>cat</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult><bndbox><xmin>3</xmin>"
    "<ymin>4</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>"
)
XML = f"<annotation><size><width>96</width><height>80</height></size>{OBJECT}</annotation>"
CAT = voc.VocObject("cat", (3, 4, 20, 30), False)


def read(tmp_path, text):
    path = tmp_path / "a.xml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return voc.read_image(path)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", CAT),
        ("<xmin>3<", "<xmin>3.5<", CAT._replace(corners=(3.5, 4, 20, 30))),
        ("<difficult>0</difficult>", "", CAT),
        ("<difficult>0</difficult>", "<difficult/>", CAT),
        ("<difficult>0<", "<difficult>Unspecified<", CAT),
        ("<difficult>0<", "<difficult>1<", CAT._replace(difficult=True)),
        ("<pose>Left</pose>", "", CAT),
        ("<truncated>0</truncated>", "<truncated>Unspecified</truncated>", CAT),
        ("<name>cat<", "<name> cat\n<", CAT),
        ("<width>96<", "<width>96.0<", CAT),
    ],
)
def test_what_has_one_meaning_is_read(old, new, expected, tmp_path):
    assert read(tmp_path, XML.replace(old, new, 1)) == (96, 80, [expected])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<name>cat<", "<name><", "object 0: there is no name"),
        ("<xmin>3</xmin>", "", "object 0: there is no bndbox/xmin"),
        ("<xmin>3<", "<xmin>left<", "object 0: bndbox/xmin is 'left': must be finite numbers"),
        ("<difficult>0<", "<difficult>2<", "object 0: difficult is '2': must be 0 or 1"),
        ("<width>96</width>", "", "there is no size/width"),
        ("<width>96<", "<width>0<", "size/width and size/height must be at least 1"),
        ("<width>96<", "<width>95.5<", "size/width is '95.5': must be whole numbers"),
        ("</annotation>", "", "not valid XML"),
    ],
)
def test_what_has_none_is_refused(old, new, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, XML.replace(old, new, 1))


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "utf-16", "shift_jis", "utf-8-sig"])
def test_the_encoding_that_the_file_declares(encoding, tmp_path):
    name = "猫" if encoding in ("gbk", "utf-16", "shift_jis", "utf-8-sig") else "chaté"
    declared = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>\n'
    text = (declared + XML.replace("cat", name)).encode(encoding)
    assert read(tmp_path, text).objects[0].name == name


def test_lists(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("\ufeff000001  1\n\n  000002 -1\r\n\n")
    assert voc.read_list(path) == ["000001", "000002"]
    path.write_text("alone")
    assert voc.read_list(path) == ["alone"]
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot be read"):
        voc.read_list(path)


def show(evaluator, records):
    """Boxes near the objects, some of another class; their scores as numbers with three decimals, as VOC has them."""
    rng = numpy.random.default_rng(0)
    evaluator.reset()
    for record in records:
        detected = Instances((record["height"], record["width"]))
        boxes = numpy.array([each["bbox"] for each in record["annotations"]]).reshape(-1, 4)
        detected.pred_boxes = Boxes(torch.from_numpy(boxes + rng.normal(0, 2, boxes.shape)).float())
        detected.scores = torch.from_numpy(rng.random(len(boxes)).round(2))
        classes = [each["category_id"] for each in record["annotations"]]
        detected.pred_classes = torch.tensor(classes, dtype=torch.int64)
        evaluator.process([record], [{"instances": detected}])
    return evaluator.evaluate()["bbox"]


def test_the_evaluation_equals_detectron2s_and_takes_what_that_fails_on(scenes, dataset_root):
    formats.write_voc(scenes, dataset_root)
    preflight.check(configs.load("voc_R50_C4_24k"), (), ("voc_2007_test",))
    records = DatasetCatalog.get("voc_2007_test")
    expected = show(PascalVOCDetectionEvaluator("voc_2007_test"), records)
    assert 0 < expected["AP"] < 100
    assert show(VOCEvaluator("voc_2007_test", dataset_root / "found"), records) == pytest.approx(expected)
    analysis = json.loads((dataset_root / "found" / "analysis.json").read_text())["bbox"]
    # Nothing is difficult here, and every object has one detection, near it.
    assert sum(each["objects"] for each in analysis["classes"]) == sum(len(each["annotations"]) for each in records)
    assert analysis["counts"]["objects"] == analysis["counts"]["detections"]
    assert analysis["counts"]["missed"] + analysis["counts"]["correct"] + analysis["counts"]["localisation"] > 0
    assert 0 < analysis["summary"]["AP50"] <= 100
    assert analysis["thresholds"]["best"]["f1"] > 0.5
    folder = dataset_root / "VOC2007"
    for path in (folder / "Annotations").glob("test_*.xml"):
        text = path.read_text().replace("<pose>Left</pose>", "").replace("<truncated>0</truncated>", "<truncated />")
        path.write_text(text.replace("<difficult>0</difficult>", "").replace("</xmin>", ".0</xmin>"))
    names = folder / "ImageSets" / "Main" / "test.txt"
    names.write_text(names.read_text().replace("\n", " 1\n\n"))
    preflight.check(configs.load("voc_R50_C4_24k"), (), ("voc_2007_test",))
    assert DatasetCatalog.get("voc_2007_test") == records
    assert show(VOCEvaluator("voc_2007_test"), records) == pytest.approx(expected)
    names.write_text(names.read_text().split()[0])  # a list with one name
    assert len(DatasetCatalog.get("voc_2007_test")) == 1
