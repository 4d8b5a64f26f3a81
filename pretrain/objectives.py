"""The objectives by name: CorInfoMax, and those that it is compared with, on the same two views of the same network.

To add one, write a subclass of `Objective` with its `loss`, and name it in `OBJECTIVES`. Those of this module come from
the library lightly (the extra `baselines`), with their articles' parameters.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.errors import UserError
from pretrain.corinfomax import CorInfoMaxLoss, RunningEstimates, Terms
from pretrain.distributed import group

CORINFOMAX = "corinfomax"


class Objective(RunningEstimates, ABC):
    """A loss of two views' embeddings. Subclasses implement `loss`, which has no trainable parameters of its own.

    CorInfoMax's terms and the running covariance are measured only in the steps that are logged, so that a training
    costs what its own loss costs; spectra and LDMI of any two objectives can still be compared (thesis Fig. 5.3).

    Attributes:
        unit_length: the loss is defined on embeddings scaled to length 1; the network then scales them.
        several_processes: the loss gathers the embeddings of all processes.
    """

    unit_length: ClassVar[bool] = True
    several_processes: ClassVar[bool] = True

    @abstractmethod
    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss, a scalar. z1, z2: (N, P) float32 embeddings of the first and second views, same images."""

    def forward(self, z1: Tensor, z2: Tensor) -> Terms:
        """The loss of embeddings (N, P) of any float dtype. CorInfoMax's terms are not measured: NaN."""
        with torch.autocast(z1.device.type, enabled=False):
            total = self.loss(z1.float(), z2.float()).double()
        unknown = total.new_full((), math.nan)
        return Terms(total, unknown, unknown)

    @torch.no_grad()
    def measure(self, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """Update the running estimates, and return the big-bang and attraction terms. Without gradient.

        Args:
            z1, z2: (N, P) embeddings, which are scaled to unit length.
        """
        return self.terms(F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1))


class LightlyObjective(Objective):
    """A loss of the library lightly: `kind`, a class of `lightly.loss`, with its `options`.

    Raises:
        UserError: lightly is not installed.
    """

    kind: ClassVar[str]
    options: ClassVar[dict[str, float]]

    def __init__(self, **estimates: Any) -> None:
        super().__init__(**estimates)
        try:
            from lightly import loss as losses
        except ImportError as error:
            raise UserError(
                f"OBJECTIVE.NAME {_name_of(type(self))} comes from the library lightly, which is not installed; "
                "pip install 'corinfomax[baselines]'"
            ) from error
        gathers = {"gather_distributed": group.world_size() > 1} if self.several_processes else {}
        # The method and not the module: a checkpoint holds the running estimates, of every objective the same.
        self._loss = getattr(losses, self.kind)(**self.options, **gathers).forward

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The library's loss, a scalar. z1, z2: (N, P)."""
        return self._loss(z1, z2)


class VICReg(LightlyObjective):
    """Bardes et al. 2022, Eq. (6)."""

    kind, options = "VICRegLoss", {"lambda_param": 25.0, "mu_param": 25.0, "nu_param": 1.0}
    unit_length = False


class BarlowTwins(LightlyObjective):
    """Zbontar et al. 2021, Eq. (1)."""

    kind, options = "BarlowTwinsLoss", {"lambda_param": 5e-3}
    unit_length = False


class SimCLR(LightlyObjective):
    """Chen et al. 2020, Eq. (1)."""

    kind, options = "NTXentLoss", {"temperature": 0.5}


class DCL(LightlyObjective):
    """Yeh et al. 2022, Eq. (6)."""

    kind, options = "DCLLoss", {"temperature": 0.1}


class FroSSL(LightlyObjective):
    """Skean et al. 2024."""

    kind, options = "FroSSLLoss", {"invariance_weight": 1.0}
    unit_length = False
    several_processes = False

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The library's loss, a scalar, which takes a list of views. z1, z2: (N, P)."""
        return self._loss([z1, z2])


OBJECTIVES: dict[str, type[CorInfoMaxLoss] | type[Objective]] = {
    CORINFOMAX: CorInfoMaxLoss,
    "vicreg": VICReg,
    "barlow_twins": BarlowTwins,
    "simclr": SimCLR,
    "dcl": DCL,
    "frossl": FroSSL,
}
TITLES = {  # as their authors write them, for legends
    CORINFOMAX: "CorInfoMax",
    "vicreg": "VICReg",
    "barlow_twins": "Barlow Twins",
    "simclr": "SimCLR",
    "dcl": "DCL",
    "frossl": "FroSSL",
}


def needs_unit_length(name: str) -> bool:
    """Whether the network scales the embeddings to unit length for the objective."""
    kind = OBJECTIVES[name]
    return not issubclass(kind, Objective) or kind.unit_length


def build_criterion(
    name: str, *, dim: int, attraction: float, forgetting: float, eps: float
) -> CorInfoMaxLoss | Objective:
    """The objective of a name.

    Args:
        name: one of `OBJECTIVES`.
        dim: P, dimension of the embedding.
        attraction: weight of CorInfoMax's attraction term; not used by the others.
        forgetting, eps: of the running estimates, as in `CorInfoMaxLoss`.

    Raises:
        UserError: the library is not installed, or its objective is not for several processes.
    """
    kind = OBJECTIVES[name]
    if not issubclass(kind, Objective):
        return kind(dim=dim, attraction=attraction, forgetting=forgetting, eps=eps)
    if group.world_size() > 1 and not kind.several_processes:
        raise UserError(
            f"OBJECTIVE.NAME {name}: its loss does not gather the batches of several processes; start one process"
        )
    return kind(dim=dim, forgetting=forgetting, eps=eps)


def _name_of(kind: type[Objective]) -> str:
    return next((name for name, each in OBJECTIVES.items() if each is kind), kind.__name__)
