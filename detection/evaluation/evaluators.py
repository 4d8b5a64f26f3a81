"""Which evaluation a dataset gets: the one that its published numbers were computed with.

What Detectron2 notes as a dataset's `evaluator_type` decides: COCO's AP, VOC's (eleven points for 2007), LVIS's,
Cityscapes' own scripts, or intersection over union for semantic segmentation.
"""

import importlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
from detectron2.utils import comm
from fvcore.common.config import CfgNode

from detection.data import datasets, optional_packages
from detection.data.requirements import requirements_of
from detection.data.voc import list_path, read_image, read_list
from detection.evaluation import scores
from detection.evaluation.coco import FastCOCOEvaluator, analyse
from foundation.errors import UserError
from foundation.files import write_atomic


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


class VOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's, with the annotations that training would read (`detection/data/voc.py`).

    Detectron2 reads the XML files anew, and fails on coordinates with a fraction and on objects without `difficult`,
    `pose` or `truncated`.

    Args:
        dataset_name: as registered.
        folder: gets `analysis.json`, as `detection.evaluation.coco` describes it: by COCO's definitions, where a
            difficult object counts as a crowd. None: it is not written.
    """

    def __init__(self, dataset_name: str, folder: Path | None = None) -> None:
        super().__init__(dataset_name)
        self._folder = folder

    def evaluate(self) -> dict[str, Any] | None:
        """AP, AP50 and AP75 of the boxes, in percent; in the first process only."""
        gathered = comm.gather(self._predictions)
        metadata = MetadataCatalog.get(self._dataset_name)
        folder = Path(metadata.dirname)
        names = read_list(list_path(folder, metadata.split))
        objects = {name: _voc_objects(folder / "Annotations" / f"{name}.xml") for name in names}
        module: Any = importlib.import_module("detectron2.evaluation.pascal_voc_evaluation")
        parse = module.parse_rec
        module.parse_rec, self._anno_file_template = objects.__getitem__, "{}"
        try:
            with tempfile.TemporaryDirectory() as temporary:
                self._image_set_path = str(Path(temporary, "names.txt"))
                Path(self._image_set_path).write_text("\n".join(names))
                results: dict[str, Any] | None = super().evaluate()
        finally:
            module.parse_rec = parse
        if self._folder and gathered:
            self._folder.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"bbox": analyse(self._as_coco(objects, gathered))})
            write_atomic(self._folder / "analysis.json", content.encode())
        return results

    def _as_coco(
        self, objects: Mapping[str, Sequence[Mapping[str, Any]]], gathered: Sequence[Mapping[int, Sequence[str]]]
    ) -> Any:
        """COCO's evaluation of the detections, which Detectron2 keeps as lines of text by class, of each process."""
        categories = [{"id": number, "name": name} for number, name in enumerate(self._class_names)]
        numbers = {each["name"]: each["id"] for each in categories}
        annotations = [
            {
                **{"image_id": image, "category_id": numbers[each["name"]], "iscrowd": each["difficult"]},
                "bbox": _from_corners(*each["bbox"]),
            }
            for image, listed in objects.items()
            for each in listed
            if each["name"] in numbers
        ]
        results = []
        for predictions in gathered:
            for number, lines in predictions.items():
                for image, score, *corners in map(str.split, lines):
                    box = _from_corners(*map(float, corners))
                    results.append({"image_id": image, "category_id": number, "score": float(score), "bbox": box})
        dataset = {"images": [{"id": each} for each in objects], "annotations": annotations, "categories": categories}
        return scores.score(dataset, results, "bbox")


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

    They would write `matches.json`, which nobody reads, into the working folder, and fail at it, after the last
    iteration of training: it holds NumPy's numbers, which `json` does not write.
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


def _from_corners(left: float, top: float, right: float, bottom: float) -> list[float]:
    """VOC's corners, which both belong to the object, as x, y, width and height."""
    return [left, top, right - left + 1, bottom - top + 1]


def _voc_objects(path: Path) -> list[dict[str, Any]]:
    """The objects of an XML file as VOC's evaluation takes them."""
    try:
        objects = read_image(path).objects
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return [{"name": each.name, "difficult": int(each.difficult), "bbox": list(each.corners)} for each in objects]


def _coco(config: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    tasks = predicted_tasks(config)
    keypoints = {"kpt_oks_sigmas": config.TEST.KEYPOINT_OKS_SIGMAS} if "keypoints" in tasks else {}
    ids = datasets.category_ids(config, name)
    return FastCOCOEvaluator(name, tasks=tasks, output_dir=folder, category_ids=ids, **keypoints)


def _voc(config: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return VOCEvaluator(name, Path(folder))


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
    return PresentClassesEvaluator(name, output_dir=folder)


EVALUATORS: dict[str, Callable[[CfgNode, str, str], DatasetEvaluator]] = {
    "coco": _coco,
    "pascal_voc": _voc,
    "lvis": _lvis,
    "cityscapes_instance": _cityscapes_instances,
    "cityscapes_sem_seg": _cityscapes_semantic,
    "sem_seg": _semantic,
}
