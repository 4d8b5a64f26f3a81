"""Learning rates at the steps that matter, computed by hand."""

import pytest

from foundation.config import load_config
from pretrain.config import get_defaults
from pretrain.training.schedule import multi_step, warmup_cosine


def test_warmup_and_cosine_by_hand() -> None:
    rate = lambda step: warmup_cosine(step, total_steps=11, warmup_steps=2, peak=1.0, warmup_start=0.2, final=0.0)  # noqa: E731
    # Warm-up 0.2, 0.6; from step 2 a half cosine over the 8 steps to step 10.
    expected = {0: 0.2, 1: 0.6, 2: 1.0, 4: 0.8535533906, 6: 0.5, 8: 0.1464466094, 10: 0.0}
    for step, value in expected.items():
        assert rate(step) == pytest.approx(value, abs=1e-9)


# (peak, final, epochs) of thesis B.2; the warm-up takes 10 epochs from 0.003. Half way between the end of the warm-up
# and the last step the cosine is at (peak + final) / 2.
RECIPES = {
    "cifar10_R18": (0.5, 1e-6, 1000),
    "cifar100_R18": (0.5, 1e-6, 1000),
    "tiny_imagenet_R50": (0.5, 1e-6, 800),
    "imagenet100_R18": (1.0, 5e-3, 400),
    "imagenet100_R50": (1.0, 5e-3, 200),
    "imagenet1k_R50": (0.2, 1e-6, 100),
}


@pytest.mark.parametrize("name", RECIPES)
def test_schedules_of_the_recipes(name: str) -> None:
    peak, final, epochs = RECIPES[name]
    train = load_config(get_defaults(), name, "pretrain").TRAIN
    per_epoch = 10
    total = train.EPOCHS * per_epoch

    def rate(step: int) -> float:
        return warmup_cosine(
            step,
            total_steps=total,
            warmup_steps=train.WARMUP_EPOCHS * per_epoch,
            peak=train.LR,
            warmup_start=train.WARMUP_LR,
            final=train.MIN_LR,
        )

    assert epochs == train.EPOCHS
    assert rate(0) == 0.003
    assert rate(99) == pytest.approx(0.003 + (peak - 0.003) * 0.99)
    assert rate(100) == peak
    middle = (100 + total - 1) / 2
    assert rate(int(middle)) == pytest.approx((peak + final) / 2, rel=0.02)
    assert rate(total - 1) == pytest.approx(final)


def test_multi_step() -> None:
    rates = [multi_step(epoch, base=25.0, milestones=[20, 40, 60, 80], gamma=0.1) for epoch in (0, 19, 20, 59, 99)]
    assert rates == pytest.approx([25, 25, 2.5, 0.25, 0.0025])
