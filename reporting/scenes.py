"""Pictures of evaluation images with the ground truth and with what each detector finds."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from foundation.canvas import INK, Overlay, Point, class_colours, compose_sheet, draw_cell
from foundation.coco_ids import id_order
from foundation.errors import UserError
from foundation.files import complete_file
from foundation.names import counted
from reporting.analysis import TASKS, best_threshold, score_text
from reporting.groups import Group, Setting
from reporting.instances import (
    MATCH_IOU,
    GroundTruth,
    Id,
    Instance,
    Matches,
    decode_mask,
    match,
    open_image,
    read_detections,
    read_ground_truth,
)
from reporting.runs import PREDICTIONS as PREDICTIONS_FOLDER
from reporting.runs import Run

PREDICTIONS = "coco_instances_results.json"
ROWS = 5
EXTREMES = 3  # images of each kind that are shown of the worst and of those that changed
MIN_SCORE = 0.5  # where a run has not measured its best threshold
LEAST_VISIBLE = 0.05  # of a keypoint to be drawn, as in Detectron2's visualizer


@dataclass(frozen=True)
class Detector:
    """The run with the lowest seed of a group, on the evaluation set.

    Attributes:
        threshold: the score from which on its detections count.
        detections: by image id, the highest-scoring last.
        matches: by image id, for every image.
    """

    group: Group
    threshold: float
    detections: Mapping[Id, Sequence[Instance]]
    matches: Mapping[Id, Matches]


@dataclass(frozen=True)
class Evaluation:
    """The evaluation set of a setting, with its detectors in the order of the groups."""

    ground_truth: GroundTruth
    detectors: Sequence[Detector]

    @property
    def images(self) -> list[Id]:
        """The ids of all images, in order."""
        return sorted(self.ground_truth.files, key=id_order)


def load(setting: Setting) -> Evaluation:
    """Read what the pictures of a detection setting need.

    Raises:
        UserError: no run has its predictions, the dataset is not on this machine, or a file is damaged.
    """
    files = [(group, _prediction_files(group.runs[0])) for group in setting.groups]
    if not any(found for _, found in files):
        raise UserError(f"no run has its {PREDICTIONS}")
    ground_truth = read_ground_truth(*_dataset(setting))
    detectors = []
    for group, found in files:
        if not found:
            continue
        threshold = _threshold(group)
        detections = read_detections(found[0], ground_truth, threshold)
        objects = ground_truth.objects
        matches = {image: match(objects.get(image, ()), detections.get(image, ())) for image in ground_truth.files}
        detectors.append(Detector(group, threshold, detections, matches))
    return Evaluation(ground_truth, detectors)


def _prediction_files(run: Run) -> list[Path]:
    """Where a run has its predictions; those of another tool may lie in a folder of another name."""
    own = run.path / run.predictions / PREDICTIONS
    if own.is_file() or run.predictions != PREDICTIONS_FOLDER:
        return [own] if own.is_file() else []
    # Not those of the averaged weights, of augmented evaluation and of further evaluation sets.
    return sorted(
        path for path in run.path.rglob(PREDICTIONS) if not path.parent.name.startswith(f"{own.parent.name}_")
    )


def draw_predictions(evaluation: Evaluation, colours: Mapping[str, str], path: Path) -> str:
    """Draw images chosen by rule: a row each, a column for the ground truth and one for each detector.

    Returns:
        The caption, with the rule.

    Raises:
        UserError: an image cannot be read.
    """
    chosen = evenly_spaced(evaluation.images, ROWS)
    _draw_sheet(evaluation, evaluation.detectors, chosen, colours, path)
    detectors = ", ".join(
        f"{each.group.label}: seed {each.group.runs[0].seed}, scores from {score_text(each.threshold)}"
        for each in evaluation.detectors
    )
    return (
        "Images of the evaluation set, not chosen by eye: they are evenly spaced among its"
        f" {len(evaluation.images)} images, in the order of their ids. Each detector is the run with the lowest seed,"
        " and is shown with the detections above the score threshold with the best F1, or above"
        f" {MIN_SCORE:g} where that was not measured ({detectors}). An object counts as found when a detection of its"
        f" class overlaps its box with an IoU of {MATCH_IOU:g} or more; detections without an object are false."
    )


def draw_worst(evaluation: Evaluation, colours: Mapping[str, str], path: Path) -> str | None:
    """Draw the images in which the last detector misses most objects, then those with most false detections.

    Returns:
        The caption; None, and no picture, where nothing is missed or false.

    Raises:
        UserError: an image cannot be read.
    """
    detector = evaluation.detectors[-1]
    missed = _largest(evaluation.images, lambda image: len(detector.matches[image].missed))
    others = [image for image in evaluation.images if image not in missed]
    false = _largest(others, lambda image: len(detector.matches[image].false))
    if not missed and not false:
        return None
    _draw_sheet(evaluation, [detector], [*missed, *false], colours, path, missed_only=True, false_only=True)
    parts = [f"the {len(missed)} with most missed objects"] if missed else []
    parts += [f"{'then ' if missed else ''}the {len(false)} with most false detections"] if false else []
    return (
        f"The worst images of {detector.group.label} (seed {detector.group.runs[0].seed}): {', '.join(parts)}. Objects"
        f" and detections that match have no label; scores from {score_text(detector.threshold)}."
    )


def draw_changes(evaluation: Evaluation, colours: Mapping[str, str], path: Path) -> str | None:
    """Draw the images in which the last detector finds more objects than the first, then those with fewer.

    Returns:
        The caption; None, and no picture, where there is one detector or no such image.

    Raises:
        UserError: an image cannot be read.
    """
    if len(evaluation.detectors) < 2:
        return None
    base, other = evaluation.detectors[0], evaluation.detectors[-1]
    gains = {image: len(other.matches[image].found) - len(base.matches[image].found) for image in evaluation.images}
    more = _largest(evaluation.images, lambda image: gains[image])
    fewer = _largest(evaluation.images, lambda image: -gains[image])
    if not more and not fewer:
        return None
    _draw_sheet(evaluation, [base, other], [*more, *fewer], colours, path, false_only=True)
    parts = [f"the {len(more)} with the largest gain"] if more else []
    parts += [f"{'then ' if more else ''}the {len(fewer)} with the largest loss"] if fewer else []
    names = f"{other.group.label} finds more or fewer objects than {base.group.label}"
    return f"Images in which {names}: {', '.join(parts)}. Only false detections are labelled."


def change_rows(evaluation: Evaluation) -> list[list[str]]:
    """Images and objects by what the first and the last detector find, as rows of a table; empty for one detector."""
    if len(evaluation.detectors) < 2:
        return []
    base, other = evaluation.detectors[0], evaluation.detectors[-1]
    a, b = base.group.label, other.group.label
    gains = [len(other.matches[image].found) - len(base.matches[image].found) for image in evaluation.images]
    by_base, by_other = ({id(each) for match in one.matches.values() for each in match.found} for one in (base, other))
    objects = sum(not each.crowd for found in evaluation.ground_truth.objects.values() for each in found)
    counts = [
        (f"images in which {b} finds more objects than {a}", sum(gain > 0 for gain in gains)),
        (f"images in which {b} finds fewer objects than {a}", sum(gain < 0 for gain in gains)),
        ("images in which both find as many", sum(gain == 0 for gain in gains)),
        ("objects found by both", len(by_base & by_other)),
        (f"objects found by {b} only", len(by_other - by_base)),
        (f"objects found by {a} only", len(by_base - by_other)),
        ("objects found by neither", objects - len(by_base | by_other)),
        (f"false detections of {b}", sum(len(each.false) for each in other.matches.values())),
        (f"false detections of {a}", sum(len(each.false) for each in base.matches.values())),
    ]
    return [[text, f"{count:,}"] for text, count in counts]


def evenly_spaced(ids: Sequence[Id], count: int) -> list[Id]:
    """`count` of the ids, from the middles of as many equal parts; all of them where there are no more."""
    if len(ids) <= count:
        return list(ids)
    return [ids[int((part + 0.5) * len(ids) / count)] for part in range(count)]


def _dataset(setting: Setting) -> tuple[Path, Path]:
    """The annotation file and the folder of images, as the first run names them."""
    run = setting.groups[0].runs[0]
    dataset = run.results.get("dataset")
    if not isinstance(dataset, dict) or not {"annotations", "image_root"} <= dataset.keys():
        raise UserError(f"{run.path / 'results.json'} names no annotations and image_root of the dataset")
    paths = Path(str(dataset["annotations"])), Path(str(dataset["image_root"]))
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is not on this machine")
    return paths


def _threshold(group: Group) -> float:
    """The score threshold with the best F1 of boxes, as the evaluation of the group's first run measured it."""
    best = best_threshold(group.runs[0], TASKS[0])
    return float(best["score"]) if best else MIN_SCORE


def _largest(images: Sequence[Id], count: Callable[[Id], int]) -> list[Id]:
    """The images with the largest counts above zero; of equal ones, those with the lowest ids."""
    positive = [image for image in images if count(image) > 0]
    return sorted(positive, key=lambda image: (-count(image), id_order(image)))[:EXTREMES]


def _draw_sheet(
    evaluation: Evaluation,
    detectors: Sequence[Detector],
    images: Sequence[Id],
    colours: Mapping[str, str],
    path: Path,
    *,
    missed_only: bool = False,
    false_only: bool = False,
) -> None:
    """A row for each image, with the ground truth first.

    Args:
        missed_only: label only the objects that the last detector misses.
        false_only: label only the false detections.
    """
    ground_truth, fills = evaluation.ground_truth, class_colours(evaluation.ground_truth.names)
    rows = []
    for image in images:
        photograph = open_image(ground_truth.files[image])
        objects = ground_truth.objects.get(image, ())
        missed = set(map(id, detectors[-1].matches[image].missed)) if missed_only else set(map(id, objects))
        texts = [ground_truth.names[each.category] if id(each) in missed else "" for each in objects]
        note = counted(sum(not each.crowd for each in objects), "object")
        row = [draw_cell(photograph, _overlays(ground_truth, photograph, objects, texts, fills), note)]
        for detector in detectors:
            found, matches = detector.detections.get(image, ()), detector.matches[image]
            texts = [_label(ground_truth, each, matches, false_only) for each in found]
            overlays = _overlays(ground_truth, photograph, found, texts, fills)
            scored = [
                replace(overlay, score=each.score) if overlay.text else overlay
                for overlay, each in zip(overlays, found, strict=True)
            ]
            row.append(draw_cell(photograph, scored, _note(matches)))
        rows.append(row)
    titles = [("ground truth", INK), *((each.group.label, colours[each.group.label]) for each in detectors)]
    with complete_file(path) as draft:
        names = [_printable(ground_truth.files[image].name) for image in images]
        compose_sheet(titles, rows, names).save(draft)  # optimize=True takes six times as long for 4 % of the bytes


def _printable(name: str) -> str:
    """A file's name, which may be no text, with marks for what cannot be written."""
    return os.fsencode(name).decode("utf-8", "replace")


def _label(ground_truth: GroundTruth, detection: Instance, matches: Matches, false_only: bool) -> str:
    text = ground_truth.names[detection.category]
    if not false_only:
        return text
    return f"false: {text}" if any(each is detection for each in matches.false) else ""


def _note(matches: Matches) -> str:
    count = len(matches.found) + len(matches.missed)
    return f"{len(matches.found)} of {count} found, {len(matches.false)} false"


def _overlays(
    ground_truth: GroundTruth,
    photograph: Image.Image,
    instances: Sequence[Instance],
    texts: Sequence[str],
    fills: Mapping[Id, str],
) -> list[Overlay]:
    overlays = []
    for instance, text in zip(instances, texts, strict=True):
        mask = decode_mask(instance.segmentation, photograph.height, photograph.width)
        points = _visible_points(instance)
        limbs = [
            (points[a], points[b]) for a, b in ground_truth.skeletons[instance.category] if a in points and b in points
        ]
        box = _clipped(instance, photograph)
        overlays.append(Overlay(box, mask, text, fills[instance.category], tuple(points.values()), tuple(limbs)))
    return overlays


def _clipped(instance: Instance, photograph: Image.Image) -> tuple[float, float, float, float]:
    """The box of an instance, within the picture but for a margin, in which its line is not seen."""
    width, height = photograph.size
    left, top, right, bottom = instance.box
    return (max(left, -width), max(top, -height), min(right, 2 * width), min(bottom, 2 * height))


def _visible_points(instance: Instance) -> dict[int, Point]:
    """The keypoints that are visible or, of a detection, score enough, by their place."""
    values = instance.keypoints
    # COCO counts pixels by their centres; visibility 0 is not labelled, and a detection has a score in its place.
    return {
        place: (values[3 * place] + 0.5, values[3 * place + 1] + 0.5)
        for place in range(len(values) // 3)
        if values[3 * place + 2] > LEAST_VISIBLE
    }
