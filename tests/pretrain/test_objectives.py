"""Other objectives through lightly: their values against the articles' formulas, and what is measured beside them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.errors import UserError
from pretrain import train
from pretrain.corinfomax import CorInfoMaxLoss
from pretrain.objectives import OBJECTIVES, Objective, build_criterion, needs_unit_length
from pretrain.runs import checkpoint
from tests.pretrain.tiny_encoder import use_tiny_encoder

STATE = {"dim": 6, "attraction": 3.0, "forgetting": 0.1, "eps": 1e-8}


def views() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(16, 6, generator=generator)
    return z1.requires_grad_(), z1.detach() + 0.3 * torch.randn(16, 6, generator=generator)


def simclr(z1: Tensor, z2: Tensor) -> Tensor:
    """Eq. (1) of SimCLR: cross-entropy of the partner among all others, cosine similarities over 0.5."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    similarity = (z @ z.T / 0.5).fill_diagonal_(float("-inf"))
    n = len(z1)
    return F.cross_entropy(similarity, torch.arange(2 * n).roll(n))


def barlow_twins(z1: Tensor, z2: Tensor) -> Tensor:
    """Eq. (1) of Barlow Twins: the cross-correlation should be the identity; weight 0.005 off the diagonal."""
    a, b = ((z - z.mean(0)) / z.std(0, correction=0) for z in (z1, z2))
    c = a.T @ b / len(a)
    off = c - torch.diag(c.diagonal())
    return (1 - c.diagonal()).square().sum() + 0.005 * off.square().sum()


def vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    """Eq. (6) of VICReg, with its 25, 25, 1. As its public code, the variance term is averaged over the two views."""
    variance, covariance = torch.zeros(()), torch.zeros(())
    for z in (z1, z2):
        variance = variance + F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        c = torch.cov(z.T)
        covariance = covariance + (c - torch.diag(c.diagonal())).square().sum() / z.shape[1]
    return 25 * F.mse_loss(z1, z2) + 25 * variance + covariance


def dcl(z1: Tensor, z2: Tensor) -> Tensor:
    """Eq. (6) of Decoupled Contrastive Learning: the pair itself is not among the negatives; temperature 0.1."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    others, total = ~torch.eye(len(z1), dtype=torch.bool), torch.zeros(())
    for a, b in ((z1, z2), (z2, z1)):
        negatives = [a[i] @ torch.cat([a[others[i]], b[others[i]]]).T / 0.1 for i in range(len(a))]
        total = total + (torch.stack([row.logsumexp(0) for row in negatives]) - (a * b).sum(1) / 0.1).mean()
    return total / 2


def frossl(z1: Tensor, z2: Tensor) -> Tensor:
    """FroSSL: log squared Frobenius norm of each covariance scaled to trace 1, and both views near their mean."""
    a, b = (F.normalize(z, dim=0) for z in (z1, z2))
    entropies = [((c := z.T @ z) / c.trace().detach()).square().sum().log() for z in (a, b)]
    return sum(entropies, torch.zeros(())) + 2 * 2 * a.shape[1] * F.mse_loss(a, (a + b) / 2)


@pytest.mark.parametrize("reference", [simclr, barlow_twins, vicreg, dcl, frossl], ids=lambda f: f.__name__)
def test_value_and_gradient_are_the_articles(reference: Callable[[Tensor, Tensor], Tensor]) -> None:
    pytest.importorskip("lightly")
    z1, z2 = views()
    terms = build_criterion(reference.__name__, **STATE)(z1, z2)
    expected = reference(z1, z2)
    assert terms.total.item() == pytest.approx(
        expected.item(), rel=1e-3
    )  # lightly adds 1e-5 to Barlow Twins' variances
    (found,), (wanted,) = torch.autograd.grad(terms.total, z1), torch.autograd.grad(expected, z1)
    assert torch.allclose(found.float(), wanted, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "corinfomax"])
def test_corinfomax_terms_are_measured_on_request_alone(name: str) -> None:
    pytest.importorskip("lightly")
    z1, z2 = views()
    criterion, own = build_criterion(name, **STATE), CorInfoMaxLoss(**STATE)
    assert isinstance(criterion, Objective)
    for _ in range(2):
        terms = criterion(z1, z2)
        assert terms.big_bang.isnan()
        assert terms.attraction.isnan()
    assert criterion.covariance.equal(own.covariance)  # as at the start: nothing was measured
    for _ in range(2):
        big_bang, attraction = criterion.measure(z1, z2)
        expected = own(F.normalize(z1.detach(), dim=1), F.normalize(z2, dim=1))
    assert (big_bang, attraction) == (expected.big_bang, expected.attraction)
    assert not big_bang.requires_grad
    assert criterion.state_dict().keys() == own.state_dict().keys()
    assert torch.equal(criterion.covariance, own.covariance)


def test_corinfomax_itself_is_not_wrapped() -> None:
    assert type(build_criterion("corinfomax", **STATE)) is CorInfoMaxLoss
    assert all(map(needs_unit_length, ("corinfomax", "simclr", "dcl")))
    assert not any(map(needs_unit_length, ("vicreg", "barlow_twins", "frossl")))


def test_an_objective_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch, photos: Path, tmp_path: Path) -> None:
    class Alignment(Objective):
        unit_length = False

        def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
            return (z1 - z2).square().mean()

    monkeypatch.setitem(OBJECTIVES, "alignment", Alignment)
    use_tiny_encoder(monkeypatch)
    train.main(["--output", str(tmp_path), *tiny(photos), "OBJECTIVE.NAME", "alignment", "LOG.PERIOD", "2"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 5]
    for line in lines:
        assert {"total", "big_bang", "attraction", "ldmi", "effective_rank"} <= line.keys()


def test_an_objective_of_one_process_refuses_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.distributed.group.world_size", lambda: 2)
    with pytest.raises(UserError, match="start one process"):
        build_criterion("frossl", **STATE)


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(UserError, match=r"pip install 'corinfomax\[baselines\]'"):
        build_criterion("simclr", **STATE)
    build_criterion("corinfomax", **STATE)


def tiny(photos: Path) -> list[str]:
    settings = ["DATA.NAME", "folder", "DATA.ROOT", str(photos), "DATA.IMAGE_SIZE", "32", "DATA.WORKERS", "0"]
    settings += ["PROJECTOR.DIMS", "[16, 8]", "TRAIN.BATCH_SIZE", "8", "TRAIN.EPOCHS", "2"]
    return [*settings, "TRAIN.PRECISION", "float32", "TRAIN.LR", "0.001", "TRAIN.WARMUP_LR", "0.0"]


@pytest.mark.parametrize("micro_batch", ["0", "3"])
def test_a_baseline_trains_and_resumes(
    photos: Path, tmp_path: Path, micro_batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lightly")
    use_tiny_encoder(monkeypatch)
    settings = [*tiny(photos), "OBJECTIVE.NAME", "vicreg", "TRAIN.MICRO_BATCH", micro_batch]
    train.main(["--output", str(tmp_path / "a"), *settings])
    train.main(["--output", str(tmp_path / "b"), *settings, "TRAIN.MAX_STEPS", "3"])
    train.main(["--output", str(tmp_path / "b"), *settings, "--resume", "TRAIN.MAX_STEPS", "0"])
    a, b = (checkpoint.load(tmp_path / run / "checkpoints" / "last.pt") for run in "ab")
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert all(torch.equal(a["objective"][name], b["objective"][name]) for name in ("mean", "covariance"))
