"""The evaluator of each dataset: the one that its published numbers were computed with.

It is chosen by the `evaluator_type` in Detectron2's metadata: COCO's AP, VOC's (eleven points for 2007), LVIS's,
Cityscapes' own scripts, or intersection over union for semantic segmentation.
"""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import CityscapesSemSegEvaluator, DatasetEvaluator, SemSegEvaluator
from fvcore.common.config import CfgNode

from detection.checks.audit import source
from detection.data import datasets, optional_packages
from detection.data.requirements import requirements_of
from detection.evaluation.cityscapes import CityscapesEvaluator
from detection.evaluation.coco import FastCOCOEvaluator
from detection.evaluation.lvis import FederatedEvaluator
from detection.evaluation.voc import VOCEvaluator
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
    requirements = requirements_of(config)
    return ("bbox", *["segm"] * requirements.masks, *["keypoints"] * bool(requirements.keypoints))


class PresentClassesEvaluator(SemSegEvaluator):
    """Detectron2's, whose mIoU is the mean over the classes that the labels hold, in all of its versions.

    v0.6 averages over classes that are in the labels or in the predictions, its main branch over those in the labels.
    """

    def evaluate(self) -> dict[str, Any] | None:
        """mIoU, frequency-weighted IoU, mean and pixel accuracy, in percent; in the first process only."""
        results = super().evaluate()
        if results:
            confusion = self._conf_matrix[:-1, :-1]  # rows: predicted, columns: labels; the last of each is ignored
            present = confusion.sum(axis=0) > 0
            union = confusion.sum(axis=0) + confusion.sum(axis=1) - confusion.diagonal()
            iou = confusion.diagonal()[present] / union[present]
            results["sem_seg"]["mIoU"] = 100 * float(iou.mean()) if present.any() else float("nan")
        return results


def main_metric(config: CfgNode) -> str:
    """The metric by which checkpoints of a config are compared, as `bbox/AP`."""
    kind = MetadataCatalog.get(config.DATASETS.TEST[0]).get("evaluator_type")
    return {"cityscapes_instance": "segm/AP", "cityscapes_sem_seg": "sem_seg/IoU", "sem_seg": "sem_seg/mIoU"}.get(
        kind, "bbox/AP"
    )


def metrics_of(config: CfgNode, dataset_name: str) -> list[str]:
    """The metrics of a registered dataset's evaluation, as `bbox/AP`. `bbox/AP-` stands for those of the classes.

    Raises:
        UserError: the dataset is a user's own and its file is missing, or not in COCO's format.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind in METRICS:
        return list(METRICS[kind])
    of_classes = ["AP-"] * (len(datasets.known_classes(dataset_name)) > 1)  # of a single class Detectron2 lists none
    further = ["APr", "APc", "APf"] if kind == "lvis" else of_classes
    by_size = {"keypoints": ("APm", "APl")}  # COCO labels no keypoints of small objects
    return [
        f"{task}/{name}"
        for task in predicted_tasks(config)
        for name in ("AP", "AP50", "AP75", *by_size.get(task, ("APs", "APm", "APl")), *further)
    ]


def check_metric(config: CfgNode) -> None:
    """Check that the evaluation gives `TEST.BEST_METRIC`.

    Raises:
        UserError: it does not.
    """
    metric, names = config.TEST.BEST_METRIC, config.DATASETS.TEST
    if not metric:
        return
    dataset = datasets.measured_on(names, metric)
    own = metric if dataset == names[0] else metric.partition("/")[2]
    known = metrics_of(config, dataset)
    start, dash, of_class = own.partition("-")
    if start + dash in known and dash and of_class not in (classes := datasets.known_classes(dataset)):
        near = difflib.get_close_matches(of_class, classes, n=3, cutoff=0) or classes[:3]
        raise UserError(
            f"TEST.BEST_METRIC {metric!r} is of a class that {source(dataset)} does not have; nearest:"
            f" {', '.join(near)}"
        )
    if start + dash not in known:
        shown = ", ".join(f"{name}CLASS" if name.endswith("-") else name for name in known)
        raise UserError(f"TEST.BEST_METRIC {metric!r} is not measured on {source(dataset)}; choose one of {shown}")


def _coco(config: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    tasks = predicted_tasks(config)
    keypoints = {"kpt_oks_sigmas": config.TEST.KEYPOINT_OKS_SIGMAS} if "keypoints" in tasks else {}
    ids = datasets.category_ids(config, name)
    return FastCOCOEvaluator(name, tasks=tasks, output_dir=folder, category_ids=ids, **keypoints)


def _voc(config: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return VOCEvaluator(name, Path(folder))


def _lvis(config: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    optional_packages.provide_lvis(name)
    return FederatedEvaluator(name, predicted_tasks(config), output_dir=folder)


def _cityscapes_instances(config: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    optional_packages.provide_cityscapes(name)
    return CityscapesEvaluator(name, Path(folder))


def _cityscapes_semantic(config: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    optional_packages.provide_cityscapes(name)
    return CityscapesSemSegEvaluator(name)


def _semantic(config: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return PresentClassesEvaluator(name, output_dir=folder)


EVALUATORS: dict[str, Callable[[CfgNode, str, str], DatasetEvaluator]] = {
    "coco": _coco,
    "pascal_voc": _voc,
    "lvis": _lvis,
    "cityscapes_instance": _cityscapes_instances,
    "cityscapes_sem_seg": _cityscapes_semantic,
    "sem_seg": _semantic,
}

METRICS: dict[str, tuple[str, ...]] = {
    "pascal_voc": ("bbox/AP", "bbox/AP50", "bbox/AP75"),
    "cityscapes_instance": ("segm/AP", "segm/AP50", "segm/AP-"),
    "cityscapes_sem_seg": ("sem_seg/IoU", "sem_seg/iIoU", "sem_seg/IoU_sup", "sem_seg/iIoU_sup"),
    "sem_seg": ("sem_seg/mIoU", "sem_seg/fwIoU", "sem_seg/mACC", "sem_seg/pACC", "sem_seg/IoU-", "sem_seg/ACC-"),
}
