"""COCO's average precision by faster-coco-eval, and its analysis for the report.

All twelve numbers equal pycocotools' to within 1e-12, which the tests check.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances

from detection.data.annotations import read_annotations
from detection.evaluation import analysis, scores
from detection.evaluation.analysis import describe_class, describe_task
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
        if self._folder:
            path = Path(self._folder, "coco_instances_results.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(results).encode())
        read = self._annotations
        if not read.annotated:
            logger.warning("%s has no annotations: the results are written, and not evaluated", read.path)
            return
        dataset = {"images": read.images, "annotations": read.annotations, "categories": read.categories}
        names = [each["name"] for each in read.categories]
        analyses = {}
        for task in sorted(self._tasks or self._tasks_from_predictions(results)):
            evaluation = scores.score(dataset, results, task, self._max_dets_per_image, img_ids, self._kpt_oks_sigmas)
            self._results[task] = self._derive_coco_results(evaluation, task, class_names=names)
            analyses[task] = analyse(evaluation)
        if self._folder:
            analysis.write(Path(self._folder), analyses)

    def _with_category_ids(self, results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Copies that name the dataset's categories instead of the model's classes, 0 to K - 1.

        Detections of classes that the dataset does not have are left out.
        """
        named = ({**each, "category_id": self._category_ids[each["category_id"]]} for each in results)
        return [each for each in named if each["category_id"] is not None]


def analyse(evaluation: Any, note: str | None = None) -> dict[str, Any]:
    """What `analysis.json` holds of one task.

    Args:
        evaluation: as `scores.score` returns it.
        note: a sentence for the report.
    """
    has_regions = evaluation.params.iouType != "keypoints"
    names = scores.SUMMARY if has_regions else scores.KEYPOINT_SUMMARY
    # Of objects of any size, with the most detections.
    precision: np.ndarray = evaluation.eval["precision"][:, :, :, 0, -1]
    return describe_task(
        summary=dict(zip(names, evaluation.stats, strict=True)),
        classes=_describe_classes(evaluation, precision),
        precision=precision,
        iou_thresholds=evaluation.params.iouThrs,
        images=evaluation.compared.values() if has_regions else (),
        note=note,
    )


def _describe_classes(evaluation: Any, precision: np.ndarray) -> list[dict[str, Any]]:
    """The classes by ascending category id."""
    chosen = set(evaluation.params.imgIds)
    objects = dict.fromkeys(evaluation.params.catIds, 0)
    for entry in evaluation.cocoGt.dataset["annotations"]:
        if entry["image_id"] in chosen and not entry["ignore"]:
            objects[entry["category_id"]] += 1
    return [
        describe_class(evaluation.cocoGt.cats[category]["name"], number, precision[:, :, place])
        for place, (category, number) in enumerate(objects.items())
    ]
