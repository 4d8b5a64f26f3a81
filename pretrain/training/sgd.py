"""SGD whose fused update on a CPU copies no gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd


class SGD(torch.optim.SGD):
    """`torch.optim.SGD`, with a faster fused update on a CPU: the same numbers.

    There PyTorch copies every gradient that is channels-last and does not use the copy. It goes through the memory of
    weights, gradients and momentum without regard to strides, so that a gradient with other strides than its weights
    gives wrong weights (torch 2.14). Here it gets flat views, which it does not copy, of tensors whose strides are
    those of the weights.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the weights that have a gradient."""
        if not all(group["fused"] and weights.is_cpu for group in self.param_groups for weights in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        moved = [weights for weights in group["params"] if weights.grad is not None]
        buffers: list[Tensor | None] = [None] * len(moved)
        for i, weights in enumerate(moved if group["momentum"] else ()):
            buffer = self.state[weights].get("momentum_buffer")
            # From zeros the first step is that of torch.optim.SGD without dampening.
            buffer = torch.zeros_like(weights) if buffer is None else _laid_out(buffer, weights)
            self.state[weights]["momentum_buffer"] = buffers[i] = buffer
        keys = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
        sgd(
            [_flat(weights) for weights in moved],
            [_flat(_laid_out(weights.grad, weights)) for weights in moved],
            [None if buffer is None else _flat(buffer) for buffer in buffers],
            fused=True,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            **{key: group[key] for key in keys},
        )


def _laid_out(tensor: Tensor, weights: Tensor) -> Tensor:
    """The tensor with the strides of the weights: itself where it has them."""
    return tensor if tensor.stride() == weights.stride() else torch.empty_like(weights).copy_(tensor)


def _flat(tensor: Tensor) -> Tensor:
    """All elements of a dense tensor in the order of its memory (N,)."""
    return tensor.as_strided((tensor.numel(),), (1,))
