"""Fine-tuning a detector and evaluating it, by our means and by those that Detectron2 has on board.

    python benchmarks/detection.py                      a CPU: the recipes for the embedded scenes
    python benchmarks/detection.py --device cuda        the recipes for COCO, on pictures of COCO's size
    python benchmarks/detection.py --part scores --images 5000     COCO's AP alone, as many detections as val2017 has

Models: both sides train the same model on the same pictures, from the same random weights, and then detect with it.
Ours is the recipe as it is; stock is Detectron2's default trainer with its loader, in float32. An iteration is all of
it, from reading the images to the updated weights, and the share of ours that is spent waiting for data stands beside
it. On a CPU with one thread neither side has worker processes, so that what they would do is counted.

Scores: both sides get the same detections in COCO's results format, and the same annotations in memory, and give AP.
"""

import contextlib
import io
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from timing import Side, alternate, build_parser, print_table, ratio, start

# A script's folder comes first on the path, and with it this file before the package of the same name.
sys.path.pop(0)

import numpy as np
import torch
from fvcore.common.config import CfgNode
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection import coco_analysis, coco_scores
from detection.config import computes_in_bfloat16, for_one_process, load
from detection.trainer import TransferTrainer
from shapes import CLASSES, Recipe, ensure_rendered

# isort: split
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils.events import EventStorage

TRAIN, TEST = "benchmark_train", "benchmark_val"
IMAGES = 8  # that are detected on
HEIGHT, WIDTH, CATEGORIES = 480, 640, 80  # of most of COCO's pictures; its classes
OBJECTS, DETECTIONS = 7, 100  # in an image: the mean in val2017, the most that are evaluated


class Case(NamedTuple):
    """A recipe of configs/detection for each device, and what to change in it."""

    cpu: str
    cuda: str
    changes: tuple[object, ...] = ()


CASES = {"C4": Case("shapes_R50_C4", "coco_R50_C4_1x"), "FPN": Case("shapes_R18_FPN", "coco_R50_FPN_1x_moco")}
SMALL = ("INPUT.MIN_SIZE_TRAIN", [64], "INPUT.MIN_SIZE_TEST", 64, "SOLVER.IMS_PER_BATCH", 2)
QUICK = {"FPN": Case("shapes_R18_FPN", "shapes_R18_FPN", SMALL)}


class Training:
    """Iterations of a trainer, and what share of each was spent waiting for data."""

    def __init__(self, trainer: DefaultTrainer) -> None:
        self.trainer = trainer
        self.waiting: list[float] = []

    def __call__(self) -> None:
        """One iteration."""
        with EventStorage(self.trainer.iter) as storage:
            began = time.perf_counter()
            self.trainer.run_step()
            self.waiting.append(storage.history("data_time").latest() / (time.perf_counter() - began))
        self.trainer.iter += 1


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = build_parser("Seconds of an iteration, an evaluated image, an evaluation.", threads=1, rounds=5)
    parser.add_argument("--part", choices=("models", "scores"), help="one of the tables; both by default")
    parser.add_argument("--model", choices=CASES, help="one of the models; all by default")
    parser.add_argument("--batch", type=int, default=0, help="another batch size")
    parser.add_argument("--images", type=int, default=500, help="of the table of scores; COCO's val2017 has 5000")
    args = parser.parse_args(argv)
    device = start(args)
    logging.getLogger("detectron2").setLevel(logging.INFO)  # else it sets up its log, which goes between the tables
    rounds = 1 if args.quick else args.rounds
    if args.part != "scores":
        cases = QUICK if args.quick else {args.model: CASES[args.model]} if args.model else CASES
        with tempfile.TemporaryDirectory() as folder:
            large = device.type == "cuda" and not args.quick
            register_pictures(Path(folder), (480, 640) if large else (160, 192), 4 if args.quick else 32)
            rows = [
                row
                for name, case in cases.items()
                for row in compare_models(name, configure(case, device, args.batch, folder), rounds, device)
            ]
        header = ["model", "time of", "precision", "ours, s", "stock, s", "stock / ours", "waiting for data"]
        print_table(header, rows)
        print()
    if args.part != "models":
        scored = synthetic_results(3 if args.quick else args.images)
        rows = [compare_scores(task, *scored, min(rounds, 3)) for task in ("bbox", "segm")]
        header = ["AP of", "images", "detections", "ours, s", "with analysis, s", "pycocotools, s"]
        print_table([*header, "pycocotools / ours", "pycocotools / with analysis"], rows)


def register_pictures(folder: Path, sides: tuple[int, int], count: int) -> None:
    """Scenes with polygons, `count` to train on and as many to detect on, under the names TRAIN and TEST."""
    amounts = {"unlabeled": 0, "objects_train": 0, "objects_val": 0, "scenes_train": count, "scenes_val": count}
    recipe = Recipe(**amounts, scene_sides=sides, scene_objects=OBJECTS)
    scenes = ensure_rendered(folder / "shapes", recipe=recipe, processes=1, progress=False) / "scenes"
    for name in (TRAIN, TEST):
        split = name.removeprefix("benchmark_")
        register_coco_instances(name, {}, str(scenes / f"annotations/instances_{split}.json"), str(scenes / split))


def configure(case: Case, device: torch.device, batch: int, folder: str) -> CfgNode:
    """The recipe for the device, on the rendered pictures."""
    data = ("DATASETS.TRAIN", (TRAIN,), "DATASETS.TEST", (TEST,), "MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES))
    changes = (*case.changes, *data, "MODEL.DEVICE", device.type, "OUTPUT_DIR", folder, "SOLVER.PRECISION", "auto")
    changes += ("SOLVER.IMS_PER_BATCH", batch) if batch else ()
    config = load(case.cuda if device.type == "cuda" else case.cpu, [str(change) for change in changes])
    if device.type == "cpu" and torch.get_num_threads() == 1:
        config.DATALOADER.NUM_WORKERS = 0
    return for_one_process(config)[0]


def compare_models(name: str, config: CfgNode, rounds: int, device: torch.device) -> list[list[str]]:
    """A row for an iteration of training, and one for an image that is evaluated."""
    stock = config.clone()
    stock.SOLVER.PRECISION = "float32"
    if config.DATALOADER.NUM_WORKERS:
        stock.DATALOADER.NUM_WORKERS = 4  # Detectron2's default
    sides = [Training(TransferTrainer(config)), Training(DefaultTrainer(stock))]
    share_weights(sides)
    training = alternate(sides, rounds, device)
    share_weights(sides)
    batches = list(islice(TransferTrainer.build_test_loader(config, TEST), IMAGES))
    evaluators = [TransferTrainer.build_evaluator(config, TEST), COCOEvaluator(TEST, use_fast_impl=False)]
    detecting: list[Side] = [
        partial(detect, side.trainer.model, evaluator, batches)
        for side, evaluator in zip(sides, evaluators, strict=True)
    ]
    evaluating = alternate(detecting, rounds, device) / len(batches)
    precision = "bfloat16" if computes_in_bfloat16(config) else "float32"
    waiting = f"{np.median(sides[0].waiting[1:]):.1%}"
    return [
        [name, each, precision, *medians(seconds), ratio(seconds, side=0, reference=1), share]
        for each, seconds, share in (
            (f"iteration of {config.SOLVER.IMS_PER_BATCH} images", training, waiting),
            ("image evaluated", evaluating, ""),
        )
    ]


def share_weights(sides: Sequence[Training]) -> None:
    """Give the second side the weights of the first."""
    ours, stock = (side.trainer.model for side in sides)
    stock.load_state_dict(ours.state_dict())


def detect(model: torch.nn.Module, evaluator: DatasetEvaluator, batches: list[list[dict[str, Any]]]) -> None:
    """Detect, and hand the detections to the evaluator, which encodes the masks."""
    evaluator.reset()
    model.eval()
    with torch.no_grad():
        for images in batches:  # of one each, as Detectron2's loader has them
            evaluator.process(images, model(images))


def medians(seconds: np.ndarray) -> list[str]:
    """Of each side."""
    return [f"{time:.3g}" for time in np.median(seconds, axis=0)]


def compare_scores(task: str, dataset: dict[str, Any], results: list[dict[str, Any]], rounds: int) -> list[str]:
    """A row: ours without and with the analysis that a report draws, and pycocotools."""
    sides: list[Side] = [
        lambda: coco_scores.score(dataset, results, task),
        lambda: coco_analysis.analyse(coco_scores.score(dataset, results, task)),
        lambda: score_conventionally(dataset, results, task),
    ]
    seconds = alternate(sides, rounds, torch.device("cpu"))
    ratios = [ratio(seconds, side=side, reference=2) for side in (0, 1)]
    return [task, f"{len(dataset['images'])}", f"{len(results)}", *medians(seconds), *ratios]


def score_conventionally(dataset: dict[str, Any], results: list[dict[str, Any]], task: str) -> COCOeval:
    """By pycocotools, given copies, in which it writes; for masks without the boxes, so that sizes are the masks'."""
    left_out = "bbox" if task == "segm" else "segmentation"
    entries = [{key: value for key, value in entry.items() if key != left_out} for entry in results]
    reference = COCO()
    reference.dataset = {**dataset, "annotations": [dict(entry) for entry in dataset["annotations"]]}
    with contextlib.redirect_stdout(io.StringIO()):
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(entries), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def synthetic_results(images: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A dataset of COCO's size and detections for it: most near an object, some of those of another class."""
    rng = np.random.default_rng(0)
    dataset: dict[str, Any] = {
        "images": [{"id": number, "height": HEIGHT, "width": WIDTH} for number in range(1, images + 1)],
        "annotations": [],
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, CATEGORIES + 1)],
    }
    results = []
    for image in range(1, images + 1):
        objects = [(int(rng.integers(1, CATEGORIES + 1)), random_box(rng)) for _ in range(1 + rng.poisson(OBJECTS - 1))]
        for category, box in objects:
            entry = {"id": len(dataset["annotations"]) + 1, "image_id": image, "category_id": category, "iscrowd": 0}
            outline = [random_outline(rng, box)]
            dataset["annotations"].append({**entry, "bbox": box, "area": box[2] * box[3], "segmentation": outline})
        for _ in range(DETECTIONS):
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


def random_outline(rng: np.random.Generator, box: list[float]) -> list[float]:
    """Of a blob that fills most of the box: 16 corners, x and y in turns."""
    x, y, width, height = box
    angles, radius = np.linspace(0, 2 * np.pi, 16, endpoint=False), rng.uniform(0.35, 0.5, 16)
    corners = [x + width * (0.5 + radius * np.cos(angles)), y + height * (0.5 + radius * np.sin(angles))]
    return [float(value) for value in np.stack(corners, axis=1).ravel()]


if __name__ == "__main__":
    main()
