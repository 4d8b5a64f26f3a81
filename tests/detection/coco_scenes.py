"""Random datasets and detections with everything that COCO has."""

import numpy as np
from pycocotools import mask as masks

HEIGHT, WIDTH = 180, 240
CATEGORIES = [{"id": number, "name": name} for number, name in ((2, "cat"), (3, "dog"), (7, "cow"), (9, "never"))]
# Sides: two small objects, of which one is just not medium, two medium ones, the second at its bounds, and a large one.
SIDES = [(9, 12), (32, 32), (40, 60), (96, 96), (130, 110)]


def scenes(seed, images=12):
    """A dataset and detections: objects of all sizes, crowds, empty images, ties, misses, duplicates, wrong classes."""
    rng = np.random.default_rng(seed)
    dataset = {
        "images": [{"id": 5 * i + 3, "height": HEIGHT, "width": WIDTH, "file_name": f"{i}.jpg"} for i in range(images)],
        "annotations": [],
        "categories": CATEGORIES,
    }
    results = []
    for image in dataset["images"][:-1]:  # the last has neither objects nor detections, the first no objects
        for _ in range(0 if image is dataset["images"][0] else rng.integers(1, 7)):
            add_object(rng, dataset["annotations"], image["id"])
        mine = [entry for entry in dataset["annotations"] if entry["image_id"] == image["id"]]
        for entry in mine:
            for _ in range(rng.integers(0, 4)):
                jitter = rng.normal(0, 0.08, 4) * entry["bbox"][2]
                add_detection(rng, results, entry, np.array(entry["bbox"]) + jitter)
        template = mine[0] if mine else {"image_id": image["id"], "category_id": 3, "keypoints": [0] * 51}
        for _ in range(3):
            add_detection(rng, results, template, rng.uniform(5, 90, 4))
    rng.shuffle(results)
    return dataset, results


def add_object(rng, annotations, image):
    width, height = SIDES[rng.integers(len(SIDES))]
    x, y = int(rng.integers(0, WIDTH - width)), int(rng.integers(0, HEIGHT - height))
    crowd = rng.random() < 0.2
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    region = [corners]
    if crowd:  # lengths of runs, column by column, as COCO's files have them
        runs = [x * HEIGHT + y, *[height, HEIGHT - height] * (width - 1), height]
        region = {"size": [HEIGHT, WIDTH], "counts": [*runs, HEIGHT * WIDTH - sum(runs)]}
        assert masks.area(masks.frPyObjects(region, HEIGHT, WIDTH)) == width * height
    visible = rng.integers(0, 3, 17) * (rng.random() < 0.8)
    points = np.stack([x + rng.random(17) * width, y + rng.random(17) * height, visible], 1)
    annotations.append({
        "id": len(annotations) + 1, "image_id": image, "category_id": int(rng.choice([2, 3, 7])),
        "bbox": [x, y, width, height], "area": width * height, "iscrowd": int(crowd), "segmentation": region,
        "keypoints": points.ravel().tolist(), "num_keypoints": int((visible > 0).sum()),
    })  # fmt: skip


def add_detection(rng, results, entry, box):
    """Near an object, of its class mostly; scores have one decimal, so that many are equal."""
    x, y, width, height = (float(value) for value in np.maximum(box, 3))
    category = entry["category_id"] if rng.random() < 0.8 else int(rng.choice([2, 3, 7, 9]))
    rle = masks.encode(np.asfortranarray(rectangle(x, y, width, height)))
    points = np.array(entry["keypoints"]).reshape(17, 3) + rng.normal(0, 3, (17, 3))
    results.append({
        "image_id": entry["image_id"], "category_id": category, "bbox": [x, y, width, height],
        "score": float(np.round(rng.random(), 1)), "segmentation": {**rle, "counts": rle["counts"].decode()},
        "keypoints": points.ravel().tolist(),
    })  # fmt: skip


def rectangle(x, y, width, height):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[round(y) : round(y + height), round(x) : round(x + width)] = 1
    return mask
