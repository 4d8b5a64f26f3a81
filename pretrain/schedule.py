"""Learning rates as pure functions of the step."""

import math
from collections.abc import Sequence


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
