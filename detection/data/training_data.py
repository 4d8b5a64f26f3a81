"""What a config trains on: the records of its images, and the batches of one process."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from detectron2.data import DatasetFromList, DatasetMapper, get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler
from fvcore.common.config import CfgNode

from detection.data import datasets, loading
from detection.training import semantic


@dataclass(frozen=True)
class TrainingSet:
    """Records, packed into bytes that the workers share, and what the order of the images is made of.

    Attributes:
        records: by index.
        order: begins the endless sequence of indices that belongs to a seed.
        kinds: for each image, which of the two kinds it is that batches do not mix; None if they may.
    """

    records: DatasetFromList
    order: Callable[[int], Iterator[int]]
    kinds: list[bool] | None


def read(config: CfgNode) -> TrainingSet:
    """The training set of a config. The records as Python objects, gigabytes for COCO, are given up here."""
    records = training_images(config)
    loader = config.DATALOADER
    order: Callable[[int], Iterator[int]] = functools.partial(loading.shuffled, len(records))
    if loader.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        count = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
        root = {"sqrt": loader.REPEAT_SQRT} if "REPEAT_SQRT" in loader else {}  # v0.6 always takes it
        order = functools.partial(loading.repeated, count(records, loader.REPEAT_THRESHOLD, **root).tolist())
    kinds = loading.are_wide(records) if loader.ASPECT_RATIO_GROUPING else None
    return TrainingSet(DatasetFromList(records, copy=False), order, kinds)


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
    config: CfgNode, images: TrainingSet, share: loading.Share, seed: int, workers: int
) -> loading.TrainingBatches:
    """The batches that this process gets of the training set."""
    size = config.SOLVER.IMS_PER_BATCH // (share.processes * share.passes)
    return loading.TrainingBatches(
        images.records,
        semantic.training_mapper(config) or DatasetMapper(config, is_train=True),
        lambda: loading.group(images.order(seed), size, images.kinds),
        share,
        seed=seed,
        workers=workers,
    )
