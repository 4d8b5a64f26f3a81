"""Fine-tuning and evaluating a detector, with this project and with stock Detectron2.

    python benchmarks/detector.py                       a CPU: the recipes for the embedded scenes
    python benchmarks/detector.py --device cuda         the recipes for COCO, on pictures of COCO's size
    python benchmarks/detector.py --part scores --images 5000      COCO's AP alone, as many detections as val2017 has
    python benchmarks/detector.py --part models --device cuda --kernels      with the longest kernels of an iteration

Models: both sides train the same model on the same pictures, from the same random weights, and then detect with it.
Ours is the recipe as it is; stock is Detectron2's default trainer with its loader, in float32. An iteration is all of
it, from reading the images to the updated weights, and the share of ours that is spent waiting for data stands beside
it. On a CPU with one thread neither side has worker processes, so that their work is counted too. Detection uses the
nearly random weights after these iterations, which give the largest allowed number of detections in every image.

On a CPU the sides take turns. On a GPU one is measured after the other, each alone in the GPU's memory and after some
iterations, because in turns they divide the memory into blocks that do not fit the other, and because each new shape
costs the host a choice of convolution and each first use of a kernel its loading.

Parts: what further iterations of each side consist of, each part from an empty queue of the GPU to an empty queue. The
parts together take longer than an iteration does, in which the host works ahead of the GPU. `kernels` is how long the
GPU computes in an iteration that is not divided.

Targets: ours beside Detectron2's, the masks that the mask head learns, for the objects and regions of 16 images: 512
regions of each, of which 128 are on objects. Timed are the choice of the regions' polygons and their rasterisation.

Scores: both sides get the same detections in COCO's results format, and the same annotations in memory, and give AP.

Evaluator: ours beside Detectron2's with pycocotools, on detections as models return them, with masks of the image's
size. Timed are the processing of an image, which encodes the masks, and the evaluation at the end: AP of boxes and
masks, and the files. Ours includes the analysis of errors.
"""

import argparse
import contextlib
import gc
import io
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from coco_like import CATEGORIES, HEIGHT, OBJECTS, WIDTH, synthetic_results
from fvcore.common.config import CfgNode
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from timing import Side, alternate, build_parser, clock_for, print_table, ratio, start, wait_for

from detection.config import computes_in_bfloat16, for_one_process, load
from detection.data.polygons import RegionPolygons
from detection.evaluation import scores
from detection.evaluation.coco import FastCOCOEvaluator, analyse
from detection.training.trainer import TransferTrainer
from foundation.errors import run
from shapes import CLASSES, Recipe, ensure_rendered

# isort: split
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

TRAIN, TEST, SCORED = "benchmark_train", "benchmark_val", "benchmark_scored"
IMAGES, NOTED = 8, 10  # images to detect in; images for an evaluator to process
TARGET_IMAGES, REGIONS, ON_OBJECTS = 16, 512, 128  # the recipes' regions of an image; at most a quarter is on objects
WARM_UP = 6  # iterations on a GPU that are not measured
DIVIDED = 3  # iterations that are divided into parts
LONGEST = 12  # kernels to print
DIVISION = (*("iteration", "matching", "proposals", "mask targets", "backward", "optimizer", "the rest", "kernels"),)


class Case(NamedTuple):
    """A recipe of configs/detection for each device, and what to change in it."""

    cpu: str
    cuda: str
    changes: tuple[object, ...] = ()


CASES = {"C4": Case("shapes_R50_C4", "coco_R50_C4_1x"), "FPN": Case("shapes_R18_FPN", "coco_R50_FPN_1x_moco")}
SMALL = ("INPUT.MIN_SIZE_TRAIN", [64], "INPUT.MIN_SIZE_TEST", 64, "SOLVER.IMS_PER_BATCH", 2)
QUICK = {"FPN": Case("shapes_R18_FPN", "shapes_R18_FPN", SMALL)}


class Detecting:
    """Detects in a few images, passes the detections to an evaluator, and counts them for each image."""

    def __init__(
        self, model: torch.nn.Module, evaluator: DatasetEvaluator, batches: Sequence[list[dict[str, Any]]]
    ) -> None:
        self.model, self.evaluator, self.batches = model, evaluator, batches
        self.found = 0.0

    def __call__(self) -> None:
        """All images once."""
        self.evaluator.reset()
        self.model.eval()
        counts = []
        with torch.no_grad():
            for images in self.batches:  # of one each, as Detectron2's loader has them
                outputs = self.model(images)
                counts += [len(output["instances"]) for output in outputs]
                self.evaluator.process(images, outputs)
        self.found = float(np.mean(counts))


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

    def divide(self, device: torch.device) -> dict[str, float]:
        """Seconds of an iteration, of its parts and of the rest: of a further iteration, the median of some."""
        model, optimizer = self.trainer.model, self.trainer._trainer.optimizer
        proposing, heads = type(model.proposal_generator), type(model.roi_heads)
        parts: tuple[tuple[str, Any, str], ...] = (
            ("matching", proposing, "label_and_sample_anchors"),
            ("proposals", proposing, "predict_proposals"),
            ("matching", heads, "label_and_sample_proposals"),
            ("mask targets", PolygonMasks, "crop_and_resize"),
            ("mask targets", RegionPolygons, "crop_and_resize"),
            ("backward", torch.Tensor, "backward"),
            ("optimizer", optimizer, "step"),
        )
        found = []
        for _ in range(DIVIDED):
            seconds = dict.fromkeys(("iteration", *(name for name, *_ in parts)), 0.0)
            with contextlib.ExitStack() as patches:
                for name, owner, method in parts:
                    timed = measured(getattr(owner, method), name, seconds, device)
                    patches.enter_context(mock.patch.object(owner, method, timed))
                measured(self, "iteration", seconds, device)()
            found.append({**seconds, "the rest": 2 * seconds["iteration"] - sum(seconds.values())})
        return sorted(found, key=lambda each: each["iteration"])[DIVIDED // 2]

    def profile(self) -> tuple[float, str]:
        """Seconds for which the GPU computes in an iteration, and the longest kernels as a table."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            self()
            torch.cuda.synchronize()
        totals: dict[str, list[float]] = {}
        for event in profile.events():
            if event.name.startswith("Optimizer.") or getattr(event, "is_user_annotation", False):
                continue  # a span that holds kernels
            if event.device_type == torch.autograd.DeviceType.CUDA:
                totals.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e6)
        longest = sorted(totals.items(), key=lambda entry: -sum(entry[1]))[:LONGEST]
        lines = [f"{sum(times):8.4f} s in {len(times):5} calls  {name[:90]}" for name, times in longest]
        return sum(map(sum, totals.values())), "\n".join(lines)


def measured(
    function: Callable[..., Any], name: str, seconds: dict[str, float], device: torch.device
) -> Callable[..., Any]:
    """The function, which adds its time to `seconds[name]`, with the GPU's queue empty before and after."""
    clock = clock_for(device)

    def call(*args: Any, **options: Any) -> Any:
        wait_for(device)
        began = clock()
        result = function(*args, **options)
        wait_for(device)
        seconds[name] += clock() - began
        return result

    return call


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = build_parser("Seconds of an iteration, an evaluated image, an evaluation.", threads=1, rounds=5)
    parser.add_argument(
        "--part", choices=("models", "targets", "scores", "evaluator"), help="one of the tables; all by default"
    )
    parser.add_argument("--model", choices=CASES, help="one of the models; all by default")
    parser.add_argument("--batch", type=int, default=0, help="another batch size")
    parser.add_argument("--precision", default="auto", help="ours: float32, bfloat16, or auto, by the device")
    parser.add_argument("--nchw", action="store_true", help="ours with PyTorch's default layout of memory on GPUs too")
    parser.add_argument("--kernels", action="store_true", help="print the longest kernels of an iteration on a GPU")
    parser.add_argument("--images", type=int, default=500, help="images to score (%(default)s; val2017 has 5000)")
    parser.add_argument("--detections", type=int, default=100, help="in each image (%(default)s, the most that count)")
    args = parser.parse_args(argv)
    device = start(args)
    torch.backends.cudnn.benchmark = False  # as in both sides' training: their images have many shapes
    logging.getLogger("detectron2").setLevel(logging.INFO)  # else it sets up its log, which goes between the tables
    rounds = 1 if args.quick else args.rounds
    if args.part in (None, "models"):
        cases = QUICK if args.quick else {args.model: CASES[args.model]} if args.model else CASES
        with tempfile.TemporaryDirectory() as folder:
            large = device.type == "cuda" and not args.quick
            register_pictures(Path(folder), (480, 640) if large else (160, 192), 4 if args.quick else 32)
            configs = {name: configure(case, device, args, folder) for name, case in cases.items()}
            divided: list[list[str]] = []
            rows = (
                row
                for name, config in configs.items()
                for row in compare_models(name, config, rounds, device, args, divided)
            )
            header = ["model", "time of", "precision", "ours, s", "stock, s", "stock / ours", "waiting for data"]
            try:
                print_table(header, rows)
            finally:
                print()
                print_table(["model", "side", *(f"{part}, s" for part in DIVISION), "memory, GiB", "retries"], divided)
    if args.part is None:
        print()
    if args.part in (None, "targets"):
        header = ["targets for", "images", "regions", "side", "ours, s", "Detectron2's, s", "Detectron2's / ours"]
        print_table(header, (compare_targets(*head, rounds) for head in (("FPN", 28), ("C4", 14))))
    if args.part in ("models", "targets"):
        return
    print()
    scored = synthetic_results(3 if args.quick else args.images, args.detections)
    if args.part != "evaluator":
        rows = (compare_scores(task, *scored, min(rounds, 3)) for task in ("bbox", "segm"))
        header = ["AP of", "images", "detections", "ours, s", "with analysis, s", "pycocotools, s"]
        print_table([*header, "pycocotools / ours", "pycocotools / with analysis"], rows)
        print()
    if args.part != "scores":
        with tempfile.TemporaryDirectory() as folder:
            header = ["evaluator", "images", "detections", "ours, s", "Detectron2's, s", "Detectron2's / ours"]
            print_table(header, compare_evaluators(*scored, min(rounds, 3), Path(folder)))


def register_pictures(folder: Path, sides: tuple[int, int], count: int) -> None:
    """Scenes with polygons, `count` to train on and as many to detect on, under the names TRAIN and TEST."""
    amounts = {"unlabeled": 0, "objects_train": 0, "objects_val": 0, "scenes_train": count, "scenes_val": count}
    recipe = Recipe(**amounts, scene_sides=sides, scene_objects=OBJECTS)
    scenes = ensure_rendered(folder / "shapes", recipe=recipe, processes=1, progress=False) / "scenes"
    for name in (TRAIN, TEST):
        split = name.removeprefix("benchmark_")
        register_coco_instances(name, {}, str(scenes / f"annotations/instances_{split}.json"), str(scenes / split))


def configure(case: Case, device: torch.device, args: argparse.Namespace, folder: str) -> CfgNode:
    """The recipe for the device, on the rendered pictures."""
    data = ("DATASETS.TRAIN", (TRAIN,), "DATASETS.TEST", (TEST,), "MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES))
    changes = (*case.changes, *data, "MODEL.DEVICE", device.type, "OUTPUT_DIR", folder)
    changes += ("SOLVER.PRECISION", args.precision, *(("SOLVER.IMS_PER_BATCH", args.batch) if args.batch else ()))
    config = load(case.cuda if device.type == "cuda" else case.cpu, [str(change) for change in changes])
    if device.type == "cpu" and torch.get_num_threads() == 1:
        config.DATALOADER.NUM_WORKERS = 0
    return for_one_process(config)[0]


def compare_models(
    name: str, config: CfgNode, rounds: int, device: torch.device, args: argparse.Namespace, divided: list[list[str]]
) -> Iterator[list[str]]:
    """A row for an iteration of training, then one for an image that is evaluated; for each side one to `divided`."""
    stock = config.clone()
    stock.SOLVER.PRECISION = "float32"
    if config.DATALOADER.NUM_WORKERS:
        stock.DATALOADER.NUM_WORKERS = 4  # Detectron2's default

    def build_ours() -> DefaultTrainer:
        trainer = TransferTrainer(config)
        if args.nchw:
            trainer.model.to(memory_format=torch.contiguous_format)
        return trainer

    sides = {
        "ours": (build_ours, partial(TransferTrainer.build_evaluator, config, TEST)),
        "stock": (partial(DefaultTrainer, stock), partial(COCOEvaluator, TEST, use_fast_impl=False)),
    }
    if device.type == "cuda":
        ours = measure([sides["ours"]], config, rounds, device, args.kernels)
        found = [ours, measure([sides["stock"]], config, rounds, device, args.kernels, ours)]
    else:
        found = [measure(list(sides.values()), config, rounds, device, kernels=False)]
    precision = "bfloat16" if computes_in_bfloat16(config) else "float32"
    rows = zip(sides, (row for each in found for row in each.divided), strict=True)
    divided += [[name, side, *row] for side, row in rows]
    training, evaluating = (
        np.concatenate([each.training for each in found], axis=1),
        np.concatenate([each.evaluating for each in found], axis=1),
    )
    iteration = f"iteration of {config.SOLVER.IMS_PER_BATCH} images"
    waiting = f"{found[0].waiting:.1%}"
    yield [name, iteration, precision, *medians(training), ratio(training, side=0, reference=1), waiting]
    image = f"image evaluated, {found[0].detections:.0f} detections"
    yield [name, image, precision, *medians(evaluating), ratio(evaluating, side=0, reference=1), ""]


class Measured(NamedTuple):
    """Of sides that took turns.

    Attributes:
        training: seconds of iterations, (rounds, sides).
        evaluating: seconds of images, (rounds, sides).
        waiting: the first side's share of an iteration that is spent waiting for data.
        detections: of the first side in an image.
        divided: for each side the cells of the table of parts.
        initial: the first side's weights before training.
        trained: and after it.
    """

    training: np.ndarray
    evaluating: np.ndarray
    waiting: float
    detections: float
    divided: list[list[str]]
    initial: dict[str, torch.Tensor]
    trained: dict[str, torch.Tensor]


def measure(
    sides: Sequence[tuple[Callable[[], DefaultTrainer], Callable[[], DatasetEvaluator]]],
    config: CfgNode,
    rounds: int,
    device: torch.device,
    kernels: bool,
    like: Measured | None = None,
) -> Measured:
    """Train with each side's trainer, then detect and evaluate, from the weights of `like` or else of the first."""
    gc.collect()  # the trainers measured before, which refer to each other, free the GPU's memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    training = [Training(build()) for build, _ in sides]
    models = [side.trainer.model for side in training]
    initial = share_weights(models, like and like.initial)
    for _ in range(WARM_UP if device.type == "cuda" else 0):
        for side in training:
            side()
    seconds = alternate(training, rounds, device)
    waiting = float(np.median(training[0].waiting[-rounds:]))
    divided = [describe_parts(side, device, kernels) for side in training]
    trained = share_weights(models, like and like.trained)
    batches = list(islice(TransferTrainer.build_test_loader(config, TEST), IMAGES))
    detecting = [Detecting(model, build(), batches) for model, (_, build) in zip(models, sides, strict=True)]
    evaluating = alternate(detecting, rounds, device) / len(batches)
    return Measured(seconds, evaluating, waiting, detecting[0].found, divided, initial, trained)


def describe_parts(side: Training, device: torch.device, kernels: bool) -> list[str]:
    """The cells of the parts of an iteration, the memory and how often it ran out and was freed."""
    parts = side.divide(device)
    if device.type != "cuda":
        return [*(f"{parts[part]:.3g}" if part in parts else "" for part in DIVISION), "", ""]
    parts["kernels"], longest = side.profile()
    if kernels:
        print(f"{type(side.trainer).__name__}\n{longest}\n", flush=True)
    memory = torch.cuda.memory_stats()
    gigabytes = memory["allocated_bytes.all.peak"] / 2**30
    return [*(f"{parts[part]:.3g}" for part in DIVISION), f"{gigabytes:.1f}", f"{memory['num_alloc_retries']}"]


def share_weights(
    models: Sequence[torch.nn.Module], weights: dict[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Give all models the weights, or else those of the first; they are returned, on the CPU."""
    weights = weights or {name: value.to("cpu", copy=True) for name, value in models[0].state_dict().items()}
    for model in models:
        model.load_state_dict(weights)
    return weights


def medians(seconds: np.ndarray) -> list[str]:
    """Of each side."""
    return [f"{time:.3g}" for time in np.median(seconds, axis=0)]


def compare_targets(name: str, side: int, rounds: int) -> list[str]:
    """A row: the targets of a mask head whose output has this side.

    Raises:
        RuntimeError: a target differs.
    """
    dataset, _ = synthetic_results(TARGET_IMAGES, 0)
    objects: list[list[list[np.ndarray]]] = [[] for _ in range(TARGET_IMAGES)]
    for entry in dataset["annotations"]:
        objects[entry["image_id"] - 1].append([np.array(part) for part in entry["segmentation"]])
    found: dict[str, list[torch.Tensor]] = {}
    regions = [sample_regions(PolygonMasks(polygons)) for polygons in objects]

    def rasterise(masks: Sequence[PolygonMasks], key: str) -> None:
        found[key] = [
            each[chosen][on_objects].crop_and_resize(boxes, side)
            for each, (chosen, on_objects, boxes) in zip(masks, regions, strict=True)
        ]

    ours = partial(rasterise, [RegionPolygons(polygons) for polygons in objects], "ours")
    theirs = partial(rasterise, [PolygonMasks(polygons) for polygons in objects], "theirs")
    seconds = alternate_cleanly([ours, theirs], rounds)
    if not all(map(torch.equal, found["ours"], found["theirs"])):
        raise RuntimeError("the targets differ from Detectron2's")
    count = sum(map(len, found["ours"]))
    return [name, f"{TARGET_IMAGES}", f"{count}", f"{side}", *medians(seconds), ratio(seconds, side=0, reference=1)]


def sample_regions(masks: PolygonMasks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The objects of the regions of an image, those of the regions that are on objects, and these regions' boxes."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(masks), (REGIONS,), generator=generator)
    on_objects = torch.randperm(REGIONS, generator=generator)[:ON_OBJECTS]
    boxes = masks.get_bounding_boxes().tensor[chosen][on_objects]
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return chosen, on_objects, boxes + 0.08 * sides * torch.randn(len(boxes), 4, generator=generator)


def compare_scores(task: str, dataset: dict[str, Any], results: list[dict[str, Any]], rounds: int) -> list[str]:
    """A row: ours without and with the analysis that a report draws, and pycocotools."""
    sides: list[Side] = [
        lambda: scores.score(dataset, results, task),
        lambda: analyse(scores.score(dataset, results, task)),
        lambda: score_conventionally(dataset, results, task),
    ]
    seconds = alternate_cleanly(sides, rounds)
    ratios = [ratio(seconds, side=side, reference=2) for side in (0, 1)]
    return [task, f"{len(dataset['images'])}", f"{len(results)}", *medians(seconds), *ratios]


def alternate_cleanly(sides: Sequence[Side], rounds: int) -> np.ndarray:
    """As `alternate` on the CPU. Before each side, off the clock, the garbage is collected that the one before left."""
    return alternate([step for side in sides for step in (gc.collect, side)], rounds, torch.device("cpu"))[:, 1::2]


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


def compare_evaluators(
    dataset: Mapping[str, Any], results: Sequence[Mapping[str, Any]], rounds: int, folder: Path
) -> Iterator[list[str]]:
    """A row for the processing of images, and one for the evaluation at the end."""
    (folder / "annotations.json").write_text(json.dumps(dataset))
    register_coco_instances(SCORED, {}, str(folder / "annotations.json"), str(folder))
    tasks = ("bbox", "segm")
    same = list(range(CATEGORIES + 1))  # the synthetic detections name categories by their ids, as without a model
    evaluators = [
        FastCOCOEvaluator(SCORED, tasks, output_dir=str(folder / "ours"), category_ids=same),
        COCOEvaluator(SCORED, tasks, output_dir=str(folder / "stock"), use_fast_impl=False),
    ]
    number = dataset["images"][0]["id"]
    shown = as_a_model_gives([entry for entry in results if entry["image_id"] == number])
    grouped: dict[int, list[Mapping[str, Any]]] = {image["id"]: [] for image in dataset["images"]}
    for entry in results:
        grouped[entry["image_id"]].append(entry)
    for name, side, images, count in (
        ("notes images", partial(note, image=number, found=shown), NOTED, NOTED * len(shown)),
        ("evaluates", partial(evaluate, grouped=grouped), len(grouped), len(results)),
    ):
        seconds = alternate_cleanly([partial(side, each) for each in evaluators], rounds)
        yield [name, f"{images}", f"{count}", *medians(seconds), ratio(seconds, side=0, reference=1)]


def as_a_model_gives(results: Sequence[Mapping[str, Any]]) -> Instances:
    """Detections in one image, with masks (H, W) of the image's size, in row-major memory as pasting makes them."""
    boxes = torch.tensor([entry["bbox"] for entry in results])
    regions = np.stack([masks.decode(entry["segmentation"]) for entry in results])
    return Instances(
        (HEIGHT, WIDTH),
        pred_boxes=Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)),
        pred_classes=torch.tensor([entry["category_id"] for entry in results]),
        scores=torch.tensor([entry["score"] for entry in results]),
        pred_masks=torch.from_numpy(np.ascontiguousarray(regions)).bool(),
    )


def note(evaluator: COCOEvaluator, image: int, found: Instances) -> None:
    """Process the same image NOTED times."""
    evaluator.reset()
    for _ in range(NOTED):
        evaluator.process([{"image_id": image}], [{"instances": found}])


def evaluate(evaluator: COCOEvaluator, grouped: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
    """AP and files of processed detections; of copies, because pycocotools changes them."""
    evaluator._predictions = [
        {"image_id": image, "instances": [dict(entry) for entry in found]} for image, found in grouped.items()
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()


if __name__ == "__main__":
    run(main)
