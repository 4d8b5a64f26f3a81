"""The training step: micro-batches with the exact loss, and the guard against a loss that is no number."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from pretrain.corinfomax import CorInfoMaxLoss
from pretrain.encoder import SiameseNetwork, build_encoder, build_projector
from pretrain.engine import NonFiniteLoss, Trainer
from pretrain.views import Batch, Param


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


def trainer(network: nn.Module, micro_batch: int, rate: float = 0.1) -> Trainer:
    return Trainer(
        network=network,
        criterion=CorInfoMaxLoss(dim=8, attraction=100.0, forgetting=0.1, eps=1e-8).to(
            next(network.parameters()).device
        ),
        optimizer=torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9),
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
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(updated.encoder.bn1, name), getattr(expected.encoder.bn1, name))


def test_loss_that_is_no_number_stops_before_the_weights_change() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    t = trainer(net, 0)
    with torch.no_grad():
        net.projector[-1].bias.fill_(float("nan"))
    before["projector.3.bias"] = net.projector[-1].bias.clone()
    with pytest.raises(NonFiniteLoss, match="step 4"):
        t.step(4, batch(6))
    parameters = dict(net.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in parameters.items() if not name.endswith("3.bias"))
