"""Sheets of pictures: training images as the model gets them, and evaluation images with what it finds in them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from fvcore.common.config import CfgNode
from PIL import Image

from detection.data import datasets
from detection.data.requirements import requirements_of
from detection.evaluation.overlays import Classes, annotated, classes_of, detected, highest_score, mapped, regions
from foundation.canvas import FAINT, INK, compose_sheet, draw_cell
from foundation.images import read_rgb

COLUMNS = 4
LEAST_SCORE = 0.3  # of a detection that is drawn
MOST_DRAWN = 20  # detections of an image


class Samples(DatasetEvaluator):
    """Keeps what a model finds in a few images of a dataset. It measures nothing; `draw` makes the sheet.

    Args:
        config: of the run.
        dataset_name: as registered.
        count: of the images, which are evenly spaced among those of the dataset.
    """

    def __init__(self, config: CfgNode, dataset_name: str, count: int) -> None:
        records = DatasetCatalog.get(dataset_name)
        count = min(count, len(records))
        chosen = [records[int((part + 0.5) * len(records) / count)] for part in range(count)]
        self._records = {record["file_name"]: record for record in chosen}
        self._config, self._names = config, datasets.known_classes(dataset_name)
        self._semantic = requirements_of(config).semantic
        self._found: dict[str, Any] = {}

    def reset(self) -> None:
        """Forget the evaluation before."""
        self._found = {}

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Keep the highest-scoring detections in the chosen images."""
        for image, output in zip(inputs, outputs, strict=True):
            if image["file_name"] in self._records:
                # Detectron2 orders instances by score.
                kept = output["sem_seg"].argmax(dim=0) if self._semantic else output["instances"][:MOST_DRAWN]
                self._found[image["file_name"]] = kept.to("cpu")

    def evaluate(self) -> None:
        """Bring what all processes have found to the first one."""
        everyone = comm.gather(self._found)
        self._found = {name: output for found in everyone for name, output in found.items()}

    def draw(self) -> Image.Image | None:
        """A row of annotations above a row of detections; None in all processes but the first, and before `evaluate`.

        Raises:
            UnreadableImage: an image cannot be read any more.
        """
        if not self._found:
            return None
        classes = classes_of(self._config)
        thresholds = [LEAST_SCORE] * len(classes.names)
        rows: tuple[list[Image.Image], list[Image.Image]] = ([], [])
        for name, record in self._records.items():
            image = Image.fromarray(read_rgb(Path(name)))
            truth = annotated(record, (image.height, image.width), self._names, classes)
            rows[0].append(draw_cell(image, truth, f"{Path(name).name}: {_count(truth, self._semantic)}"))
            if self._semantic:
                overlays = regions(self._found[name].numpy(), classes)
                note = _count(overlays, semantic=True)
            else:
                output = {"instances": self._found[name]}
                overlays = detected(output, classes, thresholds)
                note = f"{_count(overlays, semantic=False)} from a score of {LEAST_SCORE:g}"
                note += f" (highest {highest_score(output):.2f})"
            rows[1].append(draw_cell(image, overlays, note))
        titles = [("annotated, and detected below", INK), *[("", INK)] * (len(rows[0]) - 1)]
        return compose_sheet(titles, rows, ["annotated", "detected"])


def training_sheet(config: CfgNode, records: Iterable[Mapping[str, Any]]) -> Image.Image:
    """Training images, as the model gets them, with what it is told about them."""
    classes = classes_of(config)
    cells = [_training_cell(record, classes, config.INPUT.FORMAT) for record in records]
    columns = min(len(cells), COLUMNS)
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    rows[-1] += [Image.new("RGB", (1, 1), "white")] * (columns - len(rows[-1]))
    titles = [("training images", FAINT), *[("", FAINT)] * (columns - 1)]
    return compose_sheet(titles, rows, [""] * len(rows))


def _training_cell(record: Mapping[str, Any], classes: Classes, image_format: str) -> Image.Image:
    pixels = record["image"].numpy().transpose(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1] if image_format == "BGR" else pixels))
    overlays = mapped(record, classes)
    note = f"{Path(record['file_name']).name}: {image.width} x {image.height}, "
    return draw_cell(image, overlays, note + _count(overlays, semantic="sem_seg" in record))


def _count(overlays: Sequence[Any], semantic: bool) -> str:
    number = len(overlays)
    word = "class" if semantic else "object"
    return f"{number} {word}{'' if number == 1 else 'es' if semantic else 's'}"
