"""The configuration of a detector: Detectron2's keys and defaults, and those that this project adds.

Recipes lie in `configs/detection`. A wrong key, a wrong type or a value that no run can have is a `UserError`
before anything starts.
"""

from collections.abc import Iterator, Sequence

import torch
from fvcore.common.config import CfgNode

import foundation.detectron2_compat  # noqa: F401
from detection import newer_keys
from foundation.config import find_config, load_config
from foundation.errors import UserError

# isort: split
from detectron2.config import get_cfg

# Norms whose statistics are taken over all processes.
SYNCHRONISED = ("SyncBN", "naiveSyncBN", "naiveSyncBN_N")
PRECISIONS = ("float32", "bfloat16", "auto")
MATMUL_PRECISIONS = ("highest", "high", "medium")
SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")


def default_config() -> CfgNode:
    """Detectron2's defaults and this project's own keys."""
    config = get_cfg()
    config.SEED = 0  # Detectron2's -1, a new one each run, is not taken
    config.OUTPUT_DIR = "output/detection"
    add_own_keys(config)
    return config


def add_own_keys(config: CfgNode) -> None:
    """Put in the keys that Detectron2 does not have, with their defaults."""
    # Share of the training images, in (0, 1], and the seed of its choice: a smaller share with the same seed
    # is a part of a larger one, and runs that differ in SEED see the same images.
    config.DATASETS.FRACTION = 1.0
    config.DATASETS.FRACTION_SEED = 0
    # Of the model, in training and evaluation: float32, bfloat16 (by autocast), or auto: bfloat16 where the
    # device multiplies in it. Detectron2's SOLVER.AMP is float16, and for CUDA only.
    config.SOLVER.PRECISION = "float32"
    # Passes of the model for each step of the optimizer, with IMS_PER_BATCH / (processes * ACCUMULATION) images each:
    # 8 keep the protocol's batch of 16 on one GPU that holds 2 images (detection/training/accumulation.py has the one
    # difference, batch norm). REFERENCE_WORLD_SIZE, Detectron2's, is the other way: the number of processes that batch,
    # rate and schedule are meant for, to be scaled to what is there (0: do not).
    config.SOLVER.ACCUMULATION = 1
    # All lengths of the schedule are multiplied by DATASETS.FRACTION ** this. 0: as many iterations on fewer images, so
    # that each is seen more often; 1: as many epochs; 0.5: in between. There is no agreed schedule for few labels, and
    # they lie far apart: with 1 % of COCO, the 2x schedule is 2,456 epochs with 0, and 1,800 iterations with 1. The
    # default is 0, because a schedule should not change unasked.
    config.SOLVER.FRACTION_EXPONENT = 0.0
    # So many of the newest checkpoints stay, besides model_final; 0: all. One is enough to resume from, and a second
    # for when it is damaged.
    config.SOLVER.KEEP_CHECKPOINTS = 2
    # The metric whose best evaluation is kept as `model_best.pth`; "": bbox/AP, or what stands for it where there are
    # no boxes. Only where TEST.EVAL_PERIOD makes several evaluations. Training ends when so many of them in a row have
    # not been better (0: never).
    config.TEST.BEST_METRIC = ""
    config.TEST.PATIENCE = 0


def load(name: str, overrides: Sequence[str] = ()) -> CfgNode:
    """The defaults, changed by the recipe `name` (a path, or a file of `configs/detection`), then by pairs.

    Raises:
        UserError: no such recipe, a key that does not exist, a wrong type, a value out of its range.
    """
    defaults = default_config()
    added = newer_keys.add(defaults, find_config(name, "detection"))
    config = load_config(defaults, name, "detection", overrides)
    newer_keys.remove(config, added)
    for key, value, least in (
        ("SOLVER.IMS_PER_BATCH", config.SOLVER.IMS_PER_BATCH, 1),
        ("SOLVER.MAX_ITER", config.SOLVER.MAX_ITER, 1),
        ("SOLVER.CHECKPOINT_PERIOD", config.SOLVER.CHECKPOINT_PERIOD, 1),
        ("SOLVER.ACCUMULATION", config.SOLVER.ACCUMULATION, 1),
        ("SOLVER.REFERENCE_WORLD_SIZE", config.SOLVER.REFERENCE_WORLD_SIZE, 0),
        ("SOLVER.KEEP_CHECKPOINTS", config.SOLVER.KEEP_CHECKPOINTS, 0),
        ("SOLVER.FRACTION_EXPONENT", config.SOLVER.FRACTION_EXPONENT, 0),
        ("TEST.PATIENCE", config.TEST.PATIENCE, 0),
        ("SEED", config.SEED, 0),  # a run can be resumed only if it can be repeated
        ("DATALOADER.NUM_WORKERS", config.DATALOADER.NUM_WORKERS, 0),
        ("MODEL.ROI_HEADS.NUM_CLASSES", config.MODEL.ROI_HEADS.NUM_CLASSES, 1),
    ):
        if value < least:
            raise UserError(f"{key} must be at least {least}, not {value}")
    if not 0 < config.DATASETS.FRACTION <= 1:
        raise UserError(f"DATASETS.FRACTION must be above 0 and at most 1, not {config.DATASETS.FRACTION}")
    if config.DATALOADER.SAMPLER_TRAIN not in SAMPLERS:
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN must be one of {SAMPLERS}, not {config.DATALOADER.SAMPLER_TRAIN!r}; a share of"
            " the images is DATASETS.FRACTION"
        )
    if config.SOLVER.AMP.ENABLED:
        raise UserError(
            "SOLVER.AMP.ENABLED, Detectron2's float16, is not taken: set SOLVER.PRECISION bfloat16 instead, which needs"
            " no scaling of the loss and works on GPU and CPU"
        )
    if config.get("FLOAT32_PRECISION", "") not in ("", *MATMUL_PRECISIONS):  # a key of Detectron2's main branch
        raise UserError(f"FLOAT32_PRECISION must be one of {MATMUL_PRECISIONS}, not {config.FLOAT32_PRECISION!r}")
    if config.SOLVER.PRECISION not in PRECISIONS:
        raise UserError(f"SOLVER.PRECISION must be one of {PRECISIONS}, not {config.SOLVER.PRECISION!r}")
    if not config.SOLVER.BASE_LR > 0:
        raise UserError(f"SOLVER.BASE_LR must be above 0, not {config.SOLVER.BASE_LR}")
    if config.MODEL.RESNETS.DEPTH not in (18, 34, 50, 101, 152):
        raise UserError(f"MODEL.RESNETS.DEPTH must be 18, 34, 50, 101 or 152, not {config.MODEL.RESNETS.DEPTH}")
    for key in ("TRAIN", "TEST"):
        if not config.DATASETS[key]:
            raise UserError(f"DATASETS.{key} names no dataset")
    if len(config.DATASETS.TEST) > 1:
        raise UserError(f"DATASETS.TEST must name one dataset, not {', '.join(config.DATASETS.TEST)}")
    return config


def for_one_process(config: CfgNode) -> tuple[CfgNode, list[str]]:
    """A copy in which each synchronised batch norm is an ordinary one, and the keys that changed.

    With one process the two compute the same, but PyTorch's SyncBatchNorm refuses a CPU.
    """
    config = config.clone()
    changed = []
    for prefix, node in _nodes(config.MODEL, "MODEL"):
        if node.get("NORM") in SYNCHRONISED:
            node.NORM = "BN"
            changed.append(f"{prefix}.NORM")
    return config, changed


def computes_in_bfloat16(config: CfgNode) -> bool:
    """Whether the model runs under autocast, on the device `MODEL.DEVICE`."""
    if config.SOLVER.PRECISION != "auto":
        return config.SOLVER.PRECISION == "bfloat16"
    if config.MODEL.DEVICE == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Elsewhere bfloat16 is emulated and slower than float32. PyTorch's names for the question are private.
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in asked)


def _nodes(config: CfgNode, prefix: str) -> Iterator[tuple[str, CfgNode]]:
    yield prefix, config
    for key, value in config.items():
        if isinstance(value, CfgNode):
            yield from _nodes(value, f"{prefix}.{key}")
