"""What a model asks of its datasets: how many classes, and masks, keypoints or a class for each pixel."""

from dataclasses import dataclass

from fvcore.common.config import CfgNode

from foundation.config import value_of
from foundation.errors import UserError

# Where each architecture keeps its number of classes.
CLASS_KEYS = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "SemanticSegmentor": "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
}


@dataclass(frozen=True)
class Needs:
    """What a dataset must hold for a model to be trained and evaluated on it.

    Attributes:
        classes: the number of classes that the model tells apart.
        key: the config key that this number stands under.
        masks: each object needs its outline.
        polygons: the outlines must be polygons, not run lengths (`INPUT.MASK_FORMAT`).
        keypoints: how many points each object needs; 0 for none.
        semantic: a class for each pixel is asked for, and no objects.
        evaluated: the dataset is one to evaluate on; some evaluations read more than training does.
    """

    classes: int
    key: str = CLASS_KEYS["GeneralizedRCNN"]
    masks: bool = False
    polygons: bool = False
    keypoints: int = 0
    semantic: bool = False
    evaluated: bool = False


def class_key(config: CfgNode) -> str:
    """The config key of the number of classes.

    Raises:
        UserError: the architecture is none of those that the recipes use.
    """
    architecture = config.MODEL.META_ARCHITECTURE
    if architecture not in CLASS_KEYS:
        raise UserError(f"MODEL.META_ARCHITECTURE must be one of {', '.join(CLASS_KEYS)}, not {architecture!r}")
    return CLASS_KEYS[architecture]


def set_classes(config: CfgNode, classes: int) -> None:
    """Write the number of classes under the key of the config's architecture.

    Raises:
        UserError: the architecture is none of those that the recipes use.
    """
    config.merge_from_list([class_key(config), classes])


def needs_of(config: CfgNode) -> Needs:
    """What the model of a config asks of its datasets.

    Raises:
        UserError: the architecture is none of those that the recipes use.
    """
    key = class_key(config)
    architecture = config.MODEL.META_ARCHITECTURE
    regions = architecture == "GeneralizedRCNN"
    masks = regions and config.MODEL.MASK_ON
    return Needs(
        classes=value_of(config, key),
        key=key,
        masks=masks,
        polygons=masks and config.INPUT.MASK_FORMAT == "polygon",
        keypoints=config.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if regions and config.MODEL.KEYPOINT_ON else 0,
        semantic=architecture == "SemanticSegmentor",
    )
