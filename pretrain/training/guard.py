"""Steps that did not happen: a batch whose loss or gradient is no number leaves weights and statistics as they were.

Everything is decided on the device, so that no step waits for it. The host learns of it `Votes.lag` steps later.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from foundation.errors import UserError
from pretrain.distributed import group as distributed


class NonFiniteLoss(UserError):
    """Too many batches gave a loss or a gradient that is no number."""


class Statistics:
    """The buffers of some modules (BatchNorm's statistics, the running covariance), to be given back after a bad step.

    They are gathered in one tensor for each type: a network has hundreds of small ones.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._groups: dict[torch.dtype, list[Tensor]] = {}
        for module in modules:
            for buffer in module.buffers():
                self._groups.setdefault(buffer.dtype, []).append(buffer)

    def copy(self) -> list[Tensor]:
        """A copy, one flat tensor for each type."""
        return [torch.cat([buffer.reshape(-1) for buffer in group]) for group in self._groups.values()]

    def put_back(self, before: Sequence[Tensor], bad: Tensor) -> None:
        """Restore an earlier `copy` where `bad`, a scalar on the device, is not 0."""
        for group, now, earlier in zip(self._groups.values(), self.copy(), before, strict=True):
            chosen = torch.where(bad > 0, earlier, now).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in zip(chosen, group, strict=True)])


def vote(loss: Tensor, gradients: Iterable[Tensor | None], stop: bool) -> Tensor:
    """Two numbers on the device, the same on every process: is a loss or gradient not finite, does one want to stop.

    A gradient whose squares overflow float32 (values near 1e19) counts as not finite.
    """
    present = [gradient for gradient in gradients if gradient is not None]
    norm = nn.utils.get_total_norm(present) if present else loss.new_zeros(())
    bad = ~(loss.isfinite() & norm.isfinite())
    votes = torch.stack([bad.float(), torch.full_like(bad, stop, dtype=torch.float32)])
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    return votes


class Verdict(NamedTuple):
    """What the processes agreed on in a step."""

    step: int
    skipped: bool
    stop: bool


class Votes:
    """The verdicts of past steps, read from the device without waiting for the step under way.

    Args:
        device: where the votes are. On a GPU a verdict is read `lag` steps later, when it has long been there; every
            process reads the same steps at the same step, so all of them stop together.
    """

    def __init__(self, device: torch.device) -> None:
        self.lag = 2 if device.type == "cuda" else 0
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, votes: Tensor) -> None:
        """Take the votes of a step; their way to the host begins."""
        if votes.device.type != "cuda":
            self._waiting.append((step, votes, None))
            return
        on_host = torch.empty(2, pin_memory=True)
        on_host.copy_(votes, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._waiting.append((step, on_host, arrived))

    def read(self, everything: bool = False) -> Iterator[Verdict]:
        """The verdicts that are `lag` steps old, each once; or all of them, which waits for the device."""
        while len(self._waiting) > (0 if everything else self.lag):
            step, votes, arrived = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            bad, stop = votes.tolist()
            yield Verdict(step, bool(bad), bool(stop))
