"""A dataset in COCO's layout, small enough for two real steps of training."""

import json
import sys

import numpy
import pytest
from PIL import Image, ImageDraw

SIZE = 64
COLOURS = {1: (220, 40, 40), 2: (40, 40, 220)}


def write_split(root, split, count):
    """`count` noisy pictures, each with one rectangle and one triangle, and their annotations."""
    rng = numpy.random.default_rng(count)
    folder = root / "coco" / f"{split}2017"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for index in range(count):
        picture = Image.fromarray(rng.integers(90, 160, (SIZE, SIZE, 3), dtype=numpy.uint8))
        for category in (1, 2):
            x, y = (int(value) for value in rng.integers(2, 14, 2) + (category - 1) * 26)
            corners = [(x, y), (x + 22, y), (x + 22, y + 22), (x, y + 22)][: 5 - category]
            ImageDraw.Draw(picture).polygon(corners, fill=COLOURS[category])
            annotations.append({
                "id": len(annotations) + 1, "image_id": index + 1, "category_id": category, "iscrowd": 0,
                "bbox": [x, y, 22, 22], "area": 484 / category,
                "segmentation": [[value for corner in corners for value in corner]],
            })  # fmt: skip
        picture.save(folder / f"{index:03}.jpg")
        images.append({"id": index + 1, "file_name": f"{index:03}.jpg", "height": SIZE, "width": SIZE})
    categories = [{"id": 1, "name": "rectangle"}, {"id": 2, "name": "triangle"}]
    path = root / "coco" / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


@pytest.fixture
def coco_root(tmp_path):
    """A folder for DETECTRON2_DATASETS with coco/{train2017,val2017,annotations}."""
    write_split(tmp_path, "train", 4)
    write_split(tmp_path, "val", 2)
    return tmp_path


@pytest.fixture
def tiny(coco_root):
    """Names of a registered training and validation set."""
    pytest.importorskip("detectron2")
    import foundation.detectron2_compat  # noqa: F401

    # isort: split
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    names = ("tiny_train", "tiny_val")
    for name in names:
        split = f"{name.removeprefix('tiny_')}2017"
        annotations = coco_root / "coco" / "annotations" / f"instances_{split}.json"
        register_coco_instances(name, {}, str(annotations), str(coco_root / "coco" / split))
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


TINY = [
    *("DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "MODEL.ROI_HEADS.NUM_CLASSES", "2"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0"),
    *("TEST.PRECISE_BN.NUM_ITER", "2", "DATALOADER.NUM_WORKERS", "0", "SOLVER.PRECISION", "float32"),
    *("LOG.PICTURES", "0"),
]


@pytest.fixture
def tiny_overrides(tiny):
    """KEY VALUE pairs that make a recipe small."""
    return TINY


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A few small scenes of the embedded dataset, in COCO's format."""
    from tests.detection import formats

    return formats.render(tmp_path_factory.mktemp("shapes") / "rendered")


@pytest.fixture
def dataset_root(tmp_path, monkeypatch):
    """A folder, not there yet, that Detectron2's built-in datasets are registered below."""
    from tests.detection import formats

    with formats.datasets_below(tmp_path / "datasets", monkeypatch):
        yield tmp_path / "datasets"


@pytest.fixture
def error_of(capsys, as_a_command):
    """Runs a command as its process would, and gives the one line that it ends with."""

    def call(cli, *arguments):
        argv, sys.argv = sys.argv, ["command", *map(str, arguments)]
        try:
            with pytest.raises(SystemExit) as stopped:
                cli()
        finally:
            sys.argv = argv
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("error: ")
        return line

    return call
