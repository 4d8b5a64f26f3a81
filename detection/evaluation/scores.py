"""COCO's scores of a list of detections: by faster-coco-eval where it is installed, else by pycocotools.

Both give the same numbers. Detections are dicts in COCO's results format, `dataset` is what the annotations' JSON
file holds. Nothing that is passed in is changed.

Images and categories are numbered from 1 for the evaluation: the libraries fail on ids that are text, or too large for
a float64. IoUs of boxes and masks are pycocotools' in both cases, computed once for all classes of an image, since the
analysis of errors needs them too; faster-coco-eval would decode each mask twice and encode it once to compare it.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_masks

from detection.data.masks import encode_regions
from detection.evaluation.operating_points import Compared
from foundation.coco_ids import id_order
from foundation.errors import UserError

logger = logging.getLogger(__name__)

SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KEYPOINT_SUMMARY = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
MASKS_AT_ONCE = 255  # of which pycocotools gives the areas; of more it fails with NumPy 2
COMPARED_KEYS = {"bbox": ("bbox",), "segm": ("segmentation",), "keypoints": ("bbox", "keypoints")}


class Libraries(NamedTuple):
    """The classes for annotations and for their evaluation, and the latter's further arguments."""

    annotations: Any
    evaluation: Any
    options: dict[str, Any]


@functools.cache
def libraries() -> Libraries:
    """The faster library, or pycocotools and one line in the log."""
    if importlib.util.find_spec("faster_coco_eval") is not None:
        fast = importlib.import_module("faster_coco_eval")
        return Libraries(fast.COCO, fast.COCOeval_faster, {"print_function": logger.debug})
    logger.warning(
        "faster-coco-eval is not installed: COCO AP is computed by pycocotools, with the same result, slower"
    )
    coco = importlib.import_module("pycocotools.coco").COCO
    # pycocotools' own summary assumes 100 detections an image; Detectron2's class takes any number of them.
    return Libraries(coco, importlib.import_module("detectron2.evaluation.coco_evaluation").COCOevalMaxDets, {})


def score(
    dataset: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    task: str,
    limits: Sequence[int] = (1, 10, 100),
    image_ids: Sequence[Any] | None = None,
    sigmas: Sequence[float] = (),
) -> Any:
    """An evaluation in pycocotools' form, with `stats` and `eval`; without detections too.

    Of boxes and masks it also has `compared`: `Compared`, by the number of the image, with as many detections as count.
    Images and categories are numbered in the order of their ids, from 1, and the classes in `Compared` from 0.

    Args:
        dataset: images, annotations and categories; ids may be numbers or text.
        results: detections, with the ids of `dataset`. Those of other categories are left out.
        task: bbox, segm or keypoints.
        limits: detections of a class in an image that count, for AR1, AR10 and all else. Keypoints: 20, always.
        image_ids: the images that count; by default all.
        sigmas: of the keypoints, if they are not COCO's 17.

    Raises:
        UserError: the number of keypoints is not that of the sigmas.
    """
    library = libraries()
    # In the order of the ids, which decides between equal scores of different images, as in pycocotools.
    images = {identity: n for n, identity in enumerate(sorted((i["id"] for i in dataset["images"]), key=id_order), 1)}
    ordered = sorted(dataset["categories"], key=lambda each: id_order(each["id"]))
    categories = {each["id"]: number for number, each in enumerate(ordered, 1)}
    numbered = {
        "images": [{**each, "id": images[each["id"]]} for each in dataset["images"]],
        "categories": [{**each, "id": categories[each["id"]]} for each in ordered],
    }
    ground_truth = objects(dataset["annotations"])
    for entry in ground_truth:
        entry.update(image_id=images[entry["image_id"]], category_id=categories[entry["category_id"]])
    known = [each for each in results if each["category_id"] in categories]
    detections = complete_detections(known, task, images, categories)
    if task == "segm":
        encode_masks(ground_truth, numbered["images"])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        both = [_index(library, numbered, entries) for entries in (ground_truth, detections)]
        evaluation = library.evaluation(*both, task, **library.options)
        evaluation.params.catIds = list(categories.values())
        if image_ids is not None:
            evaluation.params.imgIds = [images[identity] for identity in image_ids]
        if task == "keypoints":
            _set_sigmas(evaluation.params, sigmas, ground_truth)
        else:
            evaluation.params.maxDets = list(limits)
            _compare(evaluation, COMPARED_KEYS[task][0])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    if said.getvalue():  # pycocotools prints
        logger.debug("%s", said.getvalue())
    return evaluation


def objects(annotations: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The annotations, with the fields that both libraries require and custom data may lack, numbered from 1.

    For pycocotools an object with the id 0 cannot be found by any detection.
    """
    return [
        {"iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3], **entry, "id": number}
        for number, entry in enumerate(annotations, 1)
    ]


def complete_detections(
    results: Sequence[Mapping[str, Any]], task: str, images: Mapping[Any, int], categories: Mapping[Any, int]
) -> list[dict[str, Any]]:
    """The results as annotations with an id and an area: of the mask, where masks are compared.

    Args:
        results: detections.
        task: what is compared.
        images, categories: their numbers, by their ids.
    """
    areas: Iterable[float]
    if task == "segm":
        codes = [entry["segmentation"] for entry in results]
        groups = (codes[first : first + MASKS_AT_ONCE] for first in range(0, len(codes), MASKS_AT_ONCE))
        areas = (float(area) for group in groups for area in coco_masks.area(group).tolist())
    else:
        areas = (entry["bbox"][2] * entry["bbox"][3] for entry in results)
    keys = COMPARED_KEYS[task]
    return [
        {
            "id": number,
            "image_id": images[entry["image_id"]],
            "category_id": categories[entry["category_id"]],
            "score": entry["score"],
            "area": area,
            "iscrowd": 0,
            **{key: entry[key] for key in keys},
        }
        for number, (entry, area) in enumerate(zip(results, areas, strict=True), 1)
    ]


def encode_masks(annotations: Iterable[dict[str, Any]], images: Iterable[Mapping[str, Any]]) -> None:
    """Replace the masks of objects by COCO's compressed run-length codes.

    Polygons of fewer than 3 points are left out. An object without a mask gets an empty one, a crowd its box: what is
    detected there is not counted.

    Args:
        annotations: of objects, changed in place.
        images: with their id, height and width.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    for entry in annotations:
        regions = entry.get("segmentation")
        if regions is None:
            regions = [_corners(entry["bbox"])] if entry["iscrowd"] else []
        entry["segmentation"] = encode_regions(regions, *sizes[entry["image_id"]])


def highest_scoring(detections: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The detections of one image, the highest score first, at most `limit` of each category."""
    ordered = sorted(detections, key=lambda entry: -entry["score"])
    if len(ordered) <= limit:
        return ordered
    seen: Counter[int] = Counter()
    kept = []
    for entry in ordered:
        seen[entry["category_id"]] += 1
        if seen[entry["category_id"]] <= limit:
            kept.append(entry)
    return kept


def encode(masks: torch.Tensor) -> list[dict[str, Any]]:
    """COCO's compressed run-length code of each mask: the bytes of pycocotools' `encode`, for all of an image at once.

    A code lists how long the mask stays at 0 and at 1 in turns, column by column. So only the places where a mask
    changes from a pixel to the one below are needed. They are few, and found where the masks lie: of masks on a GPU
    only these are copied to the host.

    Args:
        masks: (N, H, W) bool, on any device.

    Returns:
        For each mask `size`, height and width, and `counts`, text.
    """
    count, height, width = masks.shape
    if count == 0:
        return []
    pixels = height * width
    places = _changes(masks).numpy()
    starts = np.searchsorted(places, np.arange(count + 1) * pixels)
    runs = [
        {"size": [height, width], "counts": np.diff(places[a:b] - first, prepend=0, append=pixels).tolist()}
        for first, a, b in zip(np.arange(count) * pixels, starts[:-1], starts[1:], strict=True)
    ]
    codes = coco_masks.frPyObjects(runs, height, width)
    return [{"size": code["size"], "counts": code["counts"].decode()} for code in codes]


def _changes(masks: torch.Tensor) -> torch.Tensor:
    """Where a pixel differs from the one before it, in ascending order, on the CPU.

    Pixels are numbered down the columns, from column to column and from mask to mask. Before the first of a mask there
    is a 0.
    """
    _, height, width = masks.shape
    changes = torch.empty_like(masks, memory_format=torch.contiguous_format)
    torch.bitwise_xor(masks[:, 1:], masks[:, :-1], out=changes[:, 1:])
    torch.bitwise_xor(masks[:, 0, 1:], masks[:, -1, :-1], out=changes[:, 0, 1:])
    changes[:, 0, 0] = masks[:, 0, 0]
    if changes.device.type == "cpu":  # where NumPy is four times as fast
        places = torch.from_numpy(np.flatnonzero(changes.numpy()))
    else:
        places = changes.flatten().nonzero().flatten().cpu()
    row, column = places // width % height, places % width
    columns = places // (height * width) * width + column
    return (columns * height + row).sort().values


def _corners(box: Sequence[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _index(library: Libraries, dataset: Mapping[str, Any], entries: list[dict[str, Any]]) -> Any:
    indexed = library.annotations()
    indexed.dataset = {**dataset, "annotations": entries}
    indexed.createIndex()
    return indexed


def _compare(evaluation: Any, key: str) -> None:
    """Compute all IoUs, and have the evaluation take those of each image and category from them."""
    evaluation.compared = {}
    of_category = {}
    for image in evaluation.params.imgIds:
        ground_truth = evaluation.cocoGt.imgToAnns[image]
        detections = highest_scoring(evaluation.cocoDt.imgToAnns[image], max(evaluation.params.maxDets))
        regions = [[entry[key] for entry in entries] for entries in (detections, ground_truth)]
        crowd = [entry["iscrowd"] for entry in ground_truth]
        ious = np.reshape(coco_masks.iou(*regions, crowd), (len(detections), len(ground_truth)))
        ours, theirs = ([entry["category_id"] for entry in entries] for entries in (detections, ground_truth))
        numbers = [np.array(categories, int) for categories in (ours, theirs)]
        for category in set(ours) & set(theirs):
            of_category[image, category] = ious[numbers[0] == category][:, numbers[1] == category]
        found = np.array([entry["score"] for entry in detections], float)
        evaluation.compared[image] = Compared(ious, found, numbers[0] - 1, numbers[1] - 1, np.array(crowd, bool))
    evaluation.params.compute_rle = False  # faster-coco-eval would, to compare them
    evaluation.computeIoU = lambda image, category: of_category.get((image, category), [])


def _set_sigmas(params: Any, sigmas: Sequence[float], ground_truth: Sequence[Mapping[str, Any]]) -> None:
    if sigmas:
        params.kpt_oks_sigmas = np.array(sigmas)
    counts = {len(entry["keypoints"]) // 3 for entry in ground_truth if entry.get("keypoints")}
    points = max(counts, default=len(params.kpt_oks_sigmas))
    if points != len(params.kpt_oks_sigmas):
        raise UserError(
            f"the annotations have {points} keypoints, but TEST.KEYPOINT_OKS_SIGMAS is for"
            f" {len(params.kpt_oks_sigmas)}: give a number for each"
        )
    for entry in ground_truth:  # crowds may have none
        if not entry.get("keypoints"):
            entry.update(keypoints=[0] * 3 * points, num_keypoints=0)  # type: ignore[attr-defined]
