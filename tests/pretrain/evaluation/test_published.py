"""The published result of a recipe, logged beside the measured one."""

import logging

import pytest

from pretrain.evaluation.command import report_published


@pytest.mark.parametrize(
    ("init", "recipe", "kind", "expected"),
    [
        ("corinfomax", "cifar100_R18", "linear", "71.30: within the margin of 71.61 (CorInfoMax, thesis Table 5.1"),
        ("barlow_twins", "cifar100_R18", "linear", "71.30: within the margin of 70.90 (Barlow Twins, thesis Table 5.1"),
        ("vicreg", "imagenet1k_1percent", "finetune", "44.75 (VICReg, thesis Table 5.2"),
        ("vicreg", "imagenet1k_10percent_vicreg", "finetune", "62.16 (VICReg, thesis Table 5.2"),
        ("random", "cifar100_R18", "linear", ""),
        ("corinfomax", "shapes_R18", "linear", ""),
    ],
)
def test_the_published_result_is_logged(
    init: str, recipe: str, kind: str, expected: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pretrain"), "propagate", True)
    with caplog.at_level(logging.INFO, "pretrain"):
        report_published({"init": init, "linear_top1": 71.3, "top1": 71.3}, recipe, kind)
    assert expected in caplog.text
    assert bool(caplog.text) == bool(expected)
