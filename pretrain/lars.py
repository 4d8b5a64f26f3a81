"""LARS: SGD whose step for each tensor is in proportion to the tensor's length."""

from collections.abc import Callable
from typing import Any

import torch


class LARS(torch.optim.SGD):
    """You et al. 2017, in the form that SimSiam's linear evaluation uses.

    The gradient of each tensor, with its weight decay, is multiplied by `trust` x |weights| / |gradient with decay|,
    then SGD with momentum takes the step. Tensors or gradients of length 0 are left to plain SGD.

    Args:
        trust: the coefficient.
        others: arguments of `torch.optim.SGD`.
    """

    def __init__(self, params: Any, *, trust: float = 0.001, **others: Any) -> None:
        super().__init__(params, **others)
        self.trust = trust

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Scale the gradients in place, and take the step."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    self._scale(weights, group["weight_decay"])
            group["weight_decay"] = 0.0  # it is in the gradients now
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay

    def _scale(self, weights: torch.Tensor, weight_decay: float) -> None:
        length, slope = weights.norm(), weights.grad.norm()  # type: ignore[union-attr]
        weights.grad.add_(weights, alpha=weight_decay)  # type: ignore[union-attr]
        factor = self.trust * length / (slope + weight_decay * length + 1e-8)
        weights.grad.mul_(torch.where((length > 0) & (slope > 0), factor, 1.0))  # type: ignore[union-attr]
