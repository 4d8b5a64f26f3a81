"""Synthetic annotations and detections similar to COCO's: 80 classes, boxes, polygons, run-length encodings."""

from typing import Any

import numpy as np
from pycocotools import mask as masks

HEIGHT, WIDTH, CATEGORIES = 480, 640, 80  # of most of COCO's pictures; its classes
OBJECTS = 7  # in an image: the mean in val2017


def synthetic_results(images: int, detections: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A dataset like COCO and detections for it: most near an object, some of those of another class.

    Args:
        images: how many.
        detections: in each image.

    Returns:
        what a file of annotations holds, and a list in COCO's results format.
    """
    rng = np.random.default_rng(0)
    dataset: dict[str, Any] = {
        "images": [
            {"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH}
            for number in range(1, images + 1)
        ],
        "annotations": [],
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, CATEGORIES + 1)],
    }
    results = []
    for image in range(1, images + 1):
        objects = [(int(rng.integers(1, CATEGORIES + 1)), random_box(rng)) for _ in range(1 + rng.poisson(OBJECTS - 1))]
        for category, box in objects:
            entry = {"id": len(dataset["annotations"]) + 1, "image_id": image, "category_id": category, "iscrowd": 0}
            outlines = [random_outline(rng, part) for part in (halves(box) if rng.random() < 0.1 else [box])]
            dataset["annotations"].append({**entry, "bbox": box, "area": box[2] * box[3], "segmentation": outlines})
        for _ in range(detections):
            category, box = objects[rng.integers(len(objects))]
            box = [max(2.0, value + rng.normal(0, 0.1 * side)) for value, side in zip(box, box[2:] * 2, strict=True)]
            if rng.random() < 0.2:
                box = random_box(rng)
            if rng.random() < 0.3:
                category = int(rng.integers(1, CATEGORIES + 1))
            region = masks.frPyObjects([random_outline(rng, box)], HEIGHT, WIDTH)[0]
            region["counts"] = region["counts"].decode()
            found = {"image_id": image, "category_id": category, "bbox": box, "segmentation": region}
            results.append({**found, "score": float(rng.random())})
    return dataset, results


def random_box(rng: np.random.Generator) -> list[float]:
    """Sides from 10 to 400 pixels, evenly on a logarithmic scale."""
    width, height = np.exp(rng.uniform(np.log(10), np.log(400), 2))
    return [rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height), float(width), float(height)]


def halves(box: list[float]) -> list[list[float]]:
    """The left and the right half of a box."""
    x, y, width, height = box
    return [[x, y, width / 2, height], [x + width / 2, y, width / 2, height]]


def random_outline(rng: np.random.Generator, box: list[float]) -> list[float]:
    """The outline of a blob that fills most of the box: 16 corners, [x, y, x, y, ...]."""
    x, y, width, height = box
    angles, radius = np.linspace(0, 2 * np.pi, 16, endpoint=False), rng.uniform(0.35, 0.5, 16)
    corners = [x + width * (0.5 + radius * np.cos(angles)), y + height * (0.5 + radius * np.sin(angles))]
    return [float(value) for value in np.stack(corners, axis=1).ravel()]
