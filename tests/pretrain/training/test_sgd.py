"""The fused update on a CPU against PyTorch's update of each tensor."""

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pretrain.training.sgd import SGD

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(16, 5))
    return layers.to(memory_format=torch.channels_last)


def set_gradients(layers: nn.Module, seed: int, memory_format: torch.memory_format | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weights in layers.parameters():
        gradient = torch.randn(weights.shape, generator=generator)
        weights.grad = torch.empty_like(weights).copy_(gradient)
        if (
            memory_format and weights.dim() == 4
        ):  # assigned as data, because a gradient takes the strides of its weights
            weights.grad.data = gradient.contiguous(memory_format=memory_format)


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for mine, reference in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [OPTIONS, {**OPTIONS, "nesterov": True}, {"lr": 0.1}])
@pytest.mark.parametrize("memory_format", [None, torch.contiguous_format])
def test_equal_to_the_update_of_each_tensor(options: dict, memory_format: torch.memory_format | None) -> None:
    mine, reference = network(), network()
    steps = SGD(mine.parameters(), fused=True, **options), torch.optim.SGD(reference.parameters(), **options)
    for seed in range(3):
        set_gradients(mine, seed, memory_format)
        set_gradients(reference, seed)
        for optimizer in steps:
            optimizer.step()
        assert_equal(mine, reference)


def test_momentum_that_was_saved_with_other_strides_is_continued() -> None:
    mine, reference = network(), network()
    optimizers = SGD(mine.parameters(), fused=True, **OPTIONS), torch.optim.SGD(reference.parameters(), **OPTIONS)
    for layers, optimizer in zip((mine, reference), optimizers, strict=True):
        set_gradients(layers, 0)
        optimizer.step()
    saved = copy.deepcopy(optimizers[0].state_dict())
    for state in saved["state"].values():
        state["momentum_buffer"] = state["momentum_buffer"].contiguous()
    resumed = SGD(mine.parameters(), fused=True, **OPTIONS)
    resumed.load_state_dict(saved)
    for layers, optimizer in zip((mine, reference), (resumed, optimizers[1]), strict=True):
        set_gradients(layers, 1)
        optimizer.step()
    assert_equal(mine, reference)


def test_a_skipped_step_and_weights_without_a_gradient_change_nothing() -> None:
    mine = network()
    before = copy.deepcopy(mine)
    optimizer = SGD(mine.parameters(), fused=True, **OPTIONS)
    optimizer.step()
    set_gradients(mine, 0)
    optimizer.found_inf = torch.ones(1)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(mine.parameters(), before.parameters(), strict=True))
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())


def test_gradients_are_not_copied() -> None:
    mine = network()
    optimizer = SGD(mine.parameters(), fused=True, **OPTIONS)
    set_gradients(mine, 0)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        optimizer.step()
    assert {"aten::copy_", "aten::clone"}.isdisjoint(event.name for event in recorded.events())
