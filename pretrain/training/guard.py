"""The check for non-finite losses and gradients: a bad batch leaves weights and statistics as they were.

The check and its consequences are computed on the device, so no step waits for it. The host learns the result
`PendingChecks.lag` steps later.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from foundation.errors import UserError
from pretrain.distributed import group as distributed


class NonFiniteLoss(UserError):
    """Too many batches gave a loss or a gradient that is not finite."""


class Statistics:
    """The buffers of some modules (BatchNorm's statistics, the running covariance), which a bad step must not change.

    They are gathered in one tensor for each dtype, because a network has hundreds of small ones.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        groups: dict[torch.dtype, list[Tensor]] = {}
        for module in modules:
            for buffer in module.buffers():
                groups.setdefault(buffer.dtype, []).append(buffer)
        self._groups = [_Group(buffers) for buffers in groups.values()]

    def copy(self) -> list[Tensor]:
        """A copy, one flat tensor for each dtype."""
        return [group.copy() for group in self._groups]

    def restore(self, before: Sequence[Tensor], bad: Tensor) -> None:
        """Restore an earlier `copy` where `bad`, a scalar on the device, is not 0."""
        for group, earlier in zip(self._groups, before, strict=True):
            group.restore(earlier, bad)


class _Group:
    """Buffers of one dtype. The views that they are gathered and restored by are made once, not in each step."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self._buffers = buffers
        self._flat = [buffer.view(-1) for buffer in buffers]
        self._chosen = torch.cat(self._flat)
        parts = self._chosen.split([buffer.numel() for buffer in buffers])
        self._parts = [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)]

    def copy(self) -> Tensor:
        return torch.cat(self._flat)

    def restore(self, earlier: Tensor, bad: Tensor) -> None:
        torch.where(bad > 0, earlier, self.copy(), out=self._chosen)
        torch._foreach_copy_(self._buffers, self._parts)


def check_step(loss: Tensor, gradients: Iterable[Tensor | None], stop: bool) -> Tensor:
    """The flags of a step, (2,) float32 on the device and the same on every process.

    The first is 1 if the loss or a gradient of any process is not finite, the second if any process wants to stop. A
    gradient whose squares overflow float32 (values near 1e19) counts as not finite.
    """
    present = [gradient for gradient in gradients if gradient is not None]
    norm = nn.utils.get_total_norm(present) if present else loss.new_zeros(())
    bad = ~(loss.isfinite() & norm.isfinite())
    flags = torch.stack([bad.float(), torch.full_like(bad, stop, dtype=torch.float32)])
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return flags


class StepCheck(NamedTuple):
    """The flags of a step, on the host."""

    step: int
    skipped: bool
    stop: bool


class PendingChecks:
    """The flags of past steps, read from the device without waiting for the step that is running.

    Args:
        device: where the flags are. On a GPU they are read `lag` steps later, when their copy has long arrived. All
            processes read the flags of the same step at the same step, so all of them stop together.
    """

    def __init__(self, device: torch.device) -> None:
        self.lag = 2 if device.type == "cuda" else 0
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, flags: Tensor) -> None:
        """Add the flags (2,) of a step, and start their copy to the host."""
        if flags.device.type != "cuda":
            self._waiting.append((step, flags, None))
            return
        on_host = torch.empty(2, pin_memory=True)
        on_host.copy_(flags, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._waiting.append((step, on_host, arrived))

    def read(self, everything: bool = False) -> Iterator[StepCheck]:
        """The checks that are `lag` steps old, each once; or all of them, which waits for the device."""
        while len(self._waiting) > (0 if everything else self.lag):
            step, flags, arrived = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            bad, stop = flags.tolist()
            yield StepCheck(step, bool(bad), bool(stop))
