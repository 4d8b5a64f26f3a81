"""A detector as TorchScript finds what the original finds, in images of other sizes and other contents too."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("detectron2")

from detection import config as configs
from detection import export
from detection.training.trainer import TransferTrainer
from foundation.errors import UserError

SMALL = [
    *("DATASETS.TEST", "('unknown',)", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"),
    *("SOLVER.PRECISION", "float32", "MODEL.DEVICE", "cpu", "TEST.DETECTIONS_PER_IMAGE", "5"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("MODEL.RETINANET.NUM_CLASSES", "3", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"),
]


def detector(recipe, seed=0, pairs=()):
    config, _ = configs.for_one_process(configs.load(recipe, [*SMALL, *pairs]))
    torch.manual_seed(seed)
    return config, TransferTrainer.build_model(config).eval()


def image(height, width, seed):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def predictor(model):
    heads = model.roi_heads.box_predictor
    return heads[-1] if isinstance(heads, torch.nn.ModuleList) else heads


@pytest.mark.parametrize(
    ("recipe", "outputs"),
    [
        ("shapes_R18_FPN", ["boxes", "classes", "masks", "scores"]),
        ("shapes_R50_C4", ["boxes", "classes", "masks", "scores"]),
        pytest.param("coco_R50_Cascade_FPN_1x_moco", ["boxes", "classes", "masks", "scores"], marks=pytest.mark.slow),
        ("coco_R50_RetinaNet_1x", ["boxes", "classes", "scores"]),
    ],
)
def test_the_exported_detector_is_the_original(recipe, outputs):
    _, model = detector(recipe)
    traced, names = export.trace(model, image(64, 80, 0))
    assert names == outputs
    assert export.compare(traced, names, model, image(96, 64, 1)) > 0
    assert export.compare(traced, names, model, image(64, 64, 2)) > 0
    _, other = detector(recipe, seed=1)
    with pytest.raises(UserError, match=r"the exported detector (finds|differs)"):
        export.compare(traced, names, other, image(64, 64, 2))


def test_the_command_leaves_a_file_that_runs_without_this_project(tmp_path, capsys):
    config, model = detector("shapes_R18_FPN")
    (tmp_path / "config.yaml").write_text(config.dump())
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    path = tmp_path / "exported" / "detector.ts"
    export.main(
        ["--config", str(tmp_path / "config.yaml"), "--weights", str(tmp_path / "model.pth"), "--output", str(path)]
    )
    assert "objects as the original, in 64x48 and 64x80 pixels" in capsys.readouterr().out
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["detector.json", "detector.ts"]
    note = json.loads(path.with_suffix(".json").read_text())
    assert (note["format"], note["min_size"], note["classes"]) == ("RGB", 64, ["class 0", "class 1", "class 2"])
    program = (
        "import sys, torch, torchvision\n"
        "detector = torch.jit.load(sys.argv[1])\n"
        "found = dict(zip(sys.argv[2].split(), detector(torch.zeros(3, 70, 90, dtype=torch.uint8))))\n"
        "print(found['boxes'].shape[1], len({'detectron2', 'detection'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(path), " ".join(note["outputs"])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "4 0\n"


@pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
def test_a_check_in_which_nothing_is_found_is_repeated_without_a_threshold(heads):
    pairs = ["MODEL.ROI_HEADS.NAME", heads, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
    _, model = detector("shapes_R18_FPN", pairs=pairs)
    predictor(model).test_score_thresh = 0.99
    images = [image(64, 80, 0), image(96, 64, 1)]
    traced, names = export.trace(model, images[0])
    assert [export.compare(traced, names, model, each) for each in images] == [0, 0]
    assert min(export.compare_without_threshold(model, images)) > 0
    assert predictor(model).test_score_thresh == 0.99
    predictor(model).test_topk_per_image = 0
    with pytest.raises(UserError, match="finds no object in the images, which proves nothing"):
        export.compare_without_threshold(model, images)


def test_examples_of_one_size_prove_too_little(tmp_path):
    from PIL import Image

    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    config = configs.load("shapes_R18_FPN", SMALL)
    with pytest.raises(UserError, match="both are resized to one size"):
        export.example_images(config, [str(tmp_path / "a.png"), str(tmp_path / "b.png")])
