"""The C4 head of MoCo's transfer protocol. Importing this module registers it with Detectron2."""

from typing import Any

import torch
from fvcore.common.config import CfgNode

import foundation.detectron2_compat  # noqa: F401

# isort: split
from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from detectron2.structures import Boxes


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """res5 as the head on each region, followed by one more norm.

    Features from self-supervised pretraining have another scale than supervised ones, and res5 has no norm after its
    last addition. MoCo's protocol adds one (He et al. 2020, appendix A.1), before the pooling, without ReLU, shared by
    the box and the mask branch. Its tensors, `roi_heads.res5.norm.*`, are the only ones of the backbone and res5 that a
    converted file does not have.
    """

    def __init__(self, cfg: CfgNode, input_shape: dict[str, Any]) -> None:
        super().__init__(cfg, input_shape)
        norm = get_norm(cfg.MODEL.RESNETS.NORM, self.res5[-1].out_channels)
        if norm is not None:
            self.res5.add_module("norm", norm)

    def _shared_roi_transform(self, features: list[torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
        """Features of the regions after res5, computed in the memory layout of `features`.

        ROIAlign returns PyTorch's default layout. Where the channels of a pixel lie together, each of the convolutions
        that read the result would convert it, forwards and backwards.
        """
        pooled = self.pooler(features, boxes)
        if features[0].is_contiguous(memory_format=torch.channels_last):
            pooled = pooled.contiguous(memory_format=torch.channels_last)
        return self.res5(pooled)
