"""Held-out scenes with what was there and what each detector found, side by side."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from foundation.canvas import Overlay, class_colours, compose_sheet, draw_cell
from foundation.errors import UserError
from reporting.groups import Group, Setting

PREDICTIONS = "coco_instances_results.json"
ROWS = 5
MIN_SCORE = 0.5
LEAST_VISIBLE = 0.05  # of a keypoint to be drawn, as in Detectron2's visualizer
MATCH_IOU = 0.5  # of boxes of the same class, for an object to count as found


@dataclass(frozen=True)
class Truth:
    """A dataset in COCO's format: images and annotations by image id; by category, its name and the pairs of
    keypoints, counted from 0, that belong together.
    """

    image_root: Path
    images: Mapping[int, Mapping[str, Any]]
    annotations: Mapping[int, Sequence[Mapping[str, Any]]]
    names: Mapping[int, str]
    skeletons: Mapping[int, Sequence[tuple[int, int]]]


def obstacle(setting: Setting) -> str | None:
    """Why the scenes of a detection setting cannot be drawn; None if they can."""
    if not _shown(setting):
        return f"no picture of scenes, since no run has its {PREDICTIONS}."
    for path in _dataset(setting):
        if not path.exists():
            return f"no picture of scenes, since {path} is not on this machine."
    return None


def draw_predictions(setting: Setting, colours: Mapping[str, str], path: Path) -> str:
    """Draw the scenes of a detection setting: a row each, a column for the truth and one for each group.

    Returns:
        What is to be seen, with the rule that chose it.

    Raises:
        UserError: annotations or predictions are damaged, or an image is missing.
    """
    shown = _shown(setting)
    truth = _read_truth(*_dataset(setting))
    chosen = evenly_spaced(sorted(truth.images), ROWS)
    fills = class_colours(truth.names)
    rows = [[_truth_cell(truth, identity, fills)] for identity in chosen]
    for _, file in shown:
        found = _read_predictions(file, chosen)
        for row, identity in zip(rows, chosen, strict=True):
            row.append(_prediction_cell(truth, identity, found[identity], file, fills))
    titles = [("ground truth", "#1a1a1a")] + [(group.label, colours[group.label]) for group, _ in shown]
    compose_sheet(titles, rows, [f"image {identity}" for identity in chosen]).save(path, optimize=True)
    return _caption(truth, [group for group, _ in shown])


def evenly_spaced(ids: Sequence[int], count: int) -> list[int]:
    """`count` of the ids, from the middles of as many equal parts; all of them where there are no more."""
    if len(ids) <= count:
        return list(ids)
    return [ids[int((part + 0.5) * len(ids) / count)] for part in range(count)]


def _caption(truth: Truth, groups: Sequence[Group]) -> str:
    seeds = ", ".join(f"{group.label}: seed {group.runs[0].seed}" for group in groups)
    return (
        f"Held-out scenes, not chosen by eye: they are evenly spaced among the {len(truth.images)} of the"
        " evaluation set, in the order of their ids. Each detector is the run with the lowest seed"
        f" ({seeds}); detections that score {MIN_SCORE:g} or more are shown. An object counts as found when a"
        f" detection of its class overlaps its box with an IoU of {MATCH_IOU:g} or more; detections without"
        " an object are false."
    )


def _shown(setting: Setting) -> list[tuple[Group, Path]]:
    """The groups whose first run has its predictions, with their file."""
    files = [(group, sorted(group.runs[0].path.rglob(PREDICTIONS))) for group in setting.groups]
    return [(group, found[0]) for group, found in files if found]


def _dataset(setting: Setting) -> tuple[Path, Path]:
    """The annotation file and the folder of images, as the first run has them."""
    run = setting.groups[0].runs[0]
    dataset = run.results.get("dataset")
    if not isinstance(dataset, dict) or not {"annotations", "image_root"} <= dataset.keys():
        raise UserError(f"{run.path / 'results.json'}: dataset must name its annotations and its image_root")
    return Path(str(dataset["annotations"])), Path(str(dataset["image_root"]))


def _read_truth(path: Path, image_root: Path) -> Truth:
    content = _read_json(path)
    try:
        annotations: dict[int, list[Mapping[str, Any]]] = {}
        for annotation in content["annotations"]:
            annotations.setdefault(annotation["image_id"], []).append(annotation)
        images = {image["id"]: image for image in content["images"]}
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        skeletons = {
            category["id"]: [(a - 1, b - 1) for a, b in category.get("skeleton", ())]
            for category in content["categories"]
        }
        if not images or not {each["category_id"] for each in content["annotations"]} <= names.keys():
            raise UserError(f"{path} has no images, or an annotation of a category that it does not list")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not in COCO's format: {error!r}") from error
    return Truth(image_root, images, annotations, names, skeletons)


def _read_predictions(path: Path, ids: Sequence[int]) -> dict[int, list[Mapping[str, Any]]]:
    """The detections to show of these images, the most certain last, so that it is drawn on top."""
    by_image: dict[int, list[Mapping[str, Any]]] = {identity: [] for identity in ids}
    try:
        for detection in _read_json(path):
            if detection["image_id"] in by_image and detection["score"] >= MIN_SCORE:
                by_image[detection["image_id"]].append(detection)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold COCO results: {error!r}") from error
    return {i: sorted(found, key=lambda each: float(each["score"])) for i, found in by_image.items()}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error})") from error


def _truth_cell(truth: Truth, identity: int, fills: Mapping[int, str]) -> Image.Image:
    objects = truth.annotations.get(identity, [])
    overlays = [_overlay(truth, identity, each, truth.names[each["category_id"]], fills) for each in objects]
    count = f"{len(overlays)} object{'' if len(overlays) == 1 else 's'}"
    return draw_cell(_open(truth, identity), overlays, count)


def _prediction_cell(
    truth: Truth, identity: int, found: Sequence[Mapping[str, Any]], source: Path, fills: Mapping[int, str]
) -> Image.Image:
    unknown = {each["category_id"] for each in found} - truth.names.keys()
    if unknown:
        raise UserError(f"{source}: the dataset has no category {min(unknown)}; these are another dataset's results")
    overlays = [
        _overlay(truth, identity, each, f"{truth.names[each['category_id']]} {each['score']:.2f}", fills)
        for each in found
    ]
    objects = truth.annotations.get(identity, [])
    matched = count_found(objects, found)
    note = f"{matched} of {len(objects)} found, {len(found) - matched} false"
    return draw_cell(_open(truth, identity), overlays, note)


def count_found(objects: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> int:
    """How many objects have a detection of their class on them; each counts once, the surest first."""
    left = list(objects)
    for detection in sorted(found, key=lambda each: -float(each["score"])):
        same = [each for each in left if each["category_id"] == detection["category_id"]]
        if not same:
            continue
        boxes = np.array([each["bbox"] for each in same], dtype=np.float64)
        overlaps = coco_mask.iou(np.array([detection["bbox"]], dtype=np.float64), boxes, [0] * len(same))[0]
        if overlaps.max() >= MATCH_IOU:
            left.remove(same[int(overlaps.argmax())])
    return len(objects) - len(left)


def _open(truth: Truth, identity: int) -> Image.Image:
    path = truth.image_root / truth.images[identity]["file_name"]
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise UserError(f"{path}, an image of the evaluation set, cannot be read: {error}") from error


def _overlay(
    truth: Truth, identity: int, annotation: Mapping[str, Any], text: str, fills: Mapping[int, str]
) -> Overlay:
    image = truth.images[identity]
    mask = decode_mask(annotation.get("segmentation"), int(image["height"]), int(image["width"]))
    x, y, width, height = annotation["bbox"]
    kind = annotation["category_id"]
    points = annotation.get("keypoints") or []
    # COCO counts pixels by their centres; 0 is not visible, and for a detection a score takes the place.
    seen = {
        place: (points[3 * place] + 0.5, points[3 * place + 1] + 0.5)
        for place in range(len(points) // 3)
        if points[3 * place + 2] > LEAST_VISIBLE
    }
    limbs = [(seen[a], seen[b]) for a, b in truth.skeletons[kind] if a in seen and b in seen]
    return Overlay((x, y, x + width, y + height), mask, text, fills[kind], tuple(seen.values()), limbs)


def decode_mask(segmentation: Any, height: int, width: int) -> NDArray[np.uint8] | None:
    """A mask (height, width) of 0 and 1, from polygons or from a run-length code in either spelling."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        code = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        code = coco_mask.frPyObjects(segmentation, height, width)
    else:
        code = segmentation
    return np.asarray(coco_mask.decode(code), dtype=np.uint8)
