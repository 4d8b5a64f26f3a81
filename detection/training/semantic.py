"""Semantic segmentation: reading labels, and the head of MoCo's protocol.

Importing this module registers the head with Detectron2.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from detectron2.data import detection_utils, transforms
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.common.config import CfgNode
from torch import nn
from torch.nn import functional

from detection.checks.folders import check_labels

CONVOLUTIONS = 2
DILATION = 6  # a wide field of view


class LabelMapper:
    """Turns a record of an image and its labels into what a model trains on.

    It differs from Detectron2's own in two ways. Labels are read as they are, where Detectron2 converts them to grey
    levels first, which turns the palette of VOC's labels into other numbers. And the crop is taken from the resized
    image, not from the original one.
    """

    def __init__(
        self, augmentations: Sequence[transforms.Augmentation], image_format: str, classes: int, ignored: int
    ) -> None:
        """Keep the settings.

        Args:
            augmentations: of image and labels alike.
            image_format: order of the colours, RGB or BGR.
            classes: labels must be below this.
            ignored: the label of pixels that do not count.
        """
        self.augmentations = transforms.AugmentationList(augmentations)
        self.image_format = image_format
        self.classes = classes
        self.ignored = ignored

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with `image` (3, H, W) uint8 and `sem_seg` (H, W) int64 in place of the file of labels.

        Raises:
            UserError: a label is no class.
        """
        record = copy.deepcopy(record)
        path = record.pop("sem_seg_file_name")
        image = detection_utils.read_image(record["file_name"], format=self.image_format)
        detection_utils.check_image_size(record, image)
        labels = detection_utils.read_image(path)  # no format: a palette's indices stay what they are
        check_labels(labels, Path(path), self.classes, self.ignored)
        both = transforms.AugInput(image, sem_seg=labels)
        self.augmentations(both)
        record["image"] = torch.from_numpy(numpy.ascontiguousarray(both.image.transpose(2, 0, 1)))
        record["sem_seg"] = torch.from_numpy(both.sem_seg.astype(numpy.int64))
        return record


def training_mapper(config: CfgNode) -> LabelMapper | None:
    """The mapper for a config's training images; None where Detectron2's own is right: all but semantic segmentation.

    Resizes the shorter side as `INPUT.MIN_SIZE_TRAIN` says, crops if `INPUT.CROP` is enabled, and flips.
    """
    if config.MODEL.META_ARCHITECTURE != "SemanticSegmentor":
        return None
    resize, *flip = detection_utils.build_augmentation(config, is_train=True)
    crop = []
    if config.INPUT.CROP.ENABLED:
        kind, size = config.INPUT.CROP.TYPE, config.INPUT.CROP.SIZE
        # The key holds shares by default, so that pixels come as floats too.
        crop = [transforms.RandomCrop(kind, [int(side) for side in size] if kind.startswith("absolute") else size)]
    head = config.MODEL.SEM_SEG_HEAD
    return LabelMapper([resize, *crop, *flip], config.INPUT.FORMAT, head.NUM_CLASSES, head.IGNORE_VALUE)


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
