"""COCO's average precision by faster-coco-eval, and what a report draws: `analysis.json`.

All twelve numbers equal pycocotools' to within 1e-12, which the tests check.

`analysis.json` lies in the evaluator's folder and describes the last evaluation, one entry for each task:

    {"bbox": {
        "summary": {"AP": 41.2, "AP50": .., "AP75": .., "APs": .., "APm": .., "APl": ..,
                    "AR1": .., "AR10": .., "AR100": .., "ARs": .., "ARm": .., "ARl": ..},
        "classes": [{"name": "person", "objects": 11004, "AP": 55.1, "AP50": 83.0}, ..],
        "precision_recall": {"recall": [0.0, 0.01, .., 1.0], "0.5": [..], "0.75": [..], "mean": [..]},
        "errors": {"classification": 2.1, "localisation": 6.3, "both": .., "duplicate": .., "background": ..,
                   "missed": ..},
        "counts": {"detections": .., "correct": .., "ignored": .., "objects": .., "classification": .., ..},
        "thresholds": {"best": {"score": 0.61, "precision": .., "recall": .., "f1": ..},
                       "classes": [{"name": "person", "score": 0.58, "precision": .., "recall": .., "f1": ..}, ..],
                       "curve": {"score": [0.0, 0.01, .., 1.0], "precision": [..], "recall": [..], "f1": [..]}},
        "confusion": {"score": 0.61, "names": ["person", .., "background"], "counts": [[..], ..]}
     },
     "segm": {..}}

- All AP and AR are in percent; null means not evaluated, because there is no object of that class or size. Keypoints
  have ten numbers: none for small objects, AR50 and AR75, and no limits of 1 and 10 detections.
- `classes` are in the order of the ids of their categories; `objects` does not count crowds.
- `precision_recall` are fractions, averaged over the classes that have objects: precision at 101 recalls, at an
  IoU of 0.5, of 0.75, and on average over the ten thresholds. The mean of the last one is AP.
- `errors` is by how many points AP50 would rise if every error of that kind, and no other, were corrected; `counts`
  how many there are. `errors.py` defines the kinds. Both are null for keypoints, where the IoU with the background has
  no meaning, and `errors` is null where there is no object at all.
- `thresholds` and `confusion` are explained in `operating_points.py`; null for keypoints, and `confusion` also for more
  than 100 classes and where no detection is correct.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances

from detection.data.annotations import read_annotations
from detection.evaluation import errors, operating_points, scores
from foundation.files import write_atomic

logger = logging.getLogger(__name__)


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator with another evaluation. The metrics have its names and its units, percent.

    The annotations are those that training would read (`detection/data/annotations.py`). Without any detection AP is 0,
    where Detectron2 gives NaN; NaN is left to sizes and classes that have no object, and so cannot be evaluated.
    Detectron2's `instances_predictions.pth`, which holds the same as `coco_instances_results.json`, is not written.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        kpt_oks_sigmas: Sequence[float] = (),
        category_ids: Sequence[Any] | None = None,
    ) -> None:
        """Read the annotations. Detectron2's own constructor, which would read them with pycocotools, is not called.

        Args:
            dataset_name: as registered.
            tasks: bbox, segm, keypoints; by default what the detections hold.
            distributed: gather the detections of all processes.
            output_dir: folder of the results; without it nothing is written.
            max_dets_per_image: detections of a class in an image that count; 100 by default.
            kpt_oks_sigmas: of the keypoints, if they are not COCO's 17.
            category_ids: for each class of the model the id of its category in the dataset, or None; by default the
                dataset's categories in the order of their ids.

        Raises:
            UserError: the annotations are missing or not in COCO's format.
        """
        self._logger = logger
        self._distributed = distributed
        self._output_dir = None  # for Detectron2's own files
        self._folder = output_dir
        self._tasks = tasks
        self._max_dets_per_image = [1, 10, max_dets_per_image or 100]
        self._kpt_oks_sigmas = kpt_oks_sigmas
        self._cpu_device = torch.device("cpu")
        self._metadata = MetadataCatalog.get(dataset_name)
        self._annotations = read_annotations(Path(self._metadata.json_file))
        known = [each["id"] for each in self._annotations.categories]
        self._category_ids = list(known if category_ids is None else category_ids)

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Note what was detected in images, as Detectron2's evaluator does, with the masks encoded faster."""
        for image, output in zip(inputs, outputs, strict=True):
            instances = output.get("instances")
            if instances is None or not instances.has("pred_masks"):
                super().process([image], [output])
                continue
            fields = {name: value for name, value in instances.get_fields().items() if name != "pred_masks"}
            super().process([image], [{**output, "instances": Instances(instances.image_size, **fields)}])
            codes = scores.encode(instances.pred_masks)
            for record, code in zip(self._predictions[-1]["instances"], codes, strict=True):
                record["segmentation"] = code

    def _eval_predictions(self, predictions: Sequence[Mapping[str, Any]], img_ids: Sequence[Any] | None = None) -> None:
        """Fill `_results` and write the files; called in the first process with the detections of all.

        Raises:
            UserError: the number of keypoints is not that of the sigmas.
        """
        results = self._with_category_ids(each for image in predictions for each in image["instances"])
        self._write("coco_instances_results.json", results)
        read = self._annotations
        if not read.annotated:
            logger.warning("%s has no annotations: the results are written, and not evaluated", read.path)
            return
        dataset = {"images": read.images, "annotations": read.annotations, "categories": read.categories}
        names = [each["name"] for each in read.categories]
        analysis = {}
        for task in sorted(self._tasks or self._tasks_from_predictions(results)):
            evaluation = scores.score(dataset, results, task, self._max_dets_per_image, img_ids, self._kpt_oks_sigmas)
            self._results[task] = self._derive_coco_results(evaluation, task, class_names=names)
            analysis[task] = analyse(evaluation)
        self._write("analysis.json", analysis)

    def _with_category_ids(self, results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Copies that name the dataset's categories instead of the model's classes, 0 to K - 1.

        Detections of classes that the dataset does not have are left out.
        """
        named = ({**each, "category_id": self._category_ids[each["category_id"]]} for each in results)
        return [each for each in named if each["category_id"] is not None]

    def _write(self, name: str, content: Any) -> None:
        if self._folder:
            path = Path(self._folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(content).encode())


def analyse(evaluation: Any) -> dict[str, Any]:
    """What `analysis.json` holds of one task.

    Args:
        evaluation: as `scores.score` returns it.
    """
    task = evaluation.params.iouType
    names = scores.KEYPOINT_SUMMARY if task == "keypoints" else scores.SUMMARY
    entry: dict[str, Any] = {
        "summary": dict(zip(names, map(_percent, evaluation.stats), strict=True)),
        "classes": describe_classes(evaluation),
        "precision_recall": errors.precision_recall_curves(_precision(evaluation), evaluation.params.iouThrs),
        "errors": None,
        "counts": None,
        "thresholds": None,
        "confusion": None,
    }
    if task != "keypoints":
        joined = errors.join(classify_images(evaluation))
        gains = errors.gains(joined, len(entry["classes"])) if len(joined.object_classes) else {}
        class_names = [each["name"] for each in entry["classes"]]
        thresholds = operating_points.thresholds(joined, class_names)
        entry.update(errors=gains or None, counts=errors.counts(joined), thresholds=thresholds)
        if thresholds["best"]:
            images, score = evaluation.compared.values(), thresholds["best"]["score"]
            entry["confusion"] = operating_points.confusion(images, class_names, score)
    return entry


def describe_classes(evaluation: Any) -> list[dict[str, Any]]:
    """Name, number of objects, AP and AP50 of each class, by ascending category id."""
    chosen = set(evaluation.params.imgIds)
    objects = dict.fromkeys(evaluation.params.catIds, 0)
    for entry in evaluation.cocoGt.dataset["annotations"]:
        if entry["image_id"] in chosen and not entry["ignore"]:
            objects[entry["category_id"]] += 1
    precision = _precision(evaluation)
    return [
        {
            "name": evaluation.cocoGt.cats[category]["name"],
            "objects": number,
            "AP": _percent(precision[:, :, place].mean()),
            "AP50": _percent(precision[0, :, place].mean()),
        }
        for place, (category, number) in enumerate(objects.items())
    ]


def classify_images(evaluation: Any) -> Iterator[errors.Outcomes]:
    """The outcomes of detections and objects, image by image."""
    return (errors.classify(*image) for image in evaluation.compared.values())


def _precision(evaluation: Any) -> np.ndarray:
    """Of objects of any size, with the most detections: (thresholds, recalls, classes); -1 for no object."""
    precision: np.ndarray = evaluation.eval["precision"][:, :, :, 0, -1]
    return precision


def _percent(value: float) -> float | None:
    return float(100 * value) if value >= 0 else None
