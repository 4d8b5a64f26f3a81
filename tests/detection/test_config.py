import importlib.util
import json
import re
import sys

import pytest

pytest.importorskip("detectron2")

from detection import config as configs
from detection import train_net
from detection.training import trainer
from foundation.config import config_folder, keys, load_config, value_of
from foundation.detectron2_compat import MissingOperators
from foundation.errors import UserError

# isort: split
from detectron2.config import get_cfg

RECIPES = sorted(path.stem for path in config_folder("detection").glob("[!B]*.yaml"))


def test_coco_c4_is_mocos_protocol():
    """Number by number as in facebookresearch/moco, detection/configs: Base-RCNN-C4-BN, coco_R_50_C4_2x(_moco)."""
    config = configs.load("coco_R50_C4")
    model, solver = config.MODEL, config.SOLVER
    assert model.META_ARCHITECTURE == "GeneralizedRCNN"
    assert model.BACKBONE.NAME == "build_resnet_backbone"
    assert model.BACKBONE.FREEZE_AT == 0
    assert model.RESNETS.DEPTH == 50
    assert model.RESNETS.NORM == "SyncBN"
    assert model.RESNETS.STRIDE_IN_1X1 is False
    assert model.RESNETS.OUT_FEATURES == ["res4"]
    assert (model.RPN.PRE_NMS_TOPK_TRAIN, model.RPN.POST_NMS_TOPK_TRAIN) == (12000, 2000)
    assert (model.RPN.PRE_NMS_TOPK_TEST, model.RPN.POST_NMS_TOPK_TEST) == (6000, 1000)
    assert model.RPN.BATCH_SIZE_PER_IMAGE == 256
    assert model.ROI_HEADS.NAME == "Res5ROIHeadsExtraNorm"
    assert model.ROI_HEADS.BATCH_SIZE_PER_IMAGE == 512
    assert model.ROI_HEADS.NUM_CLASSES == 80
    assert model.ROI_BOX_HEAD.POOLER_RESOLUTION == 14
    assert model.MASK_ON is True
    assert model.PIXEL_MEAN == [123.675, 116.280, 103.530]
    assert model.PIXEL_STD == [58.395, 57.120, 57.375]
    assert config.INPUT.FORMAT == "RGB"
    assert config.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)
    assert config.INPUT.MIN_SIZE_TEST == 800
    assert config.INPUT.MAX_SIZE_TRAIN == config.INPUT.MAX_SIZE_TEST == 1333
    assert config.DATASETS.TRAIN == ("coco_2017_train",)
    assert config.DATASETS.TEST == ("coco_2017_val",)
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MOMENTUM) == (16, 0.02, 0.9)
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.GAMMA) == (1e-4, 0.0, 0.1)
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (1000, 0.001)
    assert (solver.STEPS, solver.MAX_ITER) == ((120000, 160000), 180000)
    assert solver.PRECISION == "float32"
    assert config.TEST.PRECISE_BN.ENABLED is True
    assert config.TEST.PRECISE_BN.NUM_ITER == 200
    assert config.TEST.DETECTIONS_PER_IMAGE == 100


def test_the_1x_schedule_is_half_of_the_2x_and_nothing_else():
    once, twice = configs.load("coco_R50_C4_1x"), configs.load("coco_R50_C4")
    assert (once.SOLVER.STEPS, once.SOLVER.MAX_ITER) == ((60000, 80000), 90000)
    once.SOLVER.STEPS, once.SOLVER.MAX_ITER = twice.SOLVER.STEPS, twice.SOLVER.MAX_ITER
    assert once == twice


@pytest.mark.parametrize("name", ["shapes_R18_FPN", "shapes_R50_C4"])
def test_the_embedded_recipes_keep_what_converted_weights_need(name):
    ours, moco = configs.load(name), configs.load("coco_R50_C4")
    assert ours.MODEL.PIXEL_MEAN == moco.MODEL.PIXEL_MEAN
    assert ours.MODEL.PIXEL_STD == moco.MODEL.PIXEL_STD
    assert ours.INPUT.FORMAT == "RGB"
    assert ours.MODEL.RESNETS.STRIDE_IN_1X1 is False
    assert ours.MODEL.BACKBONE.FREEZE_AT == 0
    assert ours.MODEL.RESNETS.NORM == "SyncBN"
    from shapes import CLASSES

    assert len(CLASSES) == ours.MODEL.ROI_HEADS.NUM_CLASSES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_builds(name):
    config, changed = configs.for_one_process(configs.load(name))
    assert "MODEL.RESNETS.NORM" in changed
    config.MODEL.DEVICE = "cpu"
    model = trainer.TransferTrainer.build_model(config)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_every_file_is_a_config():
    for path in config_folder("detection").glob("*.yaml"):
        load_config(configs.default_config(), str(path), "detection")


def test_a_dumped_config_loads_again(tmp_path):
    config = configs.load("shapes_R18_FPN", ["SEED", "7"])
    (tmp_path / "config.yaml").write_text(config.dump())
    assert json.dumps(configs.load(str(tmp_path / "config.yaml"))) == json.dumps(config)


def test_one_process_has_no_synchronised_norm_and_the_original_stays():
    config = configs.load("shapes_R18_FPN")
    single, changed = configs.for_one_process(config)
    assert set(changed) == {"MODEL.RESNETS.NORM", "MODEL.FPN.NORM"}
    assert single.MODEL.RESNETS.NORM == single.MODEL.FPN.NORM == "BN"
    assert config.MODEL.RESNETS.NORM == "SyncBN"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.BASELR", "1"], "did you mean 'SOLVER.BASE_LR'"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER must be of type int"),
        (["SOLVER.MAX_ITER"], "has no value"),
        (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER must be at least 1, not 0"),
        (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH must be at least 1"),
        (["SOLVER.BASE_LR", "-1"], "SOLVER.BASE_LR must be finite and above 0"),
        (["SOLVER.BASE_LR", "inf"], "SOLVER.BASE_LR must be finite and above 0"),
        (["SOLVER.PRECISION", "float16"], "SOLVER.PRECISION is 'float16', which is not one of"),
        (["SOLVER.AMP.ENABLED", "True"], "set SOLVER.PRECISION bfloat16 instead"),
        (["SOLVER.LAYER_DECAY", "0"], "SOLVER.LAYER_DECAY must be above 0 and at most 1, not 0"),
        (["SOLVER.MOMENTUM", "-0.9"], "SOLVER.MOMENTUM must be at least 0"),
        (["SOLVER.NESTEROV", "True", "SOLVER.MOMENTUM", "0"], "SOLVER.NESTEROV True needs a SOLVER.MOMENTUM above 0"),
        (["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 38]]"], "TEST.EXPECTED_RESULTS must list task, metric, value and"),
        (["SOLVER.EMA", "1.0"], "SOLVER.EMA must be at least 0 and below 1"),
        (["SOLVER.OPTIMIZER", "Adam"], "SOLVER.OPTIMIZER is 'Adam', which is not one of SGD, AdamW"),
        (["SOLVER.ACCUMULATION", "0"], "SOLVER.ACCUMULATION must be at least 1"),
        (["SOLVER.KEEP_CHECKPOINTS", "-1"], "SOLVER.KEEP_CHECKPOINTS must be at least 0"),
        (["SOLVER.FRACTION_EXPONENT", "-0.5"], "SOLVER.FRACTION_EXPONENT must be at least 0"),
        (["SEED", "-1"], "SEED must be at least 0"),
        (["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"], "a fraction of the images is DATASETS.FRACTION"),
        (["DATASETS.FRACTION", "1.5"], "DATASETS.FRACTION must be above 0"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN names no dataset"),
        (["DATASETS.TEST", "('a', 'a')"], "names a dataset twice: a, a"),
        (["MODEL.RESNETS.DEPTH", "49"], "must be 18, 34, 50, 101 or 152"),
        (["MODEL.RESNETS.DEPTH", "18"], "does not go with Res5ROIHeadsExtraNorm, a C4 head"),
        (["MODEL.RESNETS.NORM", "batch"], "MODEL.RESNETS.NORM must be one of BN, .* not 'batch'"),
        (["MODEL.RPN.BBOX_REG_LOSS_TYPE", "X"], "MODEL.RPN.BBOX_REG_LOSS_TYPE is 'X', .* smooth_l1"),
        (["MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]"], "MODEL.PIXEL_STD must be above 0"),
        (["MODEL.FPN.NORM", "X"], "MODEL.FPN.NORM must be one of"),
        (["SOLVER.LR_SCHEDULER_NAME", "Cosine"], "SOLVER.LR_SCHEDULER_NAME is 'Cosine', .* WarmupCosineLR"),
        (["SOLVER.STEPS", "(2, 1)"], r"SOLVER.STEPS must be iterations in ascending order, not \(2, 1\)"),
        (["INPUT.RANDOM_FLIP", "diagonal"], "INPUT.RANDOM_FLIP is 'diagonal'"),
        (["INPUT.CROP.TYPE", "some"], "INPUT.CROP.TYPE is 'some'"),
        (["INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[300.0, 300.0]"], "must be fractions of the image"),
        (["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute"], r"\[0\.9, 0\.9\] must be whole pixels"),
        (
            ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute_range", "INPUT.CROP.SIZE", "[300, 200]"],
            "must be the least and the largest side",
        ),
        (["INPUT.LSJ.MIN_SCALE", "3.0"], "INPUT.LSJ.MIN_SCALE above 0 and at most MAX_SCALE"),
        (["INPUT.LSJ.ENABLED", "True", "INPUT.CROP.ENABLED", "True"], "INPUT.LSJ.ENABLED does not go with"),
        (["INPUT.MIN_SIZE_TRAIN", "()"], "INPUT.MIN_SIZE_TRAIN must list sizes"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "needs two sizes in INPUT.MIN_SIZE_TRAIN"),
        (["TEST.AUG.ENABLED", "True", "MODEL.KEYPOINT_ON", "True"], "R-CNNs without keypoints only"),
    ],
)
def test_wrong_values_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        configs.load("coco_R50_C4", overrides)


@pytest.mark.parametrize(
    ("module", "overrides", "message"),
    [
        ("shapely", ["INPUT.CROP.ENABLED", "True"], "INPUT.CROP.ENABLED and INPUT.LSJ.ENABLED need shapely"),
        ("cv2", ["VIS_PERIOD", "1"], "VIS_PERIOD needs OpenCV"),
    ],
)
def test_a_key_that_needs_a_package_names_it(module, overrides, message, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(UserError, match=message):
        configs.load("coco_R50_C4", overrides)


@pytest.mark.parametrize("key", ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "MODEL.PROPOSAL_GENERATOR.NAME"])
def test_what_needs_compiled_operators_is_refused_without_them(key, monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2._C", MissingOperators())
    value = "RRPN" if key.endswith("NAME") else "[False, True, True, True]"
    with pytest.raises(UserError, match=r"need Detectron2's C\+\+ operators"):
        configs.load("coco_R50_C4", [key, value])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.ROI_HEADS.NAME", "StandartROIHeads", "MODEL.ROI_HEADS.NAME is 'StandartROIHeads', .*StandardROIHeads"),
        ("MODEL.ROI_MASK_HEAD.NAME", "X", "MODEL.ROI_MASK_HEAD.NAME is 'X', .*MaskRCNNConvUpsampleHead"),
        ("MODEL.BACKBONE.NAME", "X", "MODEL.BACKBONE.NAME is 'X', .*build_resnet_fpn_backbone"),
        ("MODEL.RPN.IN_FEATURES", "['p9']", "the model of this config cannot be built"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16], [32]]", "the model of this config cannot be built"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_before_the_run_folder_exists(
    key, value, message, tiny_overrides, tmp_path
):
    fixed = ["--config", "shapes_R18_FPN", "--num-gpus", "0", "--output", str(tmp_path / "run")]
    with pytest.raises(UserError, match=message):
        train_net.main([*fixed, *tiny_overrides, key, value])
    assert not (tmp_path / "run").exists()


def test_the_width_follows_from_the_depth():
    pairs = ["MODEL.RESNETS.DEPTH", "18"]
    config, _ = configs.for_one_process(configs.load("coco_R50_FPN_1x_moco", [*pairs, "MODEL.DEVICE", "cpu"]))
    assert config.MODEL.RESNETS.RES2_OUT_CHANNELS == 64
    assert trainer.TransferTrainer.build_model(config).backbone.bottom_up.res5[0].conv1.out_channels == 512
    assert configs.load("shapes_R18_FPN", ["MODEL.RESNETS.DEPTH", "50"]).MODEL.RESNETS.RES2_OUT_CHANNELS == 256


# Who reads each key: the function of Detectron2's that this project calls, or a module of this project.
READ_BY_DETECTRON2 = {
    "MODEL": "build_model: the keys of the architectures and heads that a config names",
    "INPUT": "build_augmentation and DatasetMapper",
    "SOLVER": "build_optimizer and build_lr_scheduler",
}
READ_HERE = {
    *("MODEL.DEVICE", "MODEL.WEIGHTS"),
    *("DATASETS.TRAIN", "DATASETS.TEST"),
    *("DATALOADER.NUM_WORKERS", "DATALOADER.ASPECT_RATIO_GROUPING", "DATALOADER.SAMPLER_TRAIN"),
    *("DATALOADER.REPEAT_THRESHOLD", "DATALOADER.REPEAT_SQRT", "DATALOADER.FILTER_EMPTY_ANNOTATIONS"),
    *("TEST.EXPECTED_RESULTS", "TEST.EVAL_PERIOD", "TEST.KEYPOINT_OKS_SIGMAS", "TEST.DETECTIONS_PER_IMAGE"),
    *("TEST.AUG.ENABLED", "TEST.AUG.MIN_SIZES", "TEST.AUG.MAX_SIZE", "TEST.AUG.FLIP"),
    *("TEST.PRECISE_BN.ENABLED", "TEST.PRECISE_BN.NUM_ITER"),
    *("OUTPUT_DIR", "SEED", "CUDNN_BENCHMARK", "VIS_PERIOD", "FLOAT32_PRECISION"),
}


def test_no_key_of_detectron2_is_silently_without_effect():
    """Each is read, or refused with another value than the default. A key that a newer Detectron2 adds is seen here."""
    for key in keys(get_cfg()):
        if key in configs.REFUSED:
            default = value_of(configs.default_config(), key)
            other = "('x',)" if isinstance(default, tuple) else str(not default if isinstance(default, bool) else 7)
            with pytest.raises(UserError, match=f"{key}.* has no effect here"):
                configs.load("coco_R50_C4", [key, other])
        else:
            assert key.partition(".")[0] in READ_BY_DETECTRON2 or key in READ_HERE, key


def test_evaluation_reads_its_keys(monkeypatch):
    """Keys that no result of a tiny run shows."""
    config = configs.load("coco_keypoints_R50_FPN", ["TEST.DETECTIONS_PER_IMAGE", "7", "MODEL.DEVICE", "cpu"])
    config, _ = configs.for_one_process(config)
    model = trainer.TransferTrainer.build_model(config)
    assert model.roi_heads.box_predictor.test_topk_per_image == 7


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="coco_R50_C4"):
        configs.load("coco_R50_C5")


def test_precision_follows_the_device(monkeypatch):
    import torch

    config = configs.load("coco_R50_C4", ["MODEL.DEVICE", "cpu"])
    answers = {"bfloat16": True, "float32": False}
    for config.SOLVER.PRECISION, expected in answers.items():
        assert configs.computes_in_bfloat16(config) is expected
    config.SOLVER.PRECISION = "auto"
    for has_units in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=has_units: found, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        assert configs.computes_in_bfloat16(config) is has_units


@pytest.mark.parametrize(
    ("pairs", "warning"),
    [
        (["INPUT.LSJ.SIZE", "512"], "INPUT.LSJ.SIZE has no effect while INPUT.LSJ.ENABLED is False"),
        (["TEST.AUG.FLIP", "False"], "TEST.AUG.FLIP has no effect while TEST.AUG.ENABLED is False"),
        (["SOLVER.OPTIMIZER", "AdamW", "SOLVER.MOMENTUM", "0.8"], "SOLVER.MOMENTUM .* SOLVER.OPTIMIZER is 'AdamW'"),
        (["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.STEPS", "(5,)"], "STEPS .* is 'WarmupCosineLR'"),
        (["SOLVER.FRACTION_EXPONENT", "1"], "SOLVER.FRACTION_EXPONENT has .* while DATASETS.FRACTION is 1.0"),
        (["DATALOADER.REPEAT_THRESHOLD", "0.1"], "REPEAT_THRESHOLD .* DATALOADER.SAMPLER_TRAIN is 'TrainingSampler'"),
        (["TEST.BEST_METRIC", "segm/AP"], "TEST.BEST_METRIC has no effect while TEST.EVAL_PERIOD is 0"),
        (["INPUT.LSJ.ENABLED", "True", "INPUT.MAX_SIZE_TRAIN", "99"], "MAX_SIZE_TRAIN .* INPUT.LSJ.ENABLED is True"),
    ],
)
def test_keys_that_others_deprive_of_their_effect_are_named(pairs, warning):
    config = configs.load("coco_R50_C4", pairs)
    (line,) = configs.without_effect(config, pairs[::2])
    assert re.search(warning, line)


def test_keys_with_an_effect_are_not_named():
    pairs = [
        "DATASETS.FRACTION",
        "0.1",
        "SOLVER.FRACTION_EXPONENT",
        "1",
        "SOLVER.STEPS",
        "(5,)",
        "TEST.EVAL_PERIOD",
        "2",
    ]
    pairs += ["TEST.BEST_METRIC", "segm/AP", "INPUT.LSJ.ENABLED", "False", "SOLVER.MOMENTUM", "0.8", "VERSION", "2"]
    assert list(configs.without_effect(configs.load("coco_R50_C4", pairs), pairs[::2])) == []
