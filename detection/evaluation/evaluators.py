"""Which evaluation a dataset gets: the one that its published numbers were computed with.

What Detectron2 notes as a dataset's `evaluator_type` decides: COCO's AP, VOC's (eleven points for 2007), LVIS's,
Cityscapes' own scripts, or intersection over union for semantic segmentation.
"""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from fvcore.common.config import CfgNode

from detection.data import optional_packages
from detection.data.requirements import needs_of
from detection.evaluation.coco import FastCOCOEvaluator
from foundation.errors import UserError


def build_evaluator(config: CfgNode, dataset_name: str, output_folder: str | Path) -> DatasetEvaluator:
    """The evaluator of a registered dataset, for what the model of `config` predicts.

    Args:
        config: of the run.
        dataset_name: as registered.
        output_folder: where predictions are written, by the evaluators that write them.

    Raises:
        UserError: the format has no evaluation here, or a package that it needs is not installed.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise UserError(
            f"dataset {dataset_name!r} has evaluator_type {kind!r}; there is an evaluation for {', '.join(EVALUATORS)}"
        )
    return EVALUATORS[kind](config, dataset_name, str(output_folder))


def predicted_tasks(config: CfgNode) -> tuple[str, ...]:
    """What the model predicts of an object, by COCO's names: bbox, and segm and keypoints if it has such heads."""
    needs = needs_of(config)
    return ("bbox", *["segm"] * needs.masks, *["keypoints"] * bool(needs.keypoints))


def main_metric(config: CfgNode) -> str:
    """The metric by which checkpoints of a config are compared, as `bbox/AP`."""
    kind = MetadataCatalog.get(config.DATASETS.TEST[0]).get("evaluator_type")
    return {"cityscapes_instance": "segm/AP", "cityscapes_sem_seg": "sem_seg/IoU", "sem_seg": "sem_seg/mIoU"}.get(
        kind, "bbox/AP"
    )


class CountingLVISEvaluator(LVISEvaluator):
    """Detectron2's, where a model that detects nothing has an AP of 0, instead of NaN."""

    def evaluate(self) -> dict[str, Any] | None:
        """The metrics of each task, in percent; in the first process only."""
        results: dict[str, Any] | None = super().evaluate()
        for metrics in (results or {}).values():
            if all(math.isnan(value) for value in metrics.values()):
                metrics.update(dict.fromkeys(metrics, 0.0))
        return results


class QuietCityscapesInstanceEvaluator(CityscapesInstanceEvaluator):
    """Detectron2's, with scripts that write no files.

    They would put `matches.json`, which nobody reads, into the working folder, and stop at it, after the last iteration
    of training: it holds numbers of NumPy's, which `json` does not know.
    """

    def evaluate(self) -> dict[str, Any] | None:
        """AP and AP50 of the masks, in percent; in the first process only."""
        scripts: Any = importlib.import_module("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
        write = scripts.writeDict2JSON
        scripts.writeDict2JSON = lambda content, path: None
        try:
            return super().evaluate()
        finally:
            scripts.writeDict2JSON = write


def _coco(config: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    tasks = predicted_tasks(config)
    keypoints = {"kpt_oks_sigmas": config.TEST.KEYPOINT_OKS_SIGMAS} if "keypoints" in tasks else {}
    return FastCOCOEvaluator(name, tasks=tasks, output_dir=folder, **keypoints)


def _voc(config: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return PascalVOCDetectionEvaluator(name)


def _lvis(config: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    optional_packages.provide_lvis(name)
    return CountingLVISEvaluator(name, predicted_tasks(config), output_dir=folder)


def _cityscapes_instances(config: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    optional_packages.provide_cityscapes(name)
    return QuietCityscapesInstanceEvaluator(name)


def _cityscapes_semantic(config: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    optional_packages.provide_cityscapes(name)
    return CityscapesSemSegEvaluator(name)


def _semantic(config: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return SemSegEvaluator(name, output_dir=folder)


EVALUATORS: dict[str, Callable[[CfgNode, str, str], DatasetEvaluator]] = {
    "coco": _coco,
    "pascal_voc": _voc,
    "lvis": _lvis,
    "cityscapes_instance": _cityscapes_instances,
    "cityscapes_sem_seg": _cityscapes_semantic,
    "sem_seg": _semantic,
}
