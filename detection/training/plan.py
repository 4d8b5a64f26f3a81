"""A plan for a user's own data: schedule, image size and anchors, worked out from the images.

The recipes are for COCO, VOC and their like; their 90,000 iterations are 3,600 epochs of 400 images. Every value of the
plan has a reason, which is printed. A key that the command line sets is kept, and what depends on it follows.

The length follows from the number of images: 1,500 iterations of 16 images for 100, growing with their number to the
power of 0.64, which is 240 epochs of 100 images, 160 of 300, 105 of 1,000 and 46 of 10,000. Between these lie the
schedules that are published for few labels (Reed et al. 2022: 2,500 steps for 1,000 labels; COCO's 1x: 12 epochs of
118,000 images). From random weights 2 to 3 times as many are needed (He et al. 2019, "Rethinking ImageNet
Pre-training").
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from fvcore.common.config import CfgNode

from foundation.config import value_of
from foundation.names import counted

ITERATIONS, IMAGES, POWER, BATCH = 1500, 100, 0.64, 16
EVALUATIONS = 10
SHORTEST_PERIOD = 100  # iterations between two evaluations
LARGEST_SIDE = {"cuda": 800, "cpu": 320}  # of the shorter side; a CPU takes seconds for a larger image
SCALES = (0.8, 0.9, 1.0, 1.1, 1.2)  # of the shorter side in training
ASPECT = 5 / 3  # longest side; COCO's 1333 to 800
JITTERED = 1.28  # side of a training image with large-scale jitter, of the shorter side in evaluation: 1024 to 800
STEP = 8  # pixels; sizes are multiples of it
KEYS = (
    *("MODEL.MASK_ON", "INPUT.MASK_FORMAT", "MODEL.ANCHOR_GENERATOR.SIZES"),
    *("INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "INPUT.LSJ.SIZE"),
    *("SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS"),
    *("SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD", "TEST.PRECISE_BN.NUM_ITER"),
)  # that the plan sets


@dataclass(frozen=True)
class Images:
    """What the plan depends on.

    Attributes:
        count: of the training images.
        short_side: their median, in pixels.
        objects: the square roots of the areas of their boxes, relative to the shorter side of the image.
        masks: whether objects have masks, usable or not: the check reports broken ones only to a model with masks.
        coded_masks: whether an object that is not a crowd has its mask as a run-length code.
    """

    count: int
    short_side: float
    objects: Sequence[float]
    masks: bool
    coded_masks: bool = False


def survey(records: Sequence[dict[str, Any]], fraction: float = 1.0) -> Images:
    """What the plan depends on, of Detectron2's records; `fraction` of the images are trained on."""
    sides = [min(record["width"], record["height"]) for record in records]
    annotations = [(each, side) for record, side in zip(records, sides, strict=True) for each in record["annotations"]]
    objects = [(each, side) for each, side in annotations if not each.get("iscrowd", 0)]
    return Images(
        count=max(1, round(len(records) * fraction)),
        short_side=float(numpy.median(sides)),
        # Boxes are x, y, width, height.
        objects=[math.sqrt(abs(each["bbox"][2] * each["bbox"][3])) / side for each, side in objects],
        masks=any({"segmentation", "broken_mask"} & each.keys() for each, _ in annotations),
        coded_masks=any(isinstance(each.get("segmentation"), dict) for each, _ in objects),
    )


def apply(config: CfgNode, images: Images, device: str, given: Collection[str]) -> list[str]:
    """Set the config's keys, in place.

    Args:
        config: a recipe's.
        images: to train on.
        device: `cuda` or `cpu`.
        given: keys that stay as they are.

    Returns:
        For each key a line with its value and the reason.
    """
    lines = []
    for key, value, reason in _values(config, images, device):
        if key not in given:
            config.merge_from_list([key, value])
        lines.append(f"{key} {value_of(config, key)}: {'as given' if key in given else reason}")
    return lines


def _values(config: CfgNode, images: Images, device: str) -> Iterator[tuple[str, Any, str]]:
    """(key, value, reason), where each may depend on those before it, which have been set by then."""
    solver, test = config.SOLVER, config.TEST
    if not images.masks:
        yield "MODEL.MASK_ON", False, "the annotations have no masks"
    elif images.coded_masks:
        yield "INPUT.MASK_FORMAT", "bitmask", "the annotations have masks as run-length codes"
    available = counted(images.count, "image")
    recipe_batch = solver.IMS_PER_BATCH
    batch = min(recipe_batch, images.count)
    yield "SOLVER.IMS_PER_BATCH", batch, "the recipe's" if batch == recipe_batch else f"of {available}"
    rate = solver.BASE_LR * solver.IMS_PER_BATCH / recipe_batch
    yield "SOLVER.BASE_LR", rate, f"the recipe's for a batch of {solver.IMS_PER_BATCH}"
    iterations = max(1, round(ITERATIONS * (images.count / IMAGES) ** POWER * BATCH / solver.IMS_PER_BATCH))
    epochs = f"{counted(round(iterations * solver.IMS_PER_BATCH / images.count), 'epoch')} of {available}"
    yield "SOLVER.MAX_ITER", iterations, f"{epochs}; random weights need 2 to 3 times as many"
    total = solver.MAX_ITER
    steps = tuple(sorted({max(1, total * part // 9) for part in (6, 8)} - {total}))  # none of a single iteration
    yield "SOLVER.STEPS", steps, "two thirds and eight ninths of the iterations"
    yield "SOLVER.WARMUP_ITERS", min(solver.WARMUP_ITERS, max(1, total // 10)), "at most a tenth of the iterations"
    period = min(total, max(SHORTEST_PERIOD, math.ceil(total / EVALUATIONS)))
    count = math.ceil(total / period)
    yield "TEST.EVAL_PERIOD", period, f"{counted(count, 'evaluation')}; the best weights are kept as model_best.pth"
    yield "SOLVER.CHECKPOINT_PERIOD", test.EVAL_PERIOD or period, "a checkpoint for each evaluation"
    passes = min(test.PRECISE_BN.NUM_ITER, max(10, math.ceil(images.count / solver.IMS_PER_BATCH)))
    yield "TEST.PRECISE_BN.NUM_ITER", passes, "at most one pass through the images"
    most = LARGEST_SIDE[device]
    side = STEP * max(8, round(min(images.short_side, most) / STEP))
    why = f"the images' shorter side is {images.short_side:.0f} pixels"
    yield "INPUT.MIN_SIZE_TEST", side, why + (f", bounded to {most} on this device" if images.short_side > most else "")
    side = config.INPUT.MIN_SIZE_TEST or side
    sizes = tuple(sorted({STEP * round(side * scale / STEP) for scale in SCALES}))
    yield "INPUT.MIN_SIZE_TRAIN", sizes, "up to a fifth smaller and larger"
    longest = STEP * math.ceil(side * ASPECT / STEP)
    yield "INPUT.MAX_SIZE_TEST", longest, "5/3 of the shorter side, as for COCO"
    yield "INPUT.MAX_SIZE_TRAIN", STEP * math.ceil(max(sizes) * ASPECT / STEP), "the same"
    if config.INPUT.LSJ.ENABLED:
        jittered = max(32, STEP * round(JITTERED * side / STEP))
        yield "INPUT.LSJ.SIZE", jittered, f"{JITTERED} times the shorter side, as in the published recipe"
    anchors = config.MODEL.ANCHOR_GENERATOR.SIZES
    if images.objects and len(anchors) > 1 and all(len(level) == 1 for level in anchors):
        small, large = (float(value) * side for value in numpy.quantile(images.objects, (0.1, 0.9)))
        middle = math.exp(numpy.mean([math.log(level[0]) for level in anchors]))
        octaves = round(math.log2(math.sqrt(max(small, 1) * max(large, 1)) / middle))
        octaves = max(octaves, math.ceil(math.log2(8 / anchors[0][0])))  # smaller than a stride of 4 allows
        scaled = [level[0] * 2.0**octaves for level in anchors]
        fitted = [[int(size) if size.is_integer() else size] for size in scaled]
        reason = f"most objects have {small:.0f} to {large:.0f} pixels in resized images"
        yield "MODEL.ANCHOR_GENERATOR.SIZES", fitted, reason
