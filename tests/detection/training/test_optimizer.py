"""The groups of parameters and their rates."""

import pytest

pytest.importorskip("detectron2")

from detection import config as configs
from detection.training import optimizer
from detection.training.trainer import TransferTrainer

SPECIAL = ("SOLVER.BASE_LR", "0.1", "SOLVER.WEIGHT_DECAY_NORM", "0.0", "MODEL.DEVICE", "cpu")


def rates(name, *pairs):
    """(rate, weight decay) of each parameter by its name, and the optimizer."""
    config, _ = configs.for_one_process(configs.load(name, [*SPECIAL, *pairs]))
    model = TransferTrainer.build_model(config)
    built = optimizer.build(config, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[each]: (group["lr"], group["weight_decay"]) for group in built.param_groups for each in group["params"]
    }
    assert found.keys() == set(names.values())
    return found, built


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_the_rate_decays_from_the_heads_to_the_stem(kind):
    flat, _ = rates("shapes_R18_FPN", "SOLVER.OPTIMIZER", kind)
    found, built = rates("shapes_R18_FPN", "SOLVER.OPTIMIZER", kind, "SOLVER.LAYER_DECAY", "0.5")
    assert type(built).__name__ == kind
    assert {rate for rate, _ in flat.values()} == {0.1}
    expected = {"stem": 0.1 / 32, "res2": 0.1 / 16, "res3": 0.1 / 8, "res4": 0.1 / 4, "res5": 0.1 / 2}
    for name, (rate, decay) in found.items():
        stage = name.split(".")[2] if name.startswith("backbone.bottom_up.") else ""
        assert rate == pytest.approx(expected.get(stage, 0.1)), name
        assert decay == flat[name][1], name  # as without: none on norms
    assert built.param_groups[0]["lr"] == 0.1
    if kind == "SGD":
        assert {group["momentum"] for group in built.param_groups} == {0.9}


def test_the_c4_head_is_the_last_stage_of_the_resnet_and_its_extra_norm_is_not():
    found, _ = rates("voc_R50_C4_24k", "SOLVER.LAYER_DECAY", "0.5")
    assert found["roi_heads.res5.2.conv3.weight"][0] == pytest.approx(0.05)
    assert found["backbone.res4.0.conv1.weight"][0] == pytest.approx(0.025)
    assert found["roi_heads.res5.norm.weight"][0] == found["roi_heads.box_predictor.cls_score.weight"][0] == 0.1
