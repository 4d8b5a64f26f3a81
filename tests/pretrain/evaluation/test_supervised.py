"""Schedules, and heads side by side: against numbers worked out by hand and against each alone."""

import math
from pathlib import Path

import pytest
import torch

from foundation.errors import UserError
from foundation.signals import StopRequest
from pretrain.evaluation.supervised import (
    LinearHeads,
    SupervisedTrainer,
    check_finite,
    fit,
    head_losses,
    learning_rate_at,
)
from pretrain.training.schedule import StepRange


def test_the_articles_schedules() -> None:
    cosine = {"base": 0.2, "schedule": "cosine", "epochs": 100, "final": 0.01, "milestones": [], "gamma": 0.0}
    assert learning_rate_at(0, **cosine) == pytest.approx(0.2)
    assert learning_rate_at(50, **cosine) == pytest.approx((0.2 + 0.002) / 2)
    assert learning_rate_at(100, **cosine) == pytest.approx(0.002)
    step = {"base": 25.0, "schedule": "step", "epochs": 100, "final": 0.0, "milestones": [20, 40, 60, 80], "gamma": 0.1}
    assert [learning_rate_at(e, **step) for e in (0, 19, 20, 39, 40, 99)] == pytest.approx(
        [25, 25, 2.5, 2.5, 0.25, 0.0025]
    )
    encoder = {**step, "base": 0.005, "milestones": [5, 10, 15], "gamma": 0.2}
    assert [learning_rate_at(e, **encoder) for e in (4, 5, 10, 19)] == pytest.approx([0.005, 0.001, 0.0002, 0.00004])


def trainer_of(heads: LinearHeads, rates: list[float]) -> SupervisedTrainer:
    groups = [{"params": list(head.parameters())} for head in heads]
    schedules = [lambda epoch, rate=rate: rate / (1 + epoch) for rate in rates]
    return SupervisedTrainer(heads, torch.optim.SGD(groups, lr=0.0, momentum=0.9), schedules)


def test_heads_side_by_side_equal_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(4, 16, 6, generator=generator), torch.randint(0, 3, (4, 16), generator=generator)
    rates = [0.1, 1.0, 5.0]

    def trained(of: list[float]) -> LinearHeads:
        torch.manual_seed(1)
        heads = LinearHeads(len(of), 6, 3, "normal")
        trainer = trainer_of(heads, of)
        for epoch in range(4):
            trainer.step(epoch, features[epoch], labels[epoch])
        return heads

    together = trained(rates)
    for i, rate in enumerate(rates):
        (alone,) = trained([rate])
        assert torch.equal(together[i].weight, alone.weight)
        assert torch.equal(together[i].bias, alone.bias)


def test_a_head_that_diverges_leaves_the_others_alone() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(8, 4), torch.randint(0, 2, (8,))
    heads = LinearHeads(2, 4, 2, "normal")
    trainer = trainer_of(heads, [0.1, 0.1])
    with torch.no_grad():
        heads[1].weight.fill_(torch.nan)
    losses = trainer.step(0, features, labels)
    assert losses[0].isfinite()
    assert heads[0].weight.isfinite().all()
    assert torch.equal(check_finite(losses, 3)[:1], losses[:1])
    with pytest.raises(UserError, match="nan at step 3"):
        check_finite(losses[1:], 3)


def test_loss_of_equal_logits_is_the_log_of_the_classes() -> None:
    logits = torch.zeros(2, 5, 10)
    assert head_losses(logits, torch.arange(5)).tolist() == pytest.approx([math.log(10)] * 2)
    assert head_losses(logits[0], torch.arange(5)).tolist() == pytest.approx([math.log(10)])


def test_results_of_an_earlier_end_go_when_training_goes_on(tmp_path: Path) -> None:
    trainer = trainer_of(LinearHeads(1, 6, 3, "normal"), [0.1])
    found = []

    def measure() -> dict[str, float]:
        found.append((tmp_path / "results.json").exists())
        return {"top1": 50.0}

    def train(steps: StepRange) -> None:
        batches = iter([(torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64))] * (steps.last - steps.first))
        options = {"output": tmp_path, "log_period": 1, "names": ["loss"], "state": lambda: {}}
        fit(trainer, batches, steps, request=StopRequest(), measure=measure, **options)

    (tmp_path / "results.json").write_text("{}")
    train(StepRange(first=2, last=2, per_epoch=2, total=4))  # nothing is left to do
    train(StepRange(first=0, last=2, per_epoch=2, total=4))  # without a checkpoint, which would hold the weights
    train(StepRange(first=2, last=4, per_epoch=2, total=4))
    assert found == [True, True, False]
