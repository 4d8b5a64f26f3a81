"""LARS against numbers worked out by hand, and in pretraining."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain import train
from pretrain.config import get_defaults
from pretrain.training.build import build_optimizer, build_schedule
from pretrain.training.lars import LARS
from tests.pretrain.tiny_encoder import use_tiny_encoder


def test_lars_by_hand() -> None:
    # |w| = 5, |g| = 2: the gradient becomes 0.001 x 5 / 2 of itself, and with decay 0.1 it is
    # (g + 0.1 w) x 0.001 x 5 / (2 + 0.1 x 5).
    for decay, expected in ((0.0, [0.0, 0.005]), (0.1, [0.3 * 0.002, 2.4 * 0.002])):
        weights = nn.Parameter(torch.tensor([3.0, 4.0]))
        weights.grad = torch.tensor([0.0, 2.0])
        optimizer = LARS([weights], lr=10.0, momentum=0.9, weight_decay=decay)
        optimizer.step()
        moved = (torch.tensor([3.0, 4.0]) - weights.detach()) / 10
        assert moved.tolist() == pytest.approx(expected, rel=1e-4)
        assert optimizer.param_groups[0]["weight_decay"] == decay


def test_lars_leaves_zeros_to_sgd() -> None:
    bias = nn.Parameter(torch.zeros(2))
    bias.grad = torch.tensor([1.0, -1.0])
    LARS([bias], lr=0.5).step()
    assert bias.tolist() == [-0.5, 0.5]


def test_groups_that_are_not_adapted_take_a_share_of_the_rate() -> None:
    adapted, plain = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([1.0, 2.0]))
    adapted.grad, plain.grad = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -3.0])
    groups = [{"params": [adapted]}, {"params": [plain], "adapt": False, "weight_decay": 0.5}]
    LARS(groups, lr=10.0, plain_lr=0.01).step()
    assert adapted.tolist() == pytest.approx([3.0, 4.0 - 10 * 0.005])
    assert plain.tolist() == pytest.approx([1.0 - 0.1 * (1.0 + 0.5), 2.0 - 0.1 * (-3.0 + 1.0)])


def test_length_with_decay_by_hand() -> None:
    """Barlow Twins' and VICReg's code: |g + 0.1 w| = |(0.3, 2.4)|, not |g| + 0.1 |w| = 2.5."""
    weights = nn.Parameter(torch.tensor([3.0, 4.0]))
    weights.grad = torch.tensor([0.0, 2.0])
    LARS([weights], lr=10.0, weight_decay=0.1, decayed_length=True).step()
    factor = 0.001 * 5 / (0.3**2 + 2.4**2) ** 0.5
    assert weights.tolist() == pytest.approx([3.0 - 10 * 0.3 * factor, 4.0 - 10 * 2.4 * factor], rel=1e-6)


@pytest.mark.parametrize(("optimizer", "plain_lr"), [("lars", 0.0048 / 0.2), ("lars_vicreg", 1.0)])
def test_pretraining_adapts_weights_and_neither_biases_nor_norms(optimizer: str, plain_lr: float) -> None:
    config = get_defaults()
    config.TRAIN.OPTIMIZER, config.TRAIN.LR, config.TRAIN.WEIGHT_DECAY = optimizer, 2.0, 0.1
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    build_optimizer(config, network).step()
    moved = {name: before[name] - parameter.detach() for name, parameter in network.named_parameters()}
    # A weight moves by lr x trust x its length, along gradient and decay; the others by their gradient alone.
    direction = gradients["0.weight"] + 0.1 * before["0.weight"]
    expected = 2.0 * 0.001 * before["0.weight"].norm() * direction / direction.norm()
    torch.testing.assert_close(moved["0.weight"], expected, rtol=1e-3, atol=1e-6)
    for name in ("1.weight", "1.bias"):
        torch.testing.assert_close(moved[name], 2.0 * plain_lr * gradients[name], rtol=1e-4, atol=1e-5)


def test_a_learning_rate_that_scales_with_the_batch() -> None:
    config = get_defaults()
    config.TRAIN.BATCH_SIZE, config.TRAIN.LR_PER_256, config.TRAIN.WARMUP_EPOCHS = 2048, 0.3, 10
    assert build_schedule(config, 1000, 10)(100) == pytest.approx(2.4)
    config.TRAIN.LR_PER_256 = 0.0
    assert build_schedule(config, 1000, 10)(100) == config.TRAIN.LR


def test_resumed_with_lars_is_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_encoder(monkeypatch)
    options = ["TRAIN.OPTIMIZER", "lars", "TRAIN.LR", "1.0", "TRAIN.BATCH_SIZE", "16", "DATA.IMAGE_SIZE", "32"]
    options += [
        "PROJECTOR.DIMS",
        "[16, 8]",
        "DATA.WORKERS",
        "0",
        "OBJECTIVE.FORGETTING",
        "0.1",
        "CHECKPOINT.STEPS",
        "1",
    ]
    command = ["--config", "shapes_R18", "--resume", "--output"]
    train.main([*command, str(tmp_path / "whole"), *options, "TRAIN.MAX_STEPS", "2"])
    train.main([*command, str(tmp_path / "parts"), *options, "TRAIN.MAX_STEPS", "1"])
    train.main([*command, str(tmp_path / "parts"), *options, "TRAIN.MAX_STEPS", "2"])
    whole, parts = (torch.load(tmp_path / run / "checkpoints/last.pt") for run in ("whole", "parts"))
    assert whole["model"].keys() == parts["model"].keys()
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, parts["model"][name]), name
