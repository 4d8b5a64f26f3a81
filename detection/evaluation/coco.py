"""COCO's average precision by faster-coco-eval, and beside it what a report draws: `analysis.json`.

The numbers are those of pycocotools, all twelve, which the tests hold to within 1e-12.

`analysis.json` lies in the evaluator's folder and describes the last evaluation, one entry for each task:

    {"bbox": {
        "summary": {"AP": 41.2, "AP50": .., "AP75": .., "APs": .., "APm": .., "APl": ..,
                    "AR1": .., "AR10": .., "AR100": .., "ARs": .., "ARm": .., "ARl": ..},
        "classes": [{"name": "person", "objects": 11004, "AP": 55.1, "AP50": 83.0}, ..],
        "precision_recall": {"recall": [0.0, 0.01, .., 1.0], "0.5": [..], "0.75": [..], "mean": [..]},
        "errors": {"classification": 2.1, "localisation": 6.3, "both": .., "duplicate": .., "background": ..,
                   "missed": ..},
        "counts": {"detections": .., "correct": .., "ignored": .., "objects": .., "classification": .., ..}
     },
     "segm": {..}}

- All AP and AR are in percent; null where there is nothing to average (no object of that class or size). Keypoints
  have ten numbers: none for small objects, AR50 and AR75, and no limits of 1 and 10 detections.
- `classes` are in the model's order; `objects` leaves crowds out.
- `precision_recall` are fractions, averaged over the classes that have objects: precision at 101 recalls, at an
  overlap of 0.5, of 0.75, and on average over the ten thresholds. The last one's mean is AP.
- `errors` is by how many points AP50 would rise if every error of that kind, and no other, were put right; `counts`
  how many there are. `errors.py` defines the kinds. Both are null for keypoints, where overlap with
  the background has no meaning, and `errors` is null where there is no object at all.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances

from detection.evaluation import coco_analysis, rle, scores
from foundation.files import write_atomic

logger = logging.getLogger(__name__)


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator with another evaluation. The metrics have its names and its units, percent.

    Without any detection AP is 0, where Detectron2 gives NaN; NaN remains for sizes and classes that have no object.
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
    ) -> None:
        """As Detectron2's, where each argument is explained. Without `output_dir` nothing is written."""
        super().__init__(
            dataset_name,
            tasks=tasks,
            distributed=distributed,
            output_dir=output_dir,
            max_dets_per_image=max_dets_per_image,
            use_fast_impl=False,  # it would look for Detectron2's C++ operators
            kpt_oks_sigmas=kpt_oks_sigmas,
        )

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Note what was detected in images, as Detectron2's evaluator does, with the masks encoded faster."""
        for image, output in zip(inputs, outputs, strict=True):
            found = output.get("instances")
            if found is None or not found.has("pred_masks"):
                super().process([image], [output])
                continue
            fields = {name: value for name, value in found.get_fields().items() if name != "pred_masks"}
            super().process([image], [{**output, "instances": Instances(found.image_size, **fields)}])
            codes = rle.encode(found.pred_masks)
            for record, code in zip(self._predictions[-1]["instances"], codes, strict=True):
                record["segmentation"] = code

    def _eval_predictions(self, predictions: Sequence[Mapping[str, Any]], img_ids: Sequence[int] | None = None) -> None:
        """Fill `_results` and write the files; called in the first process with the detections of all.

        Raises:
            UserError: the number of keypoints is not that of the sigmas.
        """
        results = self._with_category_ids(found for image in predictions for found in image["instances"])
        self._write("coco_instances_results.json", results)
        if not self._do_evaluation:
            logger.info("%s has no annotations: nothing to evaluate against", self._metadata.json_file)
            return
        analysis = {}
        for task in sorted(self._tasks or self._tasks_from_predictions(results)):
            evaluation = scores.score(
                self._coco_api.dataset, results, task, self._max_dets_per_image, img_ids, self._kpt_oks_sigmas
            )
            names = self._metadata.get("thing_classes")
            self._results[task] = self._derive_coco_results(evaluation, task, class_names=names)
            analysis[task] = coco_analysis.analyse(evaluation)
        self._write("analysis.json", analysis)

    def _with_category_ids(self, results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Copies that name the dataset's categories instead of the model's classes, 0 to K - 1."""
        classes = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if classes is None:
            return [dict(found) for found in results]
        categories = {index: category for category, index in classes.items()}
        return [{**found, "category_id": categories[found["category_id"]]} for found in results]

    def _write(self, name: str, content: Any) -> None:
        if self._output_dir:
            path = Path(self._output_dir) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(content).encode())
