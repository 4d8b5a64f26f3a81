"""Build the model of a config, and try it before a run writes files."""

import logging
from pathlib import Path

import torch
from detectron2 import modeling
from detectron2.layers import ROIAlign
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from fvcore.common.config import CfgNode
from torch.nn import functional
from torchvision.ops import roi_align

import detection.roi_heads  # registers the head that the C4 recipes name
import detection.training.semantic  # noqa: F401  and the one for semantic segmentation
from detection.config import computes_in_bfloat16, for_one_process
from detection.training import weights
from detection.training.proposals import BatchedRPN, sample_together
from foundation.config import one_of, value_of
from foundation.errors import UserError

REGISTRIES = {
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": modeling.PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": modeling.ANCHOR_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": modeling.ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": modeling.ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": modeling.ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": modeling.ROI_KEYPOINT_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": modeling.SEM_SEG_HEADS_REGISTRY,
}
logger = logging.getLogger(__name__)


class ExactROIAlign(ROIAlign):
    """Detectron2's ROIAlign with regions in float32, whatever the features are in.

    Detectron2 converts the regions to the features' type. In bfloat16 a coordinate between 512 and 1024 pixels is then
    off by up to 2 pixels. Under autocast torchvision computes in float32, and returns the features' type.
    """

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """Features of the regions (N, 5), of which the first column is the number of the image."""
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)


class PaddedMaskHead(MaskRCNNConvUpsampleHead):
    """Detectron2's mask head, which in training sees a multiple of `MULTIPLE` regions.

    The number of regions differs in each iteration. For each new number the host has cuDNN choose an algorithm for each
    convolution and for the two of its backward pass, and the GPU waits.
    """

    MULTIPLE = 128  # 16 images have at most 2,048

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the regions (N, channels, height, width). The regions that are added have no gradient."""
        added = -len(x) % self.MULTIPLE if self.training else 0
        logits: torch.Tensor = super().layers(functional.pad(x, (0, 0, 0, 0, 0, 0, 0, added)) if added else x)
        return logits[: len(x)]


def build(config: CfgNode) -> torch.nn.Module:
    """The model, described in the log file only; its `forward` computes in `SOLVER.PRECISION`.

    Raises:
        UserError: the config names a part that Detectron2 does not have, or parts that do not go together.
    """
    for key, registry in REGISTRIES.items():
        if value_of(config, key):  # C4 names no box head
            one_of(config, key, tuple(name for name, _ in registry))
    try:
        model: torch.nn.Module = modeling.build_model(config)
    # Detectron2's builders check little, and raise whichever of these they run into.
    except (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(
            f"the model of this config cannot be built ({type(error).__name__}: {error}); compare the keys of MODEL"
            " that were changed with the recipe's"
        ) from error
    logger.debug("Model:\n%s", model)
    on_gpu, in_bfloat16 = config.MODEL.DEVICE == "cuda", computes_in_bfloat16(config)
    for module in model.modules():
        if in_bfloat16 and type(module) is ROIAlign:
            module.__class__ = ExactROIAlign
        if on_gpu and type(module) is RPN:
            module.__class__ = BatchedRPN
        if on_gpu and isinstance(module, modeling.ROIHeads):
            sample_together(module)
        # A norm's statistics would contain the added regions.
        if on_gpu and type(module) is MaskRCNNConvUpsampleHead and not config.MODEL.ROI_MASK_HEAD.NORM:
            module.__class__ = PaddedMaskHead
    if in_bfloat16:
        logger.info("The model computes in bfloat16")
        if on_gpu:  # whose units for bfloat16 take the channels of a pixel together
            model.to(memory_format=torch.channels_last)
        model.forward = torch.autocast(config.MODEL.DEVICE, torch.bfloat16)(model.forward)
    return model


def check(config: CfgNode, whole: bool) -> None:
    """Build the model and load `MODEL.WEIGHTS` into it, if they are named, before a run writes files.

    Args:
        config: of the run.
        whole: the file has to fill the whole detector, not only its backbone.

    Raises:
        UserError: the model cannot be built, or the weights do not fit, or what is known of them (the converter's
            sidecar, the config.yaml of their run) disagrees with the config.
    """
    trial, _ = for_one_process(config)
    trial.MODEL.DEVICE = "cpu"
    path = Path(config.MODEL.WEIGHTS)
    if config.MODEL.WEIGHTS:
        weights.check_sidecar(path, config, whole)
    model = build(trial)
    if config.MODEL.WEIGHTS and whole:
        weights.load_detector(model, path)
    elif config.MODEL.WEIGHTS:
        weights.load_backbone(model, path)
