"""The C4 head of MoCo's transfer protocol. Importing this module registers it with Detectron2."""

from typing import Any

from fvcore.common.config import CfgNode

import foundation.detectron2_compat  # noqa: F401

# isort: split
from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads


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
