"""Annotations and what a model finds, as overlays to draw on photographs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from fvcore.common.config import CfgNode
from numpy.typing import NDArray
from pycocotools import mask as coco_masks

from detection.data import datasets
from detection.data.labels import read_labels
from detection.data.masks import encode_regions
from detection.data.requirements import requirements_of
from foundation.canvas import FAINT, Overlay, Point, class_colours
from foundation.errors import UserError

LEAST_KEYPOINT_SCORE = 0.05  # of a keypoint that is drawn; Detectron2's visualizer has the same
BACKGROUND = "background"
LEAST_REGION = 0.002  # of the image, for a region to be drawn


@dataclass(frozen=True)
class Classes:
    """What the classes of a model are called.

    Attributes:
        names: of its classes, in its order.
        ids: their category ids in COCO results.
        limbs: pairs of keypoints, by index, to join by a line.
    """

    names: Sequence[str]
    ids: Sequence[int]
    limbs: Sequence[tuple[int, int]] = field(default=())

    @property
    def colours(self) -> dict[int, str]:
        """A colour for each class."""
        return class_colours(range(len(self.names)))


def classes_of(config: CfgNode, categories: Sequence[Mapping[str, Any]] | None = None) -> Classes:
    """What the model's classes are called: as its run has noted, or as in its training set, else as in its test set.

    Args:
        config: of the model.
        categories: of a COCO file, in the order of their ids, which gives the ids: by the names of the classes, or in
            their order where all names are others.

    Raises:
        UserError: there are more or fewer categories than the model has classes, or some have other names.
    """
    name, count = config.DATASETS.TRAIN[0], requirements_of(config).classes
    names = datasets.class_names(config)
    if categories is not None:
        if len(categories) != count:
            raise UserError(
                f"--annotations has {len(categories)} categories, but the model has {count} classes; name a file with"
                " the classes of the training"
            )
        by_name = {each["name"]: each["id"] for each in categories}
        if set(names) == set(by_name):
            ids = [by_name[each] for each in names]
        elif shared := set(names) & set(by_name):  # the order of the others would be a guess
            other = ", ".join(repr(each) for each in sorted(set(by_name) - shared)[:3])
            raise UserError(f"--annotations has categories that are not the model's classes: {other}; name them alike")
        else:
            names, ids = [each["name"] for each in categories], [each["id"] for each in categories]
    else:
        known = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id", {})
        order = {index: identity for identity, index in known.items()}
        ids = [order.get(index, index + 1) for index in range(count)]
    metadata = MetadataCatalog.get(name)
    joints = {joint: index for index, joint in enumerate(metadata.get("keypoint_names") or ())}
    rules = metadata.get("keypoint_connection_rules") or ()
    return Classes(names, ids, [(joints[a], joints[b]) for a, b, _ in rules if a in joints and b in joints])


def detected(output: Mapping[str, Any], classes: Classes, thresholds: Sequence[float]) -> list[Overlay]:
    """The detections with at least the threshold of their class; the highest-scoring last, on top.

    Args:
        output: of Detectron2's models, on the CPU: `instances`, or `sem_seg` (C, H, W).
        classes: of the model.
        thresholds: a score for each class.
    """
    if "instances" not in output:
        return regions(output["sem_seg"].argmax(dim=0).numpy(), classes)
    found, colours = output["instances"], classes.colours
    found = found[found.scores >= found.scores.new_tensor(thresholds)[found.pred_classes]]
    masks = found.pred_masks.numpy().astype("uint8") if found.has("pred_masks") else [None] * len(found)
    joints = found.pred_keypoints.tolist() if found.has("pred_keypoints") else [[]] * len(found)
    overlays = []
    for box, mask, kind, score, spots in zip(
        found.pred_boxes.tensor.tolist(), masks, found.pred_classes.tolist(), found.scores.tolist(), joints, strict=True
    ):
        points, limbs = _skeleton(spots, classes, LEAST_KEYPOINT_SCORE)
        overlays.append(Overlay(tuple(box), mask, classes.names[kind], colours[kind], points, limbs, score))
    return overlays[::-1]


def mapped(record: Mapping[str, Any], classes: Classes) -> list[Overlay]:
    """The objects or labels of a training image, after augmentation.

    Args:
        record: as the model gets it, with `instances` or `sem_seg` (H, W).
        classes: of the model.
    """
    if "instances" not in record:
        return regions(record["sem_seg"].numpy(), classes)
    instances, colours = record["instances"], classes.colours
    kinds, boxes = instances.gt_classes.tolist(), instances.gt_boxes.tensor.tolist()
    keypoints = instances.gt_keypoints.tensor.tolist() if instances.has("gt_keypoints") else [[]] * len(boxes)
    masks: Sequence[NDArray[np.uint8] | None] = [None] * len(boxes)
    if instances.has("gt_masks"):
        masks = _bitmaps(instances.gt_masks, *instances.image_size)
    overlays = []
    for kind, box, mask, spots in zip(kinds, boxes, masks, keypoints, strict=True):
        overlays.append(Overlay(tuple(box), mask, classes.names[kind], colours[kind], *_skeleton(spots, classes, 0)))
    return overlays


def annotated(
    record: Mapping[str, Any], size: tuple[int, int], names: Sequence[str], classes: Classes
) -> list[Overlay]:
    """The annotations of an evaluation image, in its own pixels, without crowds.

    Args:
        record: of Detectron2's, with `annotations` or `sem_seg_file_name`.
        size: height and width of the image.
        names: of the dataset's classes, in its order.
        classes: of the model, which gives the colours.
    """
    if "sem_seg_file_name" in record:
        return regions(read_labels(Path(record["sem_seg_file_name"])), classes)
    overlays, colours = [], dict(zip(classes.names, classes.colours.values(), strict=True))
    for each in record.get("annotations", ()):
        if each.get("iscrowd"):
            continue
        name = names[each["category_id"]]
        shape, points = each.get("segmentation"), torch.tensor(each.get("keypoints", ())).reshape(-1, 3).tolist()
        mask = coco_masks.decode(encode_regions(shape, *size)) if shape else None
        box = BoxMode.convert(each["bbox"], each["bbox_mode"], BoxMode.XYXY_ABS)
        overlays.append(Overlay(tuple(box), mask, name, colours.get(name, FAINT), *_skeleton(points, classes, 0)))
    return overlays


def highest_score(output: Mapping[str, Any]) -> float:
    """The highest score of any detection; 0 without one."""
    scores = output["instances"].scores.tolist() if "instances" in output else []
    return float(max(scores, default=0.0))


def _skeleton(
    spots: Sequence[Sequence[float]], classes: Classes, least: float
) -> tuple[tuple[Point, ...], tuple[tuple[Point, Point], ...]]:
    """The keypoints whose third value, a score or visibility, is above `least`, and the lines between them."""
    seen: dict[int, Point] = {i: (x, y) for i, (x, y, certainty) in enumerate(spots) if certainty > least}
    limbs = tuple((seen[a], seen[b]) for a, b in classes.limbs if a in seen and b in seen)
    return tuple(seen.values()), limbs


def _bitmaps(masks: PolygonMasks | BitMasks, height: int, width: int) -> list[NDArray[np.uint8]]:
    if isinstance(masks, BitMasks):
        return list(masks.tensor.numpy().astype(np.uint8))
    return [polygons_to_bitmask(polygons, height, width).astype(np.uint8) for polygons in masks.polygons]


def regions(labels: NDArray[Any], classes: Classes) -> list[Overlay]:
    """Each class of the labels (H, W), the largest region first; not VOC's background, nor labels that are ignored."""
    colours = classes.colours
    present = [kind for kind in np.unique(labels).tolist() if kind < len(classes.names)]
    masks = {kind: (labels == kind).astype(np.uint8) for kind in present if classes.names[kind] != BACKGROUND}
    large = {kind: mask for kind, mask in masks.items() if mask.mean() >= LEAST_REGION}
    order = sorted(large, key=lambda kind: -int(large[kind].sum()))
    return [Overlay(None, large[kind], classes.names[kind], colours[kind]) for kind in order]
