"""Diagnostics of an embedding from its covariance: mutual information, effective rank, smallest eigenvalue, collapse.

======== ==================== ============================================ ==================
symbol   name here            meaning                                      where
======== ==================== ============================================ ==================
R^(q)    covariance[q]        covariance of view q, (P, P)                 article Eq. (7)
R^(12)   cross_covariance     E[(z1 - mu1) (z2 - mu2)^T], (P, P)           thesis Eq. (4.6)
epsilon  eps                  diagonal perturbation                        article Eq. (1), (6)
I_LD     ldmi                 log-determinant mutual information, nats     article Eq. (1)
======== ==================== ============================================ ==================

Pure functions in float64. They are for the log and not for the loss: nothing here has a gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

COLLAPSE_SHARE = 0.1  # fraction of the P dimensions; an effective rank below it is reported as a collapse


class Spectrum(NamedTuple):
    """Values at one step. Of the two views, the lower effective rank and the smaller eigenvalue are taken."""

    ldmi: float  # nats
    effective_rank: float  # between 1 and P
    min_eigenvalue: float
    eigenvalues: Tensor  # (2, P), descending


def measure(covariance: Tensor, cross_covariance: Tensor, eps: float) -> Spectrum:
    """All values for the running estimates. covariance (2, P, P), cross_covariance (P, P), both float64."""
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(-1)
    return Spectrum(
        ldmi=log_determinant_information(covariance, cross_covariance, eps).item(),
        effective_rank=effective_rank(eigenvalues).min().item(),
        min_eigenvalue=eigenvalues.min().item(),
        eigenvalues=eigenvalues,
    )


def log_determinant_information(covariance: Tensor, cross_covariance: Tensor, eps: float) -> Tensor:
    """LDMI of the two views, article Eq. (1), in nats; zero if and only if they are uncorrelated.

    The four terms of Eq. (1) are two by Schur's complement: with J the joint covariance of (z1, z2),
    I = (logdet(R1 + eps I) + logdet(R2 + eps I) - logdet(J + eps I)) / 2. By eigenvalues and not by Cholesky: if
    the two views agree, J has rank P, and rounding may make it indefinite; negative eigenvalues are taken as 0.

    Args:
        covariance: (2, P, P).
        cross_covariance: (P, P), first view by second.
        eps: added to the diagonals.
    """
    first, second = covariance
    joint = torch.cat(
        [torch.cat([first, cross_covariance], dim=1), torch.cat([cross_covariance.mT, second], dim=1)], dim=0
    )
    return (_logdet(first, eps) + _logdet(second, eps) - _logdet(joint, eps)) / 2


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised eigenvalues (..., P) -> (...): 1 to P; 0 if all are 0.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    positive = eigenvalues.clamp(min=0)
    total = positive.sum(-1, keepdim=True)
    share = positive / total.where(total > 0, torch.ones_like(total))
    rank = torch.special.entr(share).sum(-1).exp()
    return rank.where(total[..., 0] > 0, torch.zeros_like(rank))


def is_collapsed(spectrum: Spectrum) -> bool:
    """Whether the embedding uses fewer than `COLLAPSE_SHARE` of its dimensions."""
    return spectrum.effective_rank < COLLAPSE_SHARE * spectrum.eigenvalues.shape[-1]


def _logdet(matrix: Tensor, eps: float) -> Tensor:
    return (torch.linalg.eigvalsh(matrix).clamp(min=0) + eps).log().sum()
