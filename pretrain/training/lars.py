"""LARS: SGD whose step for each tensor is in proportion to the tensor's length (You et al. 2017)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.training.sgd import SGD

# Learning rate of biases and norms, as a fraction of the weights': 0.0048 / 0.2 (Zbontar et al. 2021, section 2.2).
BARLOW_TWINS_PLAIN_LR = 0.0048 / 0.2


class LARS(SGD):
    """LARS in its two published forms.

    The gradient of each tensor, with its weight decay added, is multiplied by `trust` x |weights| / length, then SGD
    with momentum takes the step. Tensors or gradients of length 0 are left to plain SGD. So is a group of parameters
    with `adapt` False.

    Args:
        params: parameters, or groups of them.
        trust: the coefficient.
        decayed_length: length is that of the gradient with its decay, |gradient + decay x weights|, as in the code of
            Barlow Twins and VICReg; else |gradient| + decay x |weights|, as in NVIDIA's LARC, which SimSiam's linear
            evaluation uses.
        plain_lr: learning rate of the groups that are not adapted, as a fraction of the others'.
        others: arguments of `SGD`.
    """

    def __init__(
        self, params: Any, *, trust: float = 0.001, decayed_length: bool = False, plain_lr: float = 1.0, **others: Any
    ) -> None:
        super().__init__(params, **others)
        self.trust = trust
        self.decayed_length = decayed_length
        self.plain_lr = plain_lr

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Scale the gradients in place, and take the step."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            weights = [each for each in group["params"] if each.grad is not None]
            if weights:
                self._rescale(weights, group["weight_decay"], adapt=group.get("adapt", True))
            group["weight_decay"] = 0.0  # it is in the gradients now
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay

    def _rescale(self, weights: list[Tensor], weight_decay: float, adapt: bool) -> None:
        # All tensors of a group at once: one by one, a GPU would wait for the launches of eight kernels for each.
        gradients = [each.grad for each in weights if each.grad is not None]
        if not adapt:
            torch._foreach_add_(gradients, weights, alpha=weight_decay)
            torch._foreach_mul_(gradients, self.plain_lr)
            return
        weight_lengths, lengths = (torch.stack(torch._foreach_norm(each)) for each in (weights, gradients))
        torch._foreach_add_(gradients, weights, alpha=weight_decay)
        if self.decayed_length:
            lengths = torch.stack(torch._foreach_norm(gradients))
        moving = (weight_lengths > 0) & (lengths > 0)
        if not self.decayed_length:
            lengths = lengths + weight_decay * weight_lengths + 1e-8
        factors = torch.where(moving, self.trust * weight_lengths / lengths, 1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))
