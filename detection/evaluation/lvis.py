"""LVIS's average precision by its own package, and its analysis under the same rules.

An image of LVIS is annotated for some of the classes only ("federated"): those that it has objects of, and those that
it was found not to have, `neg_category_ids`. Detections of other classes do not count in it, neither as correct nor as
errors. Of the classes in `not_exhaustive_category_ids` some objects are annotated, so that a detection without a match
is ignored. At most 300 detections of an image count, of all classes together.
"""

import importlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import LVISEvaluator
from pycocotools import mask as coco_masks

from detection.evaluation import analysis
from detection.evaluation.errors import RECALLS
from detection.evaluation.operating_points import Compared

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
NOTE = (
    "detections of a class that an image was not annotated for do not count, nor do false ones where not all objects"
    " of the class are annotated; a detection of background overlaps no annotated object, of whatever class"
)


class FederatedEvaluator(LVISEvaluator):
    """Detectron2's, which also writes `analysis.json`.

    A model that detects nothing has an AP of 0, where Detectron2 gives NaN, and what could not be evaluated, because
    there are no such objects, is NaN, where Detectron2 gives -100.
    """

    def _eval_predictions(self, predictions: Sequence[Mapping[str, Any]]) -> None:
        """Fill `_results` and write the files; called in the first process with the detections of all."""
        package: Any = importlib.import_module("lvis")
        run, analyses = package.LVISEval.run, {}

        def run_and_analyse(evaluation: Any) -> None:
            run(evaluation)
            analyses[evaluation.params.iou_type] = analyse(evaluation)

        package.LVISEval.run = run_and_analyse  # Detectron2 keeps no evaluation; those of a whole LVIS fill the memory
        try:
            super()._eval_predictions(predictions)
        finally:
            package.LVISEval.run = run
        for task, metrics in self._results.items():
            if all(math.isnan(value) for value in metrics.values()):  # no detection: the package was not called
                metrics.update(dict.fromkeys(metrics, 0.0))
                analyses[task] = _analyse_nothing(self._lvis_api, metrics)
            metrics.update({name: math.nan for name, value in metrics.items() if value < 0})
        if self._output_dir and analyses:
            analysis.write(Path(self._output_dir), analyses)


def analyse(evaluation: Any) -> dict[str, Any]:
    """The entry of `analysis.json`.

    Args:
        evaluation: an `LVISEval` after its `run`.
    """
    precision: np.ndarray = evaluation.eval["precision"][..., 0]  # of objects of any size
    return _describe(evaluation.lvis_gt, evaluation.results, precision, list(compare(evaluation)))


def compare(evaluation: Any) -> Iterator[Compared]:
    """The detections of each image that count, beside its objects, by ascending image id."""
    ground_truth, found = evaluation.lvis_gt, evaluation.lvis_dt
    key = {"bbox": "bbox", "segm": "segmentation"}[evaluation.params.iou_type]
    numbers = {category: number for number, category in enumerate(sorted(ground_truth.cats))}
    for image in sorted(ground_truth.imgs):
        record, objects = ground_truth.imgs[image], ground_truth.img_ann_map.get(image, [])
        annotated = {*record["neg_category_ids"], *(entry["category_id"] for entry in objects)}
        counted = (entry for entry in found.img_ann_map.get(image, []) if entry["category_id"] in annotated)
        detections = sorted(counted, key=lambda entry: -entry["score"])
        ours, theirs = ([numbers[entry["category_id"]] for entry in entries] for entries in (detections, objects))
        regions = [[entry[key] for entry in entries] for entries in (detections, objects)]
        partial = {numbers[category] for category in record["not_exhaustive_category_ids"]}
        yield Compared(
            ious=np.reshape(coco_masks.iou(*regions, [0] * len(objects)), (len(detections), len(objects))),
            scores=np.array([entry["score"] for entry in detections], float),
            classes=np.array(ours, int),
            object_classes=np.array(theirs, int),
            crowd=np.zeros(len(objects), bool),
            exhaustive=np.array([number not in partial for number in ours], bool),
        )


def _analyse_nothing(ground_truth: Any, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The entry where nothing is detected."""
    objects = np.array(list(_count_objects(ground_truth).values()))
    precision = np.where(objects > 0, 0.0, -1.0)
    shape = (len(IOU_THRESHOLDS), len(RECALLS), len(objects))
    total = objects.sum()
    missed = Compared(
        ious=np.zeros((0, total)),
        scores=np.zeros(0),
        classes=np.zeros(0, int),
        object_classes=np.repeat(np.arange(len(objects)), objects),
        crowd=np.zeros(total, bool),
    )
    return _describe(ground_truth, metrics, np.broadcast_to(precision, shape), [missed])


def _describe(
    ground_truth: Any, summary: Mapping[str, float], precision: np.ndarray, images: Sequence[Compared]
) -> dict[str, Any]:
    classes = [
        analysis.describe_class(ground_truth.cats[category]["name"], number, precision[:, :, place])
        for place, (category, number) in enumerate(_count_objects(ground_truth).items())
    ]
    return analysis.describe_task(
        summary=summary,
        classes=classes,
        precision=precision,
        iou_thresholds=IOU_THRESHOLDS,
        images=images,
        note=NOTE,
    )


def _count_objects(ground_truth: Any) -> dict[int, int]:
    """The number of objects of each category, by ascending id."""
    counts = Counter(entry["category_id"] for entry in ground_truth.dataset["annotations"])
    return {category: counts[category] for category in sorted(ground_truth.cats)}
