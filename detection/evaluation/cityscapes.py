"""Cityscapes' average precision of instances by its own scripts, and the analysis for the report by COCO's definitions.

The scripts give AP and AP50 of each class, but no curve. So the detections are also matched by COCO's rules. One region
of each class is treated as a crowd: the pixels that the scripts ignore, which are unlabelled pixels, groups of objects
and objects below 100 pixels. Then the same detections are correct, wrong and ignored. Only the sum over the curve
differs: COCO's uses the best precision at 101 recalls, Cityscapes' the precision at each score.
"""

import glob
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import CityscapesInstanceEvaluator
from detectron2.utils import comm
from PIL import Image
from pycocotools import mask as coco_masks

from detection.evaluation import analysis, scores
from detection.evaluation.coco import analyse

IMAGE, LABELS = "_leftImg8bit.png", "_gtFine_instanceIds.png"  # ends of the names of files
SUMMARY, CLASS = {"AP": "allAp", "AP50": "allAp50%"}, {"AP": "ap", "AP50": "ap50%"}  # our names to the scripts'
NOTE = (
    "AP of each class is by Cityscapes' scripts; curves, thresholds and errors are by COCO's definitions, without what"
    " the scripts ignore"
)


class CityscapesEvaluator(CityscapesInstanceEvaluator):
    """Detectron2's, with AP of each class in the results, and with `analysis.json`.

    The scripts would write `matches.json`, which nobody reads, into the working folder, and fail at it, after the last
    iteration of training: it holds NumPy's numbers, which `json` does not write.

    Args:
        dataset_name: as registered.
        folder: gets `analysis.json`. None: it is not written.
    """

    def __init__(self, dataset_name: str, folder: Path | None = None) -> None:
        super().__init__(dataset_name)
        self._folder = folder

    def reset(self) -> None:
        """Forget the detections."""
        super().reset()
        self._detections: list[dict[str, Any]] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Note what was detected in images."""
        super().process(inputs, outputs)
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"]
            codes = scores.encode(instances.pred_masks)
            values = zip(instances.pred_classes.tolist(), instances.scores.tolist(), codes, strict=True)
            self._detections += [
                {
                    "image_id": os.path.basename(image["file_name"]).removesuffix(IMAGE),
                    "category_id": category,
                    "score": score,
                    "segmentation": code,
                }
                for category, score, code in values
            ]

    def evaluate(self) -> dict[str, Any] | None:
        """AP and AP50 of the masks, and AP of each class, in percent; in the first process only."""
        gathered = comm.gather(self._detections)
        scripts: Any = importlib.import_module("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
        write, evaluate, averages = scripts.writeDict2JSON, scripts.evaluateImgLists, {}

        def evaluate_and_keep(*arguments: Any) -> Any:
            found = evaluate(*arguments)
            averages.update(found["averages"])
            return found

        scripts.writeDict2JSON, scripts.evaluateImgLists = lambda content, path: None, evaluate_and_keep
        try:
            results: dict[str, Any] | None = super().evaluate()
        finally:
            scripts.writeDict2JSON, scripts.evaluateImgLists = write, evaluate
        if results is None:
            return None
        classes = {name: averages["classes"][name] for name in self._metadata.thing_classes}
        results["segm"].update({f"AP-{name}": 100 * float(own["ap"]) for name, own in classes.items()})
        if self._folder:
            detections = [each for part in gathered for each in part]
            entry = analyse(self._as_coco(detections, scripts.args.minRegionSizes[0]), NOTE)
            entry["summary"] = {key: analysis.percent(averages[name]) for key, name in SUMMARY.items()}
            for own in entry["classes"]:
                found = classes[own["name"]]
                own.update({key: analysis.percent(found[name]) for key, name in CLASS.items()})
            analysis.write(self._folder, {"segm": entry})
        return results

    def _as_coco(self, detections: Sequence[Mapping[str, Any]], least_pixels: int) -> Any:
        """COCO's evaluation of the detections, with the objects of all images of the dataset."""
        helpers: Any = importlib.import_module("cityscapesscripts.helpers.labels")
        names = self._metadata.thing_classes
        labels = [helpers.name2label[name].id for name in names]
        void = [label.id for label in helpers.labels if label.ignoreInEval]
        images, annotations = [], []
        for path in sorted(glob.glob(os.path.join(self._metadata.gt_dir, "*", f"*{LABELS}"))):
            with Image.open(path) as picture:
                values = np.asarray(picture).astype(np.int64)
            frame = os.path.basename(path).removesuffix(LABELS)
            images.append({"id": frame, "height": values.shape[0], "width": values.shape[1]})
            annotations += [{"image_id": frame, **entry} for entry in _objects(values, labels, void, least_pixels)]
        categories = [{"id": number, "name": name} for number, name in enumerate(names)]
        dataset = {"images": images, "annotations": annotations, "categories": categories}
        return scores.score(dataset, detections, "segm")


def _objects(
    values: np.ndarray, labels: Sequence[int], void: Sequence[int], least_pixels: int
) -> Iterator[dict[str, Any]]:
    """The objects of one image as COCO's annotations, and for each class a crowd of what does not count.

    Args:
        values: of `instanceIds.png`, (H, W): 1000 times the label and the object's number, or the label alone for a
            group and for classes without objects.
        labels: of the classes.
        void: labels of pixels that do not count.
        least_pixels: of an object that counts.
    """
    numbers, counts = np.unique(values, return_counts=True)
    nowhere = np.isin(values, void)
    regions, entries = [], []
    for category, label in enumerate(labels):
        own = numbers // 1000 == label
        whole, small = numbers[own & (counts >= least_pixels)], numbers[own & (counts < least_pixels)]
        regions += [values == number for number in whole]
        entries += [{"category_id": category, "iscrowd": 0}] * len(whole)
        ignored = nowhere | np.isin(values, [label, *small])
        if ignored.any():
            regions.append(ignored)
            entries.append({"category_id": category, "iscrowd": 1})
    codes = scores.encode(torch.from_numpy(np.stack(regions))) if regions else []
    for entry, code in zip(entries, codes, strict=True):
        area, box = float(coco_masks.area(code)), coco_masks.toBbox(code).tolist()
        yield {**entry, "segmentation": code, "area": area, "bbox": box}
