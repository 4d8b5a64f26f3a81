"""VOC's average precision by Detectron2, and its analysis by COCO's definitions."""

import importlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.utils import comm

from detection.data.voc import list_path, read_image, read_list
from detection.evaluation import analysis, scores
from detection.evaluation.coco import analyse
from foundation.errors import UserError

NOTE = "AP of each class, curves, thresholds and errors are by COCO's definitions; difficult objects are ignored"


class VOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's, with the annotations that training would read (`detection/data/voc.py`).

    Detectron2 reads the XML files anew, and fails on coordinates with a fraction and on objects without `difficult`,
    `pose` or `truncated`.

    Args:
        dataset_name: as registered.
        folder: gets `analysis.json`: by COCO's definitions, where a difficult object counts as a crowd. None: it is not
            written.
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
            analysis.write(self._folder, {"bbox": analyse(self._as_coco(objects, gathered), NOTE)})
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
