"""The network in training: both views with as few passes and operations as compute what two passes do."""

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.distributed.batch_norm import ViewBatchNorm, convert
from pretrain.encoder import SiameseNetwork


class TwoViewNetwork(SiameseNetwork):
    """A `SiameseNetwork` that trains on both views at once, with the same parameters and buffers.

    Its BatchNorm normalises each view by itself and updates the running statistics by the first, then by the second.
    So outputs, gradients and statistics are those of two passes, except for rounding.

    On a CPU one pass of both views takes about an eighth less time than two: the weights are prepared, and their
    gradients computed, once. On a GPU the views pass the encoder one after the other, because BatchNorm's kernels
    write into memory of their own, and joining the views again in each layer would cost copies of all activations;
    only the projector, whose activations are small, takes both.

    Args:
        network: is taken over. In training mode it is to be called with both views, not through `embed`.
        together: whether both views pass the encoder at once.
    """

    def __init__(self, network: SiameseNetwork, together: bool) -> None:
        super().__init__(network.encoder, network.projector, network.unit_length)
        self.together = together
        convert(self.encoder, ViewBatchNorm, views=2 if together else 1)
        convert(self.projector, ViewBatchNorm, views=2)
        for module in self.modules():
            if isinstance(module, ViewBatchNorm):
                module.counts = False

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) of each view -> embeddings (N, P), float32."""
        if not self.training:
            return super().forward(view1, view2)
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm)]
        torch._foreach_add_([norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None], 2)
        passes = [torch.cat([view1, view2])] if self.together else [view1, view2]
        features = torch.cat([self.encoder(images) for images in passes])
        z1, z2 = self.project(features).chunk(2)
        return z1, z2
