"""Detectron2's own configuration, trainer and predictor on this project's recipes, in a script as its tools are."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from detection import inference
from detection.data import datasets
from foundation.config import config_folder

# isort: split
from detectron2.structures import BoxMode

ROOT = Path(__file__).parents[2]
# Nothing in it is of this project.
TOOL = """
import json
from pathlib import Path

from detectron2.config import get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor, DefaultTrainer, default_argument_parser, default_setup, launch


def main(arguments):
    cfg = get_cfg()
    cfg.merge_from_file(arguments.config_file)
    cfg.merge_from_list(arguments.opts)
    default_setup(cfg, arguments)
    DefaultTrainer(cfg).train()
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    found = DefaultPredictor(cfg)(read_image("picture.png", format="BGR"))["instances"]
    Path("found.json").write_text(json.dumps([found.scores.tolist(), found.pred_boxes.tensor.tolist()]))
    for path in Path(arguments.config_file).parent.glob("*.yaml"):
        get_cfg().merge_from_file(str(path))


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    launch(main, arguments.num_gpus, args=(arguments,))
"""
ONE_PROCESS = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN"]
SHORT = [
    *("SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", "2", "MODEL.ROI_HEADS.NUM_CLASSES", "2"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "96", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("TEST.PRECISE_BN.ENABLED", "False", "TEST.DETECTIONS_PER_IMAGE", "5", "OUTPUT_DIR", "run"),
]


def test_a_script_trains_and_predicts_with_a_recipe_as_this_project_predicts(tmp_path, coco_root):
    """Its dataset is one that Detectron2 does not know; its run's config and weights are read here again."""
    (tmp_path / "tool.py").write_text(TOOL)
    parts = [coco_root / "coco" / name for name in ("annotations/instances_val2017.json", "val2017")]
    names = f"DATASETS: {{TRAIN: ['{datasets.custom_name(*parts)}'], TEST: ['{datasets.custom_name(*parts)}']}}\n"
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for path in config_folder("detection").glob("*.yaml"):
        (recipes / path.name).write_text(path.read_text())
    (recipes / "own.yaml").write_text(f"_BASE_: shapes_R18_FPN.yaml\n{names}")
    picture = Image.effect_noise((128, 96), 80).convert("RGB")
    picture.save(tmp_path / "picture.png")
    tool = ["-m", "detection.stock", "tool.py", "--num-gpus", "0", "--config-file", "recipes/own.yaml"]
    command = [sys.executable, "-W", "ignore", *tool, *ONE_PROCESS, *SHORT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    scores, boxes = map(torch.tensor, json.loads((tmp_path / "found.json").read_text()))
    run = tmp_path / "run"
    config, model = inference.build_detector(str(run / "config.yaml"), str(run / "model_final.pth"), exact=True)
    ((_, _, output),) = inference.in_batches(model, config, [(0, picture)], 1, print)
    assert len(scores) == 5
    torch.testing.assert_close(output["instances"].scores, scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(output["instances"].pred_boxes.tensor, boxes, rtol=0, atol=1e-3)


class Evil:
    """Makes a folder when it is unpickled by an ordinary loader."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_weights_and_proposals_run_no_code(tmp_path):
    """Detectron2 itself unpickles both."""
    boxes = [numpy.ones((3, 4), numpy.float32)]
    proposals = {"ids": [7], "boxes": boxes, "objectness_logits": [numpy.ones(3)], "bbox_mode": BoxMode.XYWH_ABS}
    weights = {"model": {"weight": numpy.full((2, 3), 0.5, numpy.float32)}, "__author__": "x"}
    for name, content in (("good.pkl", weights), ("evil.pkl", weights | {"x": Evil()})):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    for name, content in (("good_boxes.pkl", proposals), ("evil_boxes.pkl", proposals | {"x": Evil()})):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    program = (
        "import detection.stock, torch\n"
        "from foundation.errors import UserError\n"
        "from detectron2.checkpoint import DetectionCheckpointer\n"
        "from detectron2.data.build import load_proposals_into_dataset\n"
        "from detectron2.structures import BoxMode\n"
        "model = torch.nn.Linear(3, 2)\n"
        "DetectionCheckpointer(model).load('good.pkl')\n"
        "assert model.weight.eq(0.5).all()\n"
        "(record,) = load_proposals_into_dataset([{'image_id': 7}], 'good_boxes.pkl')\n"
        "assert record['proposal_bbox_mode'] == BoxMode.XYWH_ABS and record['proposal_boxes'].shape == (3, 4)\n"
        "for call in (lambda: DetectionCheckpointer(model).load('evil.pkl'),\n"
        "             lambda: load_proposals_into_dataset([{'image_id': 7}], 'evil_boxes.pkl')):\n"
        "    try: call()\n"
        "    except UserError as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert [line.split(" ")[0] for line in done.stdout.splitlines()] == ["evil.pkl", "evil_boxes.pkl"]
    assert done.stdout.count("nothing of it was run") == 2
    assert not (tmp_path / "ran").exists()


def test_scripts_and_their_configs_are_found_or_said_to_be_missing():
    program = (
        "import sys; from detection import stock\n"
        "from foundation.errors import UserError\n"
        "print(*stock._with_config(['--eval-only', '--config-file=coco_R50_C4_1x', 'SEED', '1'])[0])\n"
        "print(*stock._with_config(['--config-file', 'coco_R50_FPN_1x_moco.yaml'])[0])\n"
        "print(*stock._with_config(['--dataset', 'a.json@b', '--x=c.json@d'])[1])\n"
        "for call, value in (stock._with_config, ['--config-file', 'coco_R50_C5']), (stock.main, ['tools/tool.py']):\n"
        "    try: call(value)\n"
        "    except UserError as error: print(error)\n"
        "from detectron2.modeling import ROI_HEADS_REGISTRY, SEM_SEG_HEADS_REGISTRY\n"
        "assert 'Res5ROIHeadsExtraNorm' in ROI_HEADS_REGISTRY and 'FCNHead' in SEM_SEG_HEADS_REGISTRY\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    folder = config_folder("detection")
    first, second, named, config, script = done.stdout.splitlines()
    assert first == f"--eval-only --config-file {folder / 'coco_R50_C4_1x.yaml'} SEED 1"
    assert second == f"--config-file {folder / 'coco_R50_FPN_1x_moco.yaml'}"
    assert named == "a.json@b c.json@d"
    assert "nearest: coco_R50_C4" in config
    assert script == "tools/tool.py: there is no such script; Detectron2's source has them in tools/"
