"""`--show-data N`: training images as the model gets them, after augmentation, with boxes, masks and keypoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from detectron2.data import MetadataCatalog
from detectron2.structures import BitMasks, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from fvcore.common.config import CfgNode
from numpy.typing import NDArray
from PIL import Image

from detection.data import datasets, loading, training_data
from foundation.canvas import FAINT, Overlay, Point, class_colours, compose_sheet, draw_cell
from foundation.errors import UserError

COLUMNS = 4
MOST = 100  # images
FILE = "training_images.png"


def write(config: CfgNode, count: int) -> Path:
    """Draw the first `count` images of a run, in the order in which it reads them, as a sheet in its folder.

    Raises:
        UserError: the count is out of range, an image cannot be read, or the folder cannot be written.
    """
    if not 1 <= count <= MOST:
        raise UserError(f"--show-data must be 1 to {MOST} images, not {count}")
    datasets.register(config.DATASETS.TRAIN)
    single = config.clone()
    single.SOLVER.IMS_PER_BATCH = 1
    images = training_data.read(single)
    batches = iter(training_data.build_batches(single, images, loading.ProcessBatch(), config.SEED, workers=0))
    metadata = MetadataCatalog.get(config.DATASETS.TRAIN[0])
    names = datasets.model_classes(config)
    cells = [_cell(next(batches)[0], names, metadata, config.INPUT.FORMAT) for _ in range(count)]
    blank = Image.new("RGB", (1, 1), "white")
    columns = min(count, COLUMNS)
    rows = [cells[start : start + columns] for start in range(0, count, columns)]
    rows[-1] += [blank] * (columns - len(rows[-1]))
    titles = [("training images", FAINT), *[("", FAINT)] * (columns - 1)]
    path = Path(config.OUTPUT_DIR) / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        compose_sheet(titles, rows, [""] * len(rows)).save(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _cell(record: dict[str, Any], names: Sequence[str], metadata: Any, image_format: str) -> Image.Image:
    """One image with its objects, or with its classes of pixels."""
    pixels = record["image"].numpy().transpose(1, 2, 0)
    image = Image.fromarray(numpy.ascontiguousarray(pixels[:, :, ::-1] if image_format == "BGR" else pixels))
    overlays = _objects(record["instances"], names, metadata) if "instances" in record else _regions(record, names)
    note = f"{Path(record['file_name']).name}: {image.width} x {image.height}, {len(overlays)} "
    return draw_cell(image, overlays, note + ("objects" if "instances" in record else "classes"))


def _objects(instances: Any, names: Sequence[str], metadata: Any) -> list[Overlay]:
    colours, (height, width) = class_colours(range(len(names))), instances.image_size
    classes, boxes = instances.gt_classes.tolist(), instances.gt_boxes.tensor.tolist()
    keypoints = instances.gt_keypoints.tensor.tolist() if instances.has("gt_keypoints") else [[]] * len(boxes)
    masks: Sequence[NDArray[numpy.uint8] | None] = [None] * len(boxes)
    if instances.has("gt_masks"):
        masks = _bitmaps(instances.gt_masks, height, width)
    order = {name: index for index, name in enumerate(metadata.get("keypoint_names") or ())}
    limbs = [(order[a], order[b]) for a, b, _ in metadata.get("keypoint_connection_rules") or ()]
    overlays = []
    for kind, box, mask, points in zip(classes, boxes, masks, keypoints, strict=True):
        visible: dict[int, Point] = {i: (x, y) for i, (x, y, visibility) in enumerate(points) if visibility > 0}
        lines = tuple((visible[a], visible[b]) for a, b in limbs if a in visible and b in visible)
        overlays.append(Overlay(tuple(box), mask, names[kind], colours[kind], tuple(visible.values()), lines))
    return overlays


def _bitmaps(masks: PolygonMasks | BitMasks, height: int, width: int) -> list[NDArray[numpy.uint8]]:
    if isinstance(masks, BitMasks):
        return list(masks.tensor.numpy().astype(numpy.uint8))
    return [polygons_to_bitmask(polygons, height, width).astype(numpy.uint8) for polygons in masks.polygons]


def _regions(record: dict[str, Any], names: Sequence[str]) -> list[Overlay]:
    colours, labels = class_colours(range(len(names))), record["sem_seg"].numpy()
    present = [kind for kind in numpy.unique(labels).tolist() if kind < len(names)]  # not the ignored label
    return [Overlay(None, (labels == kind).astype(numpy.uint8), names[kind], colours[kind]) for kind in present]
