"""Each recipe runs: on data of its dataset's own format, by the command, with its own evaluation."""

import importlib.util
import json
import math
import pickle
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detection import config as configs
from detection import train_net
from detection.training import checkpoints, trainer, weights
from foundation.config import config_folder
from tests.detection import formats

WRITERS = {
    "coco": formats.write_coco,
    "lvis": formats.write_lvis,
    "voc": formats.write_voc,
    "voc_semseg": formats.write_voc_segmentation,
    "cityscapes": formats.write_cityscapes,
}
NEEDED = {"lvis": ["lvis"], "cityscapes": ["cityscapesscripts", "shapely"]}
SMALL = [
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice", "INPUT.MIN_SIZE_TEST", "64"),
    *("INPUT.MAX_SIZE_TRAIN", "96", "INPUT.MAX_SIZE_TEST", "96", "INPUT.CROP.SIZE", "[56, 56]", "INPUT.LSJ.SIZE", "96"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "16", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "4"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "6"),
    *("TEST.DETECTIONS_PER_IMAGE", "4", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16, 16)"),
    *("TEST.PRECISE_BN.NUM_ITER", "1", "DATALOADER.NUM_WORKERS", "0", "SOLVER.PRECISION", "float32"),
    *("LOG.PICTURES", "1"),
]
# One recipe of each kind, and the rest.
FAST = {
    "voc_R50_C4_24k": "voc",
    "lvis_v1_R50_FPN": "lvis",
    "voc_semseg_R50_FCN": "voc_semseg",
}
SLOW = {
    "coco_R50_RetinaNet_1x": "coco",
    "coco_keypoints_R50_FPN": "coco",
    "coco_R50_C4": "coco",
    "coco_R50_C4_1x": "coco",
    "coco_R50_FPN_1x_moco": "coco",
    "coco_R50_FPN_2x_moco": "coco",
    "coco_R50_FPN_1x_pycontrast": "coco",
    "coco_R50_FPN_2x_pycontrast": "coco",
    "coco_R50_FPN_LSJ_100ep": "coco",
    "coco_R50_Cascade_FPN_1x_moco": "coco",
    "coco_R50_Cascade_FPN_3x_moco": "coco",
    "coco_R50_Cascade_FPN_3x_pycontrast": "coco",
    "cityscapes_R50_FPN": "cityscapes",
    "cityscapes_semseg_R50_FCN": "cityscapes",
    "cityscapes_semseg_R50_FPN": "cityscapes",
    "voc_semseg_R50_FPN": "voc_semseg",
}


@pytest.fixture
def data(scenes, dataset_root):
    """Writes the scenes in a format, where Detectron2 looks for datasets."""

    def write(kind):
        for package in NEEDED.get(kind, ()):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
        WRITERS[kind](scenes, dataset_root)

    return write


def tasks_of(name):
    if "semseg" in name:
        return {"sem_seg"}
    if name == "cityscapes_R50_FPN":
        return {"segm"}  # all that Cityscapes evaluates
    extra = {"coco_keypoints_R50_FPN": {"keypoints"}, "coco_R50_RetinaNet_1x": set(), "voc_R50_C4_24k": set()}
    return {"bbox"} | extra.get(name, {"segm"})


@pytest.mark.parametrize(
    ("name", "kind"),
    [*FAST.items(), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW.items())],
)
def test_two_iterations_and_the_evaluation_of_the_format(name, kind, data, dataset_root, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.SafeCheckpointer, "save", lambda *_, **__: None)  # longer than the rest
    data(kind)
    train_net.main(["--config", name, "--num-gpus", "0", "--output", str(tmp_path / "run"), *SMALL])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["iterations"] == 2
    assert results["results"].keys() == tasks_of(name)
    (last,) = [
        line
        for line in map(json.loads, (tmp_path / "run" / "metrics.json").read_text().splitlines())
        if "total_loss" in line
    ]
    assert math.isfinite(last["total_loss"])
    for one in ("image_root", "annotations"):
        assert str(dataset_root) in results["dataset"][one]


def test_every_recipe_is_run():
    there = {path.stem for path in config_folder("detection").glob("[!B]*.yaml")}
    assert there == {*FAST, *SLOW, "shapes_R18_FPN", "shapes_R50_C4"}  # these two have tests of their own


def test_the_table_in_the_docs_says_what_the_recipes_do():
    page = (Path(__file__).parents[2] / "docs" / "detection.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    said = {row[0].strip("`"): row[2:5] for row in rows if len(row) == 6}
    assert said.keys() == {path.stem for path in config_folder("detection").glob("[!B]*.yaml")}
    for name, numbers in said.items():
        solver = configs.load(name).SOLVER
        assert numbers == [f"{solver.MAX_ITER:,}", f"{solver.IMS_PER_BATCH}", f"{solver.BASE_LR:g}"], name


def differing(name, other):
    """Keys under which two recipes differ."""
    flat = []
    for one in (name, other):
        pairs = {}
        stack = [("", configs.load(one))]
        while stack:
            prefix, node = stack.pop()
            for key, value in node.items():
                if isinstance(value, dict):
                    stack.append((f"{prefix}{key}.", value))
                else:
                    pairs[prefix + key] = value
        flat.append(pairs)
    return {key for key in flat[0] if flat[0][key] != flat[1][key]}


def test_large_scale_jitter_is_detectron2s():
    """Number by number as in detectron2's configs/new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py."""
    config = configs.load("coco_R50_FPN_LSJ_100ep")
    solver, jitter = config.SOLVER, config.INPUT.LSJ
    assert (solver.MAX_ITER, solver.STEPS, solver.IMS_PER_BATCH) == (184375, (163889, 177546), 64)
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (0.1, 4e-5, 500, 0.067)
    assert (jitter.ENABLED, jitter.SIZE, jitter.MIN_SCALE, jitter.MAX_SCALE) == (True, 1024, 0.1, 2.0)
    assert (config.MODEL.RPN.CONV_DIMS, config.MODEL.ROI_BOX_HEAD.NUM_CONV) == ([-1, -1], 4)


SCHEDULE = {"SOLVER.STEPS", "SOLVER.MAX_ITER"}


def test_the_two_fpn_protocols_differ_in_the_heads_alone():
    assert differing("coco_R50_FPN_1x_moco", "coco_R50_FPN_1x_pycontrast") == {
        "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_BOX_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.NUM_FC",
        "MODEL.ROI_MASK_HEAD.NORM",
    }  # fmt: skip
    for family in ("moco", "pycontrast"):
        assert differing(f"coco_R50_FPN_1x_{family}", f"coco_R50_FPN_2x_{family}") == SCHEDULE


def test_moco_fpn_is_detectron2s_but_for_norms_freezing_and_torchvisions_habits():
    from detectron2 import model_zoo

    ours = configs.load("coco_R50_FPN_1x_moco")
    theirs = configs.default_config()
    theirs.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    for key in ("RPN", "ROI_HEADS", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "ANCHOR_GENERATOR"):
        assert ours.MODEL[key] == theirs.MODEL[key]
    assert ours.SOLVER == theirs.SOLVER
    assert ours.INPUT.MIN_SIZE_TRAIN == theirs.INPUT.MIN_SIZE_TRAIN
    assert ours.MODEL.FPN.IN_FEATURES == theirs.MODEL.FPN.IN_FEATURES
    assert (ours.MODEL.RESNETS.NORM, ours.MODEL.FPN.NORM, ours.MODEL.BACKBONE.FREEZE_AT) == ("SyncBN", "SyncBN", 0)


@pytest.mark.parametrize(
    ("name", "theirs", "parts"),
    [
        ("coco_R50_RetinaNet_1x", "COCO-Detection/retinanet_R_50_FPN_1x.yaml", ["RETINANET"]),
        ("coco_keypoints_R50_FPN", "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
         ["RPN", "ROI_HEADS", "ROI_BOX_HEAD", "ROI_KEYPOINT_HEAD"]),
        ("lvis_v1_R50_FPN", "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
         ["RPN", "ROI_HEADS", "ROI_BOX_HEAD", "ROI_MASK_HEAD"]),
        ("coco_R50_Cascade_FPN_1x_moco", "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
         ["RPN", "ROI_HEADS", "ROI_BOX_HEAD", "ROI_BOX_CASCADE_HEAD", "ROI_MASK_HEAD"]),
        ("coco_R50_Cascade_FPN_3x_moco", "Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml",
         ["RPN", "ROI_HEADS", "ROI_BOX_HEAD", "ROI_BOX_CASCADE_HEAD", "ROI_MASK_HEAD"]),
        ("cityscapes_R50_FPN", "Cityscapes/mask_rcnn_R_50_FPN.yaml",
         ["RPN", "ROI_HEADS", "ROI_BOX_HEAD", "ROI_MASK_HEAD"]),
    ],
)  # fmt: skip
def test_heads_data_and_schedule_are_detectron2s(name, theirs, parts):
    from detectron2 import model_zoo

    ours, other = configs.load(name), configs.default_config()
    # Base-RetinaNet computes its anchors by a tag that runs Python, which is why ours are written out.
    other.merge_from_file(model_zoo.get_config_file(theirs), allow_unsafe=True)
    for key in parts:
        assert ours.MODEL[key] == other.MODEL[key], key
    for one, two in zip(ours.MODEL.ANCHOR_GENERATOR.SIZES, other.MODEL.ANCHOR_GENERATOR.SIZES, strict=True):
        assert one == pytest.approx(two, rel=1e-6)
    assert ours.SOLVER == other.SOLVER
    assert ours.INPUT.MIN_SIZE_TRAIN == other.INPUT.MIN_SIZE_TRAIN
    assert ours.INPUT.MIN_SIZE_TEST == other.INPUT.MIN_SIZE_TEST
    assert ours.DATASETS == other.DATASETS
    assert ours.DATALOADER.SAMPLER_TRAIN == other.DATALOADER.SAMPLER_TRAIN
    assert ours.TEST.DETECTIONS_PER_IMAGE == other.TEST.DETECTIONS_PER_IMAGE


def test_voc_is_mocos_protocol():
    """Number by number as in facebookresearch/moco, detection/configs/pascal_voc_R_50_C4_24k(_moco).yaml."""
    config = configs.load("voc_R50_C4_24k")
    assert config.DATASETS.TRAIN == ("voc_2007_trainval", "voc_2012_trainval")
    assert config.DATASETS.TEST == ("voc_2007_test",)
    assert config.INPUT.MIN_SIZE_TRAIN == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert differing("voc_R50_C4_24k", "coco_R50_C4") == {
        "DATASETS.TRAIN", "DATASETS.TEST", "INPUT.MIN_SIZE_TRAIN", "MODEL.MASK_ON", "MODEL.ROI_HEADS.NUM_CLASSES",
        "SOLVER.WARMUP_ITERS", *SCHEDULE,
    }  # fmt: skip
    solver = config.SOLVER
    assert (solver.STEPS, solver.MAX_ITER, solver.WARMUP_ITERS) == ((18000, 22000), 24000, 100)
    assert (config.MODEL.MASK_ON, config.MODEL.ROI_HEADS.NUM_CLASSES) == (False, 20)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A ResNet-50 as the converter writes it, and its tensors."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_resnet_backbone

    pairs = ["MODEL.RESNETS.OUT_FEATURES", "['res5']"]
    config, _ = configs.for_one_process(configs.load("coco_R50_C4", pairs))
    state = build_resnet_backbone(config, ShapeSpec(channels=3)).state_dict()
    tensors = {key: value.numpy() for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(tensors) == 265
    path = tmp_path_factory.mktemp("weights") / "encoder.pkl"
    path.write_bytes(pickle.dumps({"model": tensors, "__author__": "x", "matching_heuristics": True}))
    return path, tensors


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("voc_R50_C4_24k", ("backbone.", "roi_heads.")),
        ("coco_R50_FPN_1x_pycontrast", ("backbone.bottom_up.",)),
        ("coco_R50_RetinaNet_1x", ("backbone.bottom_up.",)),
        ("voc_semseg_R50_FCN", ("backbone.",)),
        ("voc_semseg_R50_FPN", ("backbone.bottom_up.",)),
    ],
)
def test_converted_weights_fill_the_backbone_of_every_architecture(name, places, converted):
    path, tensors = converted
    config, _ = configs.for_one_process(configs.load(name, ["MODEL.DEVICE", "cpu"]))
    model = trainer.TransferTrainer.build_model(config)
    assert weights.load_backbone(model, path) == []
    state = model.state_dict()
    landed = {short: place + short for short in tensors for place in places if place + short in state}
    assert landed.keys() == tensors.keys()
    assert all(torch.equal(state[key], torch.from_numpy(tensors[short])) for short, key in landed.items())
