"""The training step: micro-batches with the exact loss, and batches that are skipped without a trace."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from foundation.errors import UserError
from pretrain.batches.draws import Param
from pretrain.batches.views import Batch
from pretrain.config import get_defaults
from pretrain.corinfomax import CorInfoMaxLoss
from pretrain.encoder import SiameseNetwork, build_encoder, build_projector
from pretrain.objectives import Objective
from pretrain.training.build import report_failed_compilation
from pretrain.training.cuda_graph import uses_graph
from pretrain.training.step import Trainer


def batch(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    params = torch.zeros(2, count, len(Param))
    params[..., Param.JITTER_ORDER] = -1
    return Batch(
        images=torch.randint(0, 256, (2, count, 3, 32, 32), dtype=torch.uint8, generator=generator),
        params=params,
        labels=torch.zeros(count, dtype=torch.long),
        indices=torch.arange(count),
        unreadable=[],
    )


def trainer(network: nn.Module, micro_batch: int, rate: float = 0.1, fused: bool = True) -> Trainer:
    return Trainer(
        network=network,
        criterion=CorInfoMaxLoss(dim=8, attraction=100.0, forgetting=0.1, eps=1e-8).to(
            next(network.parameters()).device
        ),
        optimizer=torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, fused=fused),
        learning_rate=lambda _: rate,
        mean=torch.full((3,), 0.5),
        std=torch.full((3,), 0.25),
        device=torch.device("cpu"),
        precision="float32",
        micro_batch=micro_batch,
    )


def network() -> SiameseNetwork:
    torch.manual_seed(0)
    return SiameseNetwork(build_encoder("resnet18", "cifar"), build_projector(512, [32, 8]))


def test_micro_batches_equal_the_whole_batch() -> None:
    # With BatchNorm replaced the two are the same function, so loss, covariance and weights must agree. In float64,
    # since the order of the sums differs.
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    start = SiameseNetwork(encoder.double(), nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8)).double())
    start.embed = partial(_embed_double, start)  # type: ignore[method-assign]
    results = []
    for micro_batch in (0, 5, 12):
        copied = copy.deepcopy(start)
        copied.embed = partial(_embed_double, copied)  # type: ignore[method-assign]
        t = trainer(copied, micro_batch)
        losses = [t.step(step, batch(12, seed=step)).total for step in range(3)]
        results.append([*losses, t.criterion.covariance, *copied.parameters()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def _embed_double(network: SiameseNetwork, images: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(network.projector(network.encoder(images.double())), dim=1)


def test_micro_batches_update_running_statistics_once() -> None:
    updated, expected = network(), network()
    trainer(updated, 3, rate=0.0).step(0, batch(6))
    t = trainer(expected, 0)
    views = [t._augment(batch(6), view) for view in range(2)]
    for part in range(2):
        expected(*(view[3 * part : 3 * part + 3] for view in views))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(updated.encoder.bn1, name), getattr(expected.encoder.bn1, name))


def state_of(t: Trainer) -> dict[str, torch.Tensor]:
    """Everything that a step changes."""
    momenta = {f"momentum {i}": s["momentum_buffer"] for i, s in enumerate(t.optimizer.state.values())}
    tensors = {**t.network.state_dict(), **t.criterion.state_dict(), **momenta}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def small() -> SiameseNetwork:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(7), nn.Flatten())
    return SiameseNetwork(encoder, build_projector(8, [16, 8]))


def poison_forward(t: Trainer) -> Callable[[], object]:
    mean = t.mean
    t.mean = mean * float("nan")  # the images are no numbers, so BatchNorm's statistics are none either
    return lambda: setattr(t, "mean", mean)


def poison_backward(t: Trainer) -> Callable[[], object]:
    return t.network.projector[0].weight.register_hook(lambda gradient: gradient * float("inf")).remove


@pytest.mark.parametrize("poison", [poison_forward, poison_backward])
@pytest.mark.parametrize("micro_batch", [0, 4])
# An unfused optimizer makes its momentum in the first step that it takes, so that there is none to compare before.
@pytest.mark.parametrize(("fused", "steps_before"), [(True, 0), (True, 2), (False, 2)])
def test_a_bad_batch_leaves_no_trace(poison: Callable, steps_before: int, micro_batch: int, fused: bool) -> None:
    t, unharmed = trainer(small(), micro_batch, fused=fused), trainer(small(), micro_batch, fused=fused)
    for step in range(steps_before):
        t.step(step, batch(8, seed=step))
        unharmed.step(step, batch(8, seed=step))
    before = state_of(t)
    undo = poison(t)
    terms = t.step(steps_before, batch(8, seed=7))
    assert t.flags.tolist() == [1, 0]
    assert terms.total.isfinite() == (poison is poison_backward)
    after = state_of(t)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # Afterwards training goes on as if the batch had not been.
    undo()
    t.step(9, batch(8, seed=9))
    unharmed.step(9, batch(8, seed=9))
    assert t.flags.tolist() == [0, 0]
    assert all(torch.equal(tensor, state_of(t)[name]) for name, tensor in state_of(unharmed).items())


class Alignment(Objective):
    def loss(self, z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
        return (z1 - z2).square().mean()


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_an_objective_is_measured_in_good_steps_on_request(micro_batch: int) -> None:
    t = trainer(small(), micro_batch)
    t.criterion = Alignment(dim=8, forgetting=0.1, eps=1e-8)
    t.__post_init__()
    initial = t.criterion.covariance.clone()
    assert t.step(0, batch(8)).big_bang.isnan()
    assert torch.equal(t.criterion.covariance, initial)
    undo = poison_forward(t)
    t.step(1, batch(8), measure=True)
    assert t.flags.tolist() == [1, 0]
    assert torch.equal(t.criterion.covariance, initial)
    undo()
    assert t.step(2, batch(8), measure=True).big_bang.isfinite()
    assert not torch.equal(t.criterion.covariance, initial)


def test_a_request_to_stop_is_a_vote() -> None:
    t = trainer(small(), 0)
    t.step(0, batch(4), stop=True)
    assert t.flags.tolist() == [0, 1]


def test_a_failed_compilation_is_one_line() -> None:
    from torch._inductor.exc import InductorError

    message = r"torch.compile failed \(OSError: a.so: file too short\); .* remove /\S+, or set TRAIN.COMPILE False"
    with pytest.raises(UserError, match=message), report_failed_compilation(True):
        raise InductorError(OSError("a.so: file too short\nmore"), None)


@pytest.mark.parametrize(
    ("choice", "device", "changes", "expected"),
    [
        ("auto", "cuda", {}, True),
        ("auto", "cuda", {"DATA.IMAGE_SIZE": 224}, False),  # computing takes longer than launching
        ("on", "cuda", {"DATA.IMAGE_SIZE": 224}, True),
        ("off", "cuda", {}, False),
        ("auto", "cpu", {}, False),
        ("auto", "cuda", {"TRAIN.MICRO_BATCH": 64}, False),
        ("auto", "cuda", {"TRAIN.MICRO_BATCH": 256}, True),  # one part
        ("auto", "cuda", {"TRAIN.COMPILE": True}, False),
        ("on", "cpu", {}, "TRAIN.CUDA_GRAPH on needs a GPU; set it to auto"),
        ("on", "cuda", {"TRAIN.COMPILE": True}, "TRAIN.CUDA_GRAPH on needs TRAIN.COMPILE False; set it to auto"),
    ],
)
def test_when_steps_are_a_cuda_graph(
    choice: str, device: str, changes: dict, expected: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = get_defaults()
    config.merge_from_list(["DATA.IMAGE_SIZE", 40, "TRAIN.CUDA_GRAPH", choice])
    config.merge_from_list([part for item in changes.items() for part in item])
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            uses_graph(config, torch.device(device), pairs=256)
    else:
        assert uses_graph(config, torch.device(device), pairs=256) is expected
