r"""The CorInfoMax objective: correlative information maximisation between two views of an image.

Source: Ozsoy et al., "Self-Supervised Learning with an Information Maximization Criterion", NeurIPS 2022, Eq. (6)
and (7); thesis Eq. (4.2)-(4.5) and the pseudocode of its Appendix A.2, which this module follows step by step.

======== ==================== ============================================ ==========
symbol   name here            meaning                                      where
======== ==================== ============================================ ==========
Z^(q)    z1, z2               projector output of view q, (N, P), unit     Section 4.1
                              length
N        count                images in the whole batch, all processes
P        dim                  projector output dimension
mu^(q)   mean[q]              running mean, (P,)                           Eq. (4.5)
R^(q)    covariance[q]        running covariance, (P, P)                   Eq. (7), (4.3)
R^(12)   cross_covariance     running cross-covariance, (P, P)             thesis (4.6)
lambda   forgetting           weight of the OLD estimate, 0 <= lambda < 1  Eq. (7)
epsilon  eps                  diagonal perturbation                        Eq. (6)
alpha    attraction weight    stands for 2 / (epsilon N) in Eq. (6)        Section 5.1.3
======== ==================== ============================================ ==========

The covariance and its factorisation are in float64, outside autocast: in float32 the Cholesky factorisation fails as
soon as the embedding loses rank, which is where the log-determinant matters. Across processes the sums behind mean,
covariance and attraction are all-reduced with gradient, P + P^2 + 1 numbers, so that several processes compute the loss
that one process computes for the whole batch. The cross-covariance is not part of the loss: it is kept, without
gradient, for LDMI, the measure that the loss approximates (`spectrum.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.distributed.group import all_reduce_sum


class Terms(NamedTuple):
    """The loss and its two parts, scalars in float64: `total = big_bang + weight * attraction`."""

    total: Tensor
    big_bang: Tensor
    attraction: Tensor


class _Gram(torch.autograd.Function):
    """Z^T Z. Backward is one product, Z (G + G^T), instead of the two that autograd would compute."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.mT @ z

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return z @ (gradient + gradient.mT)


class _LogDeterminant(torch.autograd.Function):
    """log det(R + eps I) of symmetric R. Backward computes one inverse, from the Cholesky factor of forward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, matrices: Tensor, eps: float) -> Tensor:
        perturbed = matrices.clone()
        perturbed.diagonal(dim1=-2, dim2=-1).add_(eps)
        factor, info = torch.linalg.cholesky_ex(perturbed)
        # For a matrix that is not positive definite the factor is incomplete. NaN on its diagonal makes value and
        # gradient NaN without a host synchronisation; the training loop skips such a batch.
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        diagonal.masked_fill_((info != 0)[..., None], torch.nan)
        ctx.save_for_backward(factor)
        return 2 * diagonal.log().sum(-1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        # A second derivative would lack the derivative of the factor. torch's `once_differentiable` does not refuse
        # every such use: it lets a constant gradient pass.
        if torch.is_grad_enabled():
            raise NotImplementedError("the log-determinant has no second derivative: create_graph cannot be used")
        (factor,) = ctx.saved_tensors  # type: ignore[attr-defined]
        inverse = torch.cholesky_inverse(factor)  # d logdet(R) = tr(R^-1 dR), R symmetric
        return inverse.mul_(gradient[..., None, None]), None


def log_determinant(matrices: Tensor, eps: float = 0.0) -> Tensor:
    """Log det(R + eps I) by Cholesky of symmetric R (..., P, P) -> (...). NaN where it is not positive definite."""
    return _LogDeterminant.apply(matrices, eps)


def update_mean(old: Tensor, z: Tensor, count: Tensor, forgetting: float) -> Tensor:
    """Eq. (4.5): running mean (2, P), from the old one and the views z (2, N_local, P) of `count` images in all."""
    return forgetting * old + (1 - forgetting) * all_reduce_sum(z.sum(dim=1)) / count


def deviations(z: Tensor, mean: Tensor, count: Tensor, forgetting: float) -> Tensor:
    """The factors of Eq. (7): views z (2, N_local, P) minus the UPDATED mean (2, P), times sqrt((1 - lambda) / N).

    Their products are the new part of the covariance, weight included, so that no P x P matrix has to be scaled.
    """
    return (z - mean[:, None]) * ((1 - forgetting) / count).sqrt()


def update_covariance(old: Tensor, deviating: Tensor, forgetting: float) -> Tensor:
    """Eq. (7): running covariance (2, P, P), from the old one and the `deviations` (2, N_local, P)."""
    return torch.add(all_reduce_sum(_Gram.apply(deviating)), old, alpha=forgetting)


@torch.no_grad()
def update_cross_covariance(old: Tensor, deviating: Tensor, forgetting: float) -> Tensor:
    """Thesis Eq. (4.6): running cross-covariance (P, P), first view by second, as `update_covariance`. No gradient."""
    first, second = deviating
    return forgetting * old + all_reduce_sum(first.mT @ second)  # torch 2.14 compiles add(..., alpha) of this wrongly


def big_bang(covariance: Tensor, eps: float) -> Tensor:
    """The term against collapse: minus the log-determinants of both views, divided by P. Thesis Appendix A.2.

    Args:
        covariance: (2, P, P).
        eps: added to the diagonal.
    """
    return -log_determinant(covariance, eps).sum() / covariance.shape[-1]


def attraction(z1: Tensor, z2: Tensor, count: Tensor) -> Tensor:
    """Mean squared difference over all N x P entries, as in thesis Appendix A.2. z1, z2: (N_local, P)."""
    return all_reduce_sum((z1 - z2).square().sum()) / (count * z1.shape[1])


class RunningEstimates(nn.Module):
    """Running mean and covariance of two views' embeddings, as buffers: saved, restored and moved with the module.

    `mean` (2, P), `covariance` (2, P, P) and `cross_covariance` (P, P), all float64.

    Args:
        dim: P, dimension of the embedding.
        forgetting: lambda, weight of the old estimate.
        eps: diagonal perturbation of the covariance.
    """

    mean: Tensor
    covariance: Tensor
    cross_covariance: Tensor

    def __init__(self, *, dim: int, forgetting: float, eps: float) -> None:
        super().__init__()
        if not 0 <= forgetting < 1:
            raise ValueError(f"forgetting must be in [0, 1), not {forgetting}")
        self.forgetting = forgetting
        self.eps = eps
        self.register_buffer("mean", torch.zeros(2, dim, dtype=torch.float64))
        self.register_buffer("covariance", torch.eye(dim, dtype=torch.float64).repeat(2, 1, 1))
        self.register_buffer("cross_covariance", torch.zeros(dim, dim, dtype=torch.float64))

    def update(self, z: Tensor, count: Tensor) -> Tensor:
        """Take a batch in. Returns the updated covariance (2, P, P), with gradient.

        In eval mode the result is the same and the estimates stay as they were.

        Args:
            z: (2, N_local, P) embeddings of both views, float64.
            count: N, of all processes.
        """
        mean = update_mean(self.mean, z, count, self.forgetting)
        deviating = deviations(z, mean, count, self.forgetting)
        covariance = update_covariance(self.covariance, deviating, self.forgetting)
        if self.training:
            cross = update_cross_covariance(self.cross_covariance, deviating, self.forgetting)
            self.cross_covariance.copy_(cross)
            self.mean.copy_(mean.detach())
            self.covariance.copy_(covariance.detach())
        return covariance

    def terms(self, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """Take a batch in. Returns the big-bang and the attraction term, scalars in float64.

        Args:
            z1, z2: (N, P), see `CorInfoMaxLoss.forward`.

        Raises:
            ValueError: the shapes are not two times (N, P).
        """
        dim = self.mean.shape[1]
        if z1.shape != z2.shape or z1.ndim != 2 or z1.shape[1] != dim or not len(z1):
            raise ValueError(f"expected two (N, {dim}) embeddings, got {tuple(z1.shape)} and {tuple(z2.shape)}")
        with torch.autocast(z1.device.type, enabled=False):
            z = torch.stack([z1, z2]).double()
            count = all_reduce_sum(z.new_full((), len(z1)))
            return big_bang(self.update(z, count), self.eps), attraction(z[0], z[1], count)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RunningEstimates":
        # `.half()` or `.to(bfloat16)` of a model that contains the loss must move the estimates, not round them.
        kept = {name: buffer.clone() for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            setattr(self, name, kept[name].to(buffer.device))
        return self


class CorInfoMaxLoss(RunningEstimates):
    """CorInfoMax, Eq. (6), with its running estimates.

    Args:
        dim: P, dimension of the embedding.
        attraction: alpha, weight of the attraction term.
        forgetting: lambda, weight of the old estimate.
        eps: diagonal perturbation of the covariance.
    """

    def __init__(self, *, dim: int, attraction: float, forgetting: float, eps: float) -> None:
        super().__init__(dim=dim, forgetting=forgetting, eps=eps)
        self.attraction = attraction

    def forward(self, z1: Tensor, z2: Tensor) -> Terms:
        """Update the running estimates with a batch and return the loss.

        In eval mode the loss is computed in the same way and the estimates stay as they were. Gradients flow through
        the updated mean and covariance; the old estimates carry none.

        Args:
            z1: (N, P) embeddings of the first views, unit length, any float dtype. With several processes this
                process's part of the batch; the parts may differ in size.
            z2: (N, P) of the second views, same images in the same order.

        Raises:
            ValueError: the shapes are not two times (N, P).
        """
        expansion, pull = self.terms(z1, z2)
        return Terms(expansion + self.attraction * pull, expansion, pull)
