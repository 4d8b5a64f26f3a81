import json

import pytest

pytest.importorskip("detectron2")

from detection import config as configs
from detection.training import trainer
from foundation.config import config_folder, load_config
from foundation.errors import UserError

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
        (["SOLVER.BASE_LR", "-1"], "SOLVER.BASE_LR must be above 0"),
        (["SOLVER.PRECISION", "float16"], "SOLVER.PRECISION must be one of"),
        (["SOLVER.AMP.ENABLED", "True"], "set SOLVER.PRECISION bfloat16 instead"),
        (["SOLVER.ACCUMULATION", "0"], "SOLVER.ACCUMULATION must be at least 1"),
        (["SOLVER.KEEP_CHECKPOINTS", "-1"], "SOLVER.KEEP_CHECKPOINTS must be at least 0"),
        (["SOLVER.FRACTION_EXPONENT", "-0.5"], "SOLVER.FRACTION_EXPONENT must be at least 0"),
        (["SEED", "-1"], "SEED must be at least 0"),
        (["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"], "a share of the images is DATASETS.FRACTION"),
        (["DATASETS.FRACTION", "1.5"], "DATASETS.FRACTION must be above 0"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN names no dataset"),
        (["DATASETS.TEST", "('a', 'b')"], "must name one dataset, not a, b"),
        (["MODEL.RESNETS.DEPTH", "49"], "must be 18, 34, 50, 101 or 152"),
    ],
)
def test_wrong_values_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        configs.load("coco_R50_C4", overrides)


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
