"""LARS: SGD whose step for each tensor is in proportion to the tensor's length."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPTIMIZERS = ("sgd", "lars")  # of pretraining, linear classifiers and fine-tuning


class LARS(torch.optim.SGD):
    """You et al. 2017, in the form that SimSiam's linear evaluation uses.

    The gradient of each tensor, with its weight decay added, is multiplied by
    `trust` x |weights| / (|gradient| + decay x |weights|), then SGD with momentum takes the step. Tensors or gradients
    of length 0 are left to plain SGD. So is a group of parameters with `adapt` False, which takes a share of the
    learning rate.

    Args:
        params: parameters, or groups of them.
        trust: the coefficient.
        plain_share: of the learning rate, for the groups that are not adapted.
        others: arguments of `torch.optim.SGD`.
    """

    def __init__(self, params: Any, *, trust: float = 0.001, plain_share: float = 1.0, **others: Any) -> None:
        super().__init__(params, **others)
        self.trust = trust
        self.plain_share = plain_share

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Scale the gradients in place, and take the step."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            rescale = self._adapt if group.get("adapt", True) else self._take_share
            weights = [each for each in group["params"] if each.grad is not None]
            if weights:
                rescale(weights, [each.grad for each in weights], group["weight_decay"])
            group["weight_decay"] = 0.0  # it is in the gradients now
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay

    # All tensors of a group at once: one by one, a GPU would wait for the launches of eight kernels for each.

    def _adapt(self, weights: list[Tensor], gradients: list[Tensor], weight_decay: float) -> None:
        lengths, slopes = (torch.stack(torch._foreach_norm(each)) for each in (weights, gradients))
        factors = self.trust * lengths / (slopes + weight_decay * lengths + 1e-8)
        factors = torch.where((lengths > 0) & (slopes > 0), factors, 1.0)
        torch._foreach_add_(gradients, weights, alpha=weight_decay)
        torch._foreach_mul_(gradients, list(factors.unbind()))

    def _take_share(self, weights: list[Tensor], gradients: list[Tensor], weight_decay: float) -> None:
        torch._foreach_add_(gradients, weights, alpha=weight_decay)
        torch._foreach_mul_(gradients, self.plain_share)
