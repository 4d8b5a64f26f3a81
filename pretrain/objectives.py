"""The objective by name: CorInfoMax, or one that it is compared with, on the same two views of the same network.

The others come from the library lightly (the extra `baselines`), with their articles' parameters. All are modules
`criterion(z1, z2) -> Terms` with the same state, so that training, checkpoints and figures treat them alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.errors import UserError
from pretrain.corinfomax import CorInfoMaxLoss, Terms
from pretrain.distributed import group

CORINFOMAX = "corinfomax"
# Class in lightly.loss and its arguments, those of the articles.
BASELINES: dict[str, tuple[str, dict[str, float]]] = {
    "vicreg": ("VICRegLoss", {"lambda_param": 25.0, "mu_param": 25.0, "nu_param": 1.0}),
    "barlow_twins": ("BarlowTwinsLoss", {"lambda_param": 5e-3}),
    "simclr": ("NTXentLoss", {"temperature": 0.5}),
    "dcl": ("DCLLoss", {"temperature": 0.1}),
    "frossl": ("FroSSLLoss", {"invariance_weight": 1.0}),
}
OBJECTIVES = (CORINFOMAX, *BASELINES)
ONE_PROCESS = ("frossl",)  # lightly's class takes a list of views, of the process's own batch
BY_STATISTICS = ("vicreg", "barlow_twins", "frossl")  # these scale embeddings by the batch, not to unit length


class Baseline(CorInfoMaxLoss):
    """Another loss, with CorInfoMax's terms measured beside it on the embeddings scaled to unit length.

    The running covariance of any objective's embeddings can thus be looked at (thesis Fig. 5.3). It gets no gradient.

    Args:
        loss: embeddings (N, P) of both views -> scalar.
        dim, forgetting, eps: of the measured terms.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], *, dim: int, forgetting: float, eps: float) -> None:
        super().__init__(dim=dim, attraction=1.0, forgetting=forgetting, eps=eps)
        self._loss = loss

    def forward(self, z1: Tensor, z2: Tensor) -> Terms:
        """The loss, with the measured big-bang and attraction terms. z1, z2: (N, P), any float dtype."""
        with torch.autocast(z1.device.type, enabled=False):
            total = self._loss(z1.float(), z2.float())
        with torch.no_grad():
            measured = super().forward(F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1))
        return Terms(total.double(), measured.big_bang, measured.attraction)


def wants_unit_length(name: str) -> bool:
    """Whether the objective is defined on embeddings of unit length."""
    return name not in BY_STATISTICS


def build_criterion(name: str, *, dim: int, attraction: float, forgetting: float, eps: float) -> CorInfoMaxLoss:
    """The objective of a name.

    Args:
        name: one of `OBJECTIVES`.
        dim: P, dimension of the embedding.
        attraction: weight of CorInfoMax's attraction term; the others have no use for it.
        forgetting, eps: as in `CorInfoMaxLoss`.

    Raises:
        UserError: the library is not installed, or its objective is not for several processes.
    """
    if name == CORINFOMAX:
        return CorInfoMaxLoss(dim=dim, attraction=attraction, forgetting=forgetting, eps=eps)
    several = group.world_size() > 1
    if several and name in ONE_PROCESS:
        raise UserError(
            f"OBJECTIVE.NAME {name}: lightly's loss does not gather the batches of several processes; train it with one"
        )
    try:
        from lightly import loss as losses
    except ImportError as error:
        raise UserError(
            f"OBJECTIVE.NAME {name} comes from the library lightly, which is not installed; "
            "pip install 'corinfomax[baselines]'"
        ) from error
    class_name, options = BASELINES[name]
    build = getattr(losses, class_name)
    if name in ONE_PROCESS:
        listed = build(**options).forward
        return Baseline(lambda z1, z2: listed([z1, z2]), dim=dim, forgetting=forgetting, eps=eps)
    loss = build(**options, gather_distributed=several)
    return Baseline(loss.forward, dim=dim, forgetting=forgetting, eps=eps)
