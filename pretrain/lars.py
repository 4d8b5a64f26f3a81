"""LARS: SGD whose step for each tensor is in proportion to the tensor's length."""

from collections.abc import Callable
from typing import Any

import torch

OPTIMIZERS = ("sgd", "lars")  # of pretraining, linear classifiers and fine-tuning


class LARS(torch.optim.SGD):
    """You et al. 2017, in the form that SimSiam's linear evaluation uses.

    The gradient of each tensor, with its weight decay, is multiplied by `trust` x |weights| / |gradient with decay|,
    then SGD with momentum takes the step. Tensors or gradients of length 0 are left to plain SGD. So is a group of
    parameters with `adapt` False, which takes a share of the learning rate.

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
            for weights in group["params"]:
                if weights.grad is not None:
                    rescale(weights, weights.grad, group["weight_decay"])
            group["weight_decay"] = 0.0  # it is in the gradients now
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay

    def _adapt(self, weights: torch.Tensor, gradient: torch.Tensor, weight_decay: float) -> None:
        length, slope = weights.norm(), gradient.norm()
        factor = self.trust * length / (slope + weight_decay * length + 1e-8)
        gradient.add_(weights, alpha=weight_decay).mul_(torch.where((length > 0) & (slope > 0), factor, 1.0))

    def _take_share(self, weights: torch.Tensor, gradient: torch.Tensor, weight_decay: float) -> None:
        gradient.add_(weights, alpha=weight_decay).mul_(self.plain_share)
