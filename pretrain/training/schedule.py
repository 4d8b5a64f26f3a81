"""The steps of a run, and learning rates as functions of the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fvcore.common.config import CfgNode

from pretrain.batches.sampler import batches_per_epoch


@dataclass(frozen=True)
class StepRange:
    """The steps that a process takes, counted over all epochs from 0."""

    first: int
    last: int  # one past the last
    per_epoch: int
    total: int  # of the whole schedule, which `TRAIN.MAX_STEPS` does not shorten

    @classmethod
    def of(cls, config: CfgNode, images: int, first: int) -> "StepRange":
        """From step `first` on, for a dataset of `images`. Pretraining leaves out the incomplete last batch."""
        drop_last = config.TRAIN.get("DROP_LAST", True)
        per_epoch = batches_per_epoch(images, config.TRAIN.BATCH_SIZE, drop_last)
        total = per_epoch * config.TRAIN.EPOCHS
        return cls(first, min(total, config.TRAIN.MAX_STEPS or total), per_epoch, total)


def warmup_cosine(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    peak: float,
    warmup_start: float = 0.0,
    final: float = 0.0,
) -> float:
    """Linear warm-up, then cosine decay (thesis B.2).

    `warmup_start` at step 0, `peak` at step `warmup_steps`, `final` at the last step, `total_steps - 1`.
    """
    if step < warmup_steps:
        return warmup_start + (peak - warmup_start) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def multi_step(epoch: int, *, base: float, milestones: Sequence[int], gamma: float) -> float:
    """`base`, multiplied by `gamma` at each milestone that has been reached (epochs, counted from 0)."""
    return base * gamma ** sum(epoch >= milestone for milestone in milestones)
