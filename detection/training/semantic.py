"""The head of MoCo's protocol for semantic segmentation.

Importing this module registers the head with Detectron2.
"""

from typing import Any

import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.common.config import CfgNode
from torch import nn
from torch.nn import functional

CONVOLUTIONS = 2
DILATION = 6  # a wide field of view


@SEM_SEG_HEADS_REGISTRY.register()
class FCNHead(nn.Module):
    """Two dilated 3x3 convolutions on the last stage, and a 1x1 convolution to the classes: MoCo's protocol.

    As the configs of SlotCon have it (CVMI-Lab/SlotCon, transfer/segmentation, `fcn_d6_r50-d16_*_moco`): 256
    channels, norm and ReLU, dilation 6, no dropout, cross entropy. Scores are scaled up bilinearly.
    """

    def __init__(self, cfg: CfgNode, input_shape: dict[str, Any]) -> None:
        super().__init__()
        settings = cfg.MODEL.SEM_SEG_HEAD
        (self.feature,) = settings.IN_FEATURES
        self.stride = input_shape[self.feature].stride
        self.ignore_value = settings.IGNORE_VALUE
        self.loss_weight = settings.LOSS_WEIGHT
        layers: list[nn.Module] = []
        channels = input_shape[self.feature].channels
        for _ in range(CONVOLUTIONS):
            layer = Conv2d(
                channels,
                settings.CONVS_DIM,
                kernel_size=3,
                padding=DILATION,
                dilation=DILATION,
                bias=not settings.NORM,
                norm=get_norm(settings.NORM, settings.CONVS_DIM),
                activation=functional.relu,
            )
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            layers.append(layer)
            channels = settings.CONVS_DIM
        self.convolutions = nn.Sequential(*layers)
        self.predictor = Conv2d(channels, settings.NUM_CLASSES, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(
        self, features: dict[str, torch.Tensor], targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Scores or losses, as Detectron2's `SemanticSegmentor` expects them.

        Args:
            features: by name, (N, channels, h, w).
            targets: (N, H, W) labels, used in training.

        Returns:
            In training None and the loss; else the scores (N, classes, h x stride, w x stride) and nothing.
        """
        scores = self.predictor(self.convolutions(features[self.feature])).float()
        scores = functional.interpolate(scores, scale_factor=self.stride, mode="bilinear", align_corners=False)
        if not self.training or targets is None:
            return scores, {}
        height, width = targets.shape[-2:]  # not always a multiple of the stride
        loss = functional.cross_entropy(scores[..., :height, :width], targets, ignore_index=self.ignore_value)
        return None, {"loss_sem_seg": loss * self.loss_weight}
