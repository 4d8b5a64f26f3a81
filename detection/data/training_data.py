"""What a config trains on: the records of its images, how they are read, and the batches of one process."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from detectron2.data import DatasetFromList, DatasetMapper, detection_utils, get_detection_dataset_dicts, transforms
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from fvcore.common.config import CfgNode

from detection.data import datasets, loading
from detection.data.copy_paste import CopyPaste
from detection.data.labels import check_labels, read_labels, to_resizable
from detection.data.polygons import RegionPolygons
from foundation.errors import UserError
from foundation.images import UnreadableImage, read_rgb


@dataclass(frozen=True)
class TrainingSet:
    """Records, packed into bytes that the workers share, and what the order of the images is made of.

    Attributes:
        records: by index.
        order: begins the endless sequence of indices that belongs to a seed.
        wide: for each image, whether it is wider than high, where batches do not mix the two; else None.
    """

    records: DatasetFromList
    order: Callable[[int], Iterator[int]]
    wide: list[bool] | None


class ImageMapper(DatasetMapper):
    """Detectron2's mapper of images with objects, with this project's image decoder instead of Detectron2's.

    A 16-bit or floating-point image is so scaled in the same way in pretraining, training, evaluation and prediction.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """The arguments that a config stands for: Detectron2's, with large-scale jitter (`INPUT.LSJ`) if enabled."""
        arguments: dict[str, Any] = super().from_config(cfg, is_train)
        jitter = cfg.INPUT.LSJ
        if is_train and jitter.ENABLED:
            _, *flip = arguments["augmentations"]
            square = (jitter.SIZE, jitter.SIZE)
            resize = transforms.ResizeScale(jitter.MIN_SCALE, jitter.MAX_SCALE, *square)
            arguments["augmentations"] = [resize, crop_to(square), *flip]
            arguments["recompute_boxes"] = cfg.MODEL.MASK_ON
        elif is_train and cfg.INPUT.CROP.ENABLED:
            arguments["augmentations"][0] = random_crop(cfg)
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """The record with `image` (3, H, W) uint8, and in training with `instances`.

        Raises:
            UserError: the image cannot be decoded, or has another size than its record.
        """
        record = copy.deepcopy(dataset_dict)
        seen = transforms.AugInput(read_image(record, self.image_format))
        applied = self.augmentations(seen)
        record["image"] = _to_tensor(seen.image)
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, applied, seen.image.shape[:2])
        return record

    def _transform_annotations(
        self, record: dict[str, Any], applied: transforms.Transform, size: tuple[int, int]
    ) -> None:
        """Put `instances` in the place of `annotations`, with polygons that are rasterised for all regions at once.

        Detectron2's own fails where boxes are recomputed from the masks of an image without objects.
        """
        if self.recompute_boxes and all(each.get("iscrowd", 0) for each in record["annotations"]):
            record.pop("annotations")
            record["instances"] = no_objects(size, self.instance_mask_format)
        else:
            super()._transform_annotations(record, applied + WritableMasks(), size)
            instances = record["instances"]
            if isinstance(instances.get_fields().get("gt_masks"), PolygonMasks):
                instances.gt_masks = RegionPolygons(instances.gt_masks.polygons)


def crop_to(size: tuple[int, int]) -> transforms.FixedSizeCrop:
    """Detectron2's crop to a height and width, which pads smaller images, and their masks with 0.

    Its main branch pads masks with 255 unless told otherwise, which would make the padding a part of each object.
    """
    named = inspect.signature(transforms.FixedSizeCrop).parameters
    return transforms.FixedSizeCrop(size, **({"seg_pad_value": 0} if "seg_pad_value" in named else {}))


def random_crop(config: CfgNode) -> transforms.RandomCrop:
    """The crop that `INPUT.CROP` describes, bounded by the image.

    The key's default are fractions, so that a config has pixels as floats too, with which Detectron2 cannot crop.
    """
    kind, size = config.INPUT.CROP.TYPE, config.INPUT.CROP.SIZE
    return transforms.RandomCrop(kind, [int(side) for side in size] if kind.startswith("absolute") else size)


class WritableMasks(transforms.NoOpTransform):
    """The last transform of masks. Pillow's resizing gives arrays that cannot be written to, of which PyTorch warns."""

    def apply_segmentation(self, segmentation: numpy.ndarray) -> numpy.ndarray:
        """The mask, copied if it cannot be written to."""
        return segmentation if segmentation.flags.writeable else segmentation.copy()


def no_objects(size: tuple[int, int], mask_format: str) -> Instances:
    """What an image without objects has of an image with some: boxes, classes and masks ("polygon" or "bitmask")."""
    instances = Instances(size, gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.int64))
    empty = PolygonMasks([]) if mask_format == "polygon" else BitMasks(torch.zeros(0, *size))
    instances.gt_masks = empty
    return instances


class LabelMapper:
    """Turns a record of an image and its labels into what a model of semantic segmentation trains on.

    It differs from Detectron2's mapper in two more ways. Labels are read as they are, where Detectron2 converts them to
    grey levels first, which turns the palette of VOC's labels into other numbers. And the crop is taken from the
    resized image, not from the original one.
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
            UserError: a label is not a class, a file cannot be read, or the image has another size than its record.
        """
        record = copy.deepcopy(record)
        path = Path(record.pop("sem_seg_file_name"))
        image = read_image(record, self.image_format)
        labels = read_labels(path)
        check_labels(labels, path, self.classes, self.ignored)
        both = transforms.AugInput(image, sem_seg=to_resizable(labels))
        self.augmentations(both)
        record["image"] = _to_tensor(both.image)
        record["sem_seg"] = torch.from_numpy(both.sem_seg.astype(numpy.int64))
        return record


def read(config: CfgNode) -> TrainingSet:
    """The training set of a config. The records as Python objects, gigabytes for COCO, are released here."""
    records = training_images(config)
    loader = config.DATALOADER
    order: Callable[[int], Iterator[int]] = functools.partial(loading.shuffled, len(records))
    if loader.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        count = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
        root = {"sqrt": loader.REPEAT_SQRT} if "REPEAT_SQRT" in loader else {}  # v0.6 always takes it
        order = functools.partial(loading.repeated, count(records, loader.REPEAT_THRESHOLD, **root).tolist())
    wide = loading.are_wide(records) if loader.ASPECT_RATIO_GROUPING else None
    return TrainingSet(DatasetFromList(records, copy=False), order, wide)


def training_images(config: CfgNode) -> list[dict[str, Any]]:
    """Detectron2's records of the training images, or of `DATASETS.FRACTION` of them."""
    head = config.MODEL.ROI_KEYPOINT_HEAD
    records = get_detection_dataset_dicts(
        config.DATASETS.TRAIN,
        filter_empty=config.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=head.MIN_KEYPOINTS_PER_IMAGE if config.MODEL.KEYPOINT_ON else 0,
    )
    if config.DATASETS.FRACTION == 1:
        return records
    chosen = datasets.subset(len(records), config.DATASETS.FRACTION, config.DATASETS.FRACTION_SEED)
    return [records[index] for index in chosen]


def build_batches(
    config: CfgNode, images: TrainingSet, process_batch: loading.ProcessBatch, seed: int, workers: int
) -> loading.TrainingBatches:
    """The batches that this process gets of the training set."""
    size = config.SOLVER.IMS_PER_BATCH // (process_batch.processes * process_batch.passes)
    mapper: Callable[[dict[str, Any]], dict[str, Any]] = training_mapper(config)
    if config.INPUT.LSJ.COPY_PASTE:
        mapper = CopyPaste(mapper, images.records)
    return loading.TrainingBatches(
        images.records,
        mapper,
        lambda: loading.group(images.order(seed), size, images.wide),
        process_batch,
        seed=seed,
        workers=workers,
        device=torch.device(config.MODEL.DEVICE),
    )


def training_mapper(config: CfgNode) -> LabelMapper | ImageMapper:
    """The mapper for a config's training images.

    Of semantic segmentation it resizes the shorter side as `INPUT.MIN_SIZE_TRAIN` says, crops if `INPUT.CROP` is
    enabled, and flips; else it is as in Detectron2.
    """
    if config.MODEL.META_ARCHITECTURE != "SemanticSegmentor":
        return ImageMapper(config, is_train=True)
    resize, *flip = detection_utils.build_augmentation(config, is_train=True)
    crop = [random_crop(config)] if config.INPUT.CROP.ENABLED else []
    head = config.MODEL.SEM_SEG_HEAD
    return LabelMapper([resize, *crop, *flip], config.INPUT.FORMAT, head.NUM_CLASSES, head.IGNORE_VALUE)


def evaluation_mapper(config: CfgNode) -> ImageMapper:
    """The mapper for the images that a config is evaluated on: resized as `INPUT.MIN_SIZE_TEST` says."""
    augmentations = detection_utils.build_augmentation(config, is_train=False)
    return ImageMapper(is_train=False, augmentations=augmentations, image_format=config.INPUT.FORMAT)


def read_image(record: dict[str, Any], image_format: str) -> numpy.ndarray:
    """The image of a record, (H, W, 3) uint8 in the order of colours `image_format`, RGB or BGR.

    Raises:
        UserError: the file cannot be decoded, or has another size than the record.
    """
    try:
        pixels = read_rgb(Path(record["file_name"]))
        detection_utils.check_image_size(record, pixels)
    except (UnreadableImage, detection_utils.SizeMismatchError) as error:
        raise UserError(f"{error}; replace {record['file_name']}, or take it out of the annotations") from error
    return pixels[:, :, ::-1] if image_format == "BGR" else pixels


def _to_tensor(image: numpy.ndarray) -> torch.Tensor:
    return torch.from_numpy(numpy.ascontiguousarray(image.transpose(2, 0, 1)))
