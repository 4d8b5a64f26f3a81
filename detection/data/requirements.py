"""What a model requires of its datasets: how many classes, and masks, keypoints or a class for each pixel."""

from dataclasses import dataclass, field

from fvcore.common.config import CfgNode

from foundation.config import value_of
from foundation.errors import UserError

COCO_KEYPOINTS = 17  # of a person, for which COCO's evaluation has tolerances

# Where each architecture keeps its number of classes.
CLASS_KEYS = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "SemanticSegmentor": "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
}


@dataclass(frozen=True)
class Requirements:
    """What a dataset must hold for a model to be trained and evaluated on it.

    Attributes:
        classes: the number of classes of the model.
        key: the config key of this number.
        masks: each object needs a mask.
        polygons: the masks must be polygons, not run-length codes (`INPUT.MASK_FORMAT`).
        keypoints: the number of points that each object needs; 0 for none.
        least_keypoints: visible ones that an image needs to be trained on (`MIN_KEYPOINTS_PER_IMAGE`).
        tolerances: the number of keypoints that the evaluation has one for (`TEST.KEYPOINT_OKS_SIGMAS`).
        semantic: a class for each pixel, and no objects.
        drops_empty: images without objects are left out of training (`DATALOADER.FILTER_EMPTY_ANNOTATIONS`).
        max_size_train: pixels that the longer side of an image is reduced to in training (`INPUT.MAX_SIZE_TRAIN`).
        max_size_test: the same in evaluation.
    """

    classes: int
    key: str = CLASS_KEYS["GeneralizedRCNN"]
    masks: bool = False
    polygons: bool = False
    keypoints: int = 0
    least_keypoints: int = 1
    tolerances: int = COCO_KEYPOINTS
    semantic: bool = False
    drops_empty: bool = True
    max_size_train: int = field(default=1333, compare=False)
    max_size_test: int = field(default=1333, compare=False)


def class_key(config: CfgNode) -> str:
    """The config key of the number of classes.

    Raises:
        UserError: the architecture is not one that the recipes use.
    """
    architecture = config.MODEL.META_ARCHITECTURE
    if architecture not in CLASS_KEYS:
        raise UserError(f"MODEL.META_ARCHITECTURE must be one of {', '.join(CLASS_KEYS)}, not {architecture!r}")
    return CLASS_KEYS[architecture]


def set_classes(config: CfgNode, classes: int) -> None:
    """Set the number of classes of the config's architecture.

    Raises:
        UserError: the architecture is not one that the recipes use.
    """
    config.merge_from_list([class_key(config), classes])


def requirements_of(config: CfgNode) -> Requirements:
    """What the model of a config requires of its datasets.

    Raises:
        UserError: the architecture is not one that the recipes use.
    """
    key = class_key(config)
    architecture = config.MODEL.META_ARCHITECTURE
    regions = architecture == "GeneralizedRCNN"
    masks = regions and config.MODEL.MASK_ON
    return Requirements(
        classes=value_of(config, key),
        key=key,
        masks=masks,
        polygons=masks and config.INPUT.MASK_FORMAT == "polygon",
        keypoints=config.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if regions and config.MODEL.KEYPOINT_ON else 0,
        least_keypoints=config.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE,
        tolerances=len(config.TEST.KEYPOINT_OKS_SIGMAS) or COCO_KEYPOINTS,
        semantic=architecture == "SemanticSegmentor",
        drops_empty=config.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        max_size_train=config.INPUT.MAX_SIZE_TRAIN,
        max_size_test=config.INPUT.MAX_SIZE_TEST,
    )
