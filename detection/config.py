"""The configuration of a detector: Detectron2's keys and defaults, and the keys that this project adds.

Recipes are in `configs/detection`. A wrong key, a wrong type, a value that no run can have, and a key of Detectron2's
that would have no effect here are a `UserError` before anything starts.
"""

import importlib.util
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from foundation.config import find_config, in_range, keys, load_config, one_of, value_of
from foundation.detectron2_compat import MissingOperators
from foundation.errors import UserError

# isort: split
from detectron2.config import get_cfg

# Norms whose statistics are taken over all processes.
SYNCHRONISED = ("SyncBN", "naiveSyncBN", "naiveSyncBN_N")
NORMS = ("", "BN", "FrozenBN", "GN", "nnSyncBN", *SYNCHRONISED)
PRECISIONS = ("float32", "bfloat16", "auto")
MATMUL_PRECISIONS = ("highest", "high", "medium")
SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")
DEPTHS = (18, 34, 50, 101, 152)
# Width of the first stage, which Detectron2 wants to be told: of basic blocks, and of bottlenecks.
RES2_CHANNELS = {18: 64, 34: 64, 50: 256, 101: 256, 152: 256}

# Keys of Detectron2's main branch that its release v0.6 lacks, with the values with which main computes what v0.6 does
# (detectron2/config/defaults.py of both). A run's `config.yaml` holds every key there is: v0.6 accepts these with these
# values, so that a file written with one Detectron2 is read with the other.
NEWER_KEYS: dict[str, Any] = {
    "DATALOADER.REPEAT_SQRT": True,
    "FLOAT32_PRECISION": "",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": 0.5,
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": 50,
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": False,
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": False,
    "SOLVER.BASE_LR_END": 0.0,
    "SOLVER.NUM_DECAYS": 3,
    "SOLVER.RESCALE_INTERVAL": False,
}

PROPOSALS = "proposals are computed by the model, and not read from files"
# Keys of Detectron2's that have no effect here, with the reason. Another value than the default is refused.
REFUSED = {
    "VERSION": "configs of version 2 are read",
    "MODEL.LOAD_PROPOSALS": PROPOSALS,
    "DATASETS.PROPOSAL_FILES_TRAIN": PROPOSALS,
    "DATASETS.PROPOSAL_FILES_TEST": PROPOSALS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": PROPOSALS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": PROPOSALS,
    "SOLVER.AMP.ENABLED": "set SOLVER.PRECISION bfloat16 instead of Detectron2's float16: it needs no scaling of the"
    " loss, and works on GPU and CPU",
    "GLOBAL.HACK": "Detectron2 does not use it either",
}
MINIMA = {
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.ACCUMULATION": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.REFERENCE_WORLD_SIZE": 0,
    "SOLVER.KEEP_CHECKPOINTS": 0,
    "SOLVER.GAMMA": 0,
    "SOLVER.MOMENTUM": 0,
    "SOLVER.WARMUP_FACTOR": 0,
    "SOLVER.WEIGHT_DECAY": 0,
    "SOLVER.FRACTION_EXPONENT": 0,
    "TEST.EVAL_PERIOD": 0,
    "TEST.PATIENCE": 0,
    "LOG.PICTURES": 0,
    "TEST.PRECISE_BN.NUM_ITER": 1,
    "SEED": 0,  # a run can be resumed only if it can be repeated
    "DATALOADER.NUM_WORKERS": 0,
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "INPUT.MAX_SIZE_TRAIN": 1,
    "INPUT.MAX_SIZE_TEST": 1,
    "INPUT.MIN_SIZE_TEST": 0,  # 0: do not resize
}
# A key, a value, and the keys that have no effect with it.
SWITCHES: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("SOLVER.OPTIMIZER", "AdamW", ("SOLVER.MOMENTUM", "SOLVER.NESTEROV")),
    ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", ("SOLVER.STEPS", "SOLVER.GAMMA")),
    ("DATASETS.FRACTION", 1.0, ("DATASETS.FRACTION_SEED", "SOLVER.FRACTION_EXPONENT")),
    ("DATALOADER.SAMPLER_TRAIN", "TrainingSampler", ("DATALOADER.REPEAT_THRESHOLD", "DATALOADER.REPEAT_SQRT")),
    ("TEST.EVAL_PERIOD", 0, ("TEST.BEST_METRIC",)),
    ("INPUT.LSJ.ENABLED", True, ("INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "INPUT.MAX_SIZE_TRAIN")),
)
BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
CHOICES = {
    "SOLVER.PRECISION": PRECISIONS,
    "SOLVER.OPTIMIZER": ("SGD", "AdamW"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    "INPUT.FORMAT": ("RGB", "BGR"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.CROP.TYPE": ("relative", "relative_range", "absolute", "absolute_range"),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
}


def default_config() -> CfgNode:
    """Detectron2's defaults and this project's own keys."""
    config = get_cfg()
    config.SEED = 0  # Detectron2's -1, a new seed for each run, is not allowed
    config.OUTPUT_DIR = "output/detection"
    add_own_keys(config)
    return config


def add_own_keys(config: CfgNode) -> None:
    """Add the keys that Detectron2 does not have, with their defaults."""
    # Fraction of the training images, in (0, 1], and the seed of its choice: with the same seed, a smaller fraction is
    # part of a larger one, and runs that differ in SEED see the same images.
    config.DATASETS.FRACTION = 1.0
    config.DATASETS.FRACTION_SEED = 0
    # Names of the model's classes, in its order. Training on data of one's own fills them in, so that the run's config
    # names what its detector finds where the file of annotations is not at hand. (): those of the first training set.
    config.DATASETS.CLASSES = ()
    # Of the model, in training and evaluation: float32, bfloat16 (by autocast), or auto: bfloat16 where the device
    # has instructions for it. Detectron2's SOLVER.AMP is float16, and for CUDA only.
    config.SOLVER.PRECISION = "float32"
    # Passes of the model for each step of the optimizer, with IMS_PER_BATCH / (processes * ACCUMULATION) images each:
    # 8 keep the protocol's batch of 16 on one GPU that holds 2 images (detection/training/accumulation.py describes the
    # one difference, batch norm). REFERENCE_WORLD_SIZE, Detectron2's, is the other way: the number of processes that
    # batch, learning rate and schedule are meant for, to be scaled to the number there is (0: no scaling).
    config.SOLVER.ACCUMULATION = 1
    # All lengths of the schedule are multiplied by DATASETS.FRACTION ** this. 0: as many iterations on fewer images, so
    # that each is seen more often; 1: as many epochs; 0.5: in between. There is no agreed schedule for few labels, and
    # they lie far apart: with 1 % of COCO, the 2x schedule is 2,456 epochs with 0, and 1,800 iterations with 1. The
    # default is 0, because a schedule should not change unasked.
    config.SOLVER.FRACTION_EXPONENT = 0.0
    # How many of the newest checkpoints are kept, besides model_final; 0: all. One is enough to resume from, and a
    # second for when it is damaged.
    config.SOLVER.KEEP_CHECKPOINTS = 2
    # SGD, as in Detectron2, or AdamW, which ignores MOMENTUM and NESTEROV and needs a BASE_LR of about 0.0001.
    config.SOLVER.OPTIMIZER = "SGD"
    # Factor of the learning rate from each stage of the ResNet to the one below it, in (0, 1]: with 0.8, res5 trains
    # with 0.8 of the rate of the heads and FPN, res4 with 0.64, and the stem with 0.33. 1: the same rate everywhere.
    config.SOLVER.LAYER_DECAY = 1.0
    # Decay of an exponential moving average of the weights, such as 0.999; 0: no average. The average is saved as
    # `model_ema.pth` and evaluated at the end, beside the weights themselves.
    config.SOLVER.EMA = 0.0
    # Large-scale jitter (Ghiasi et al. 2021): a training image is resized to fit into a square of SIZE pixels times a
    # random factor, and cropped or padded to SIZE. It replaces MIN_SIZE_TRAIN and MAX_SIZE_TRAIN. With COPY_PASTE, half
    # of the objects of another training image are pasted onto each.
    # Of the config's own class: a tool's config is merged from the recipe, and yacs compares the classes of sections.
    config.INPUT.LSJ = type(config)(
        {"ENABLED": False, "SIZE": 1024, "MIN_SCALE": 0.1, "MAX_SCALE": 2.0, "COPY_PASTE": False}
    )
    # The metric whose best evaluation is kept as `model_best.pth`; "": bbox/AP, or the task's main metric where there
    # are no boxes. Only where TEST.EVAL_PERIOD makes several evaluations. Training ends when this many of them in a row
    # have not been better than the best (0: never).
    config.TEST.BEST_METRIC = ""
    config.TEST.PATIENCE = 0
    config.LOG = type(config)({})
    # Pictures for TensorBoard: so many of the first training images at the start, and so many of the evaluation images
    # at each evaluation, with what is annotated and what is detected. 0: none.
    config.LOG.PICTURES = 4
    config.LOG.WANDB = ""  # project of Weights & Biases that receives metrics and pictures too; empty: none


def load(name: str, overrides: Sequence[str] = ()) -> CfgNode:
    """The defaults, changed by the recipe `name` (a path, or a file of `configs/detection`), then by pairs.

    `MODEL.RESNETS.RES2_OUT_CHANNELS` follows from the depth.

    Raises:
        UserError: no such recipe, a key that does not exist or has no effect, a wrong type, a value out of its range.
    """
    defaults = default_config()
    added = _add_newer_keys(defaults, find_config(name, "detection"))
    config = load_config(defaults, name, "detection", overrides)
    _remove_newer_keys(config, added)
    for key, least in MINIMA.items():
        in_range(config, key, least)
    for key, allowed in CHOICES.items():
        one_of(config, key, allowed)
    _check_effects(config)
    _check_input(config)
    _check_solver(config)
    if not min(config.MODEL.PIXEL_STD) > 0:
        raise UserError(f"MODEL.PIXEL_STD must be above 0, not {config.MODEL.PIXEL_STD}")
    if not 0 < config.DATASETS.FRACTION <= 1:
        raise UserError(f"DATASETS.FRACTION must be above 0 and at most 1, not {config.DATASETS.FRACTION}")
    for entry in config.TEST.EXPECTED_RESULTS:
        kinds = (str, str, int | float, int | float)
        if not isinstance(entry, list | tuple) or [*map(isinstance, entry, kinds)] != [True] * 4 or len(entry) > 4:
            raise UserError(
                "TEST.EXPECTED_RESULTS must list task, metric, value and tolerance, as [['bbox', 'AP', 38.5, 0.2]],"
                f" not {entry!r}"
            )
    for part in ("TRAIN", "TEST"):
        if not config.DATASETS[part]:
            raise UserError(f"DATASETS.{part} names no dataset; name one or more")
    if len(set(config.DATASETS.TEST)) < len(config.DATASETS.TEST):
        raise UserError(f"DATASETS.TEST names a dataset twice: {', '.join(config.DATASETS.TEST)}")
    complete(config)
    return config


def complete(config: CfgNode) -> None:
    """Set what follows from other keys, in place.

    Raises:
        UserError: keys of the model do not go together.
    """
    _check_model(config)
    config.MODEL.RESNETS.RES2_OUT_CHANNELS = RES2_CHANNELS[config.MODEL.RESNETS.DEPTH]


def without_effect(config: CfgNode, given: Sequence[str]) -> Iterator[str]:
    """A line for each of the given keys that has no effect because of another one's value."""
    for key in given:
        group = key.rpartition(".")[0]
        switches = [(f"{group}.ENABLED", False)] if "ENABLED" in _group(config, key) else []
        switches += [(switch, value) for switch, value, without in SWITCHES if key in without]
        for switch, value in switches:
            if key != switch and value_of(config, switch) == value:
                yield f"{key} has no effect while {switch} is {value!r}"


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
        return bool(config.SOLVER.PRECISION == "bfloat16")
    if config.MODEL.DEVICE == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # On other CPUs bfloat16 is emulated and slower than float32. PyTorch's names for the question are private.
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in asked)


def _check_effects(config: CfgNode) -> None:
    """Refuse keys without effect, and those whose effect needs a package that is not installed."""
    defaults = default_config()
    for key, reason in REFUSED.items():
        if key in keys(defaults) and value_of(config, key) != value_of(defaults, key):
            raise UserError(f"{key} {value_of(config, key)!r} has no effect here: {reason}")
    if (config.INPUT.CROP.ENABLED or config.INPUT.LSJ.ENABLED) and importlib.util.find_spec("shapely") is None:
        raise UserError(
            "INPUT.CROP.ENABLED and INPUT.LSJ.ENABLED need shapely, which cuts polygons: pip install shapely"
        )
    if config.VIS_PERIOD > 0 and importlib.util.find_spec("cv2") is None:
        raise UserError(
            "VIS_PERIOD needs OpenCV: pip install opencv-python-headless; or look at training images with --show-data"
        )
    if config.TEST.AUG.ENABLED and (config.MODEL.META_ARCHITECTURE != "GeneralizedRCNN" or config.MODEL.KEYPOINT_ON):
        raise UserError("TEST.AUG.ENABLED works with R-CNNs without keypoints only; set TEST.AUG.ENABLED False")


def _check_input(config: CfgNode) -> None:
    sizes = config.INPUT.MIN_SIZE_TRAIN
    if not sizes or not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise UserError(f"INPUT.MIN_SIZE_TRAIN must list sizes in pixels, not {sizes!r}")
    if config.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sizes) != 2:
        raise UserError(
            f"INPUT.MIN_SIZE_TRAIN_SAMPLING range needs two sizes in INPUT.MIN_SIZE_TRAIN, the least and the largest,"
            f" not {sizes!r}"
        )
    jitter = config.INPUT.LSJ
    if jitter.SIZE < 32 or not 0 < jitter.MIN_SCALE <= jitter.MAX_SCALE:
        raise UserError(
            "INPUT.LSJ.SIZE must be at least 32, and INPUT.LSJ.MIN_SCALE above 0 and at most MAX_SCALE, not"
            f" {jitter.SIZE}, {jitter.MIN_SCALE} and {jitter.MAX_SCALE}"
        )
    if jitter.ENABLED and (config.INPUT.CROP.ENABLED or config.MODEL.META_ARCHITECTURE == "SemanticSegmentor"):
        raise UserError("INPUT.LSJ.ENABLED does not go with INPUT.CROP.ENABLED, nor with semantic segmentation")
    if jitter.COPY_PASTE and not (jitter.ENABLED and config.MODEL.MASK_ON and not config.MODEL.KEYPOINT_ON):
        raise UserError(
            "INPUT.LSJ.COPY_PASTE pastes masks of images of one size: it needs INPUT.LSJ.ENABLED and MODEL.MASK_ON, and"
            " does not go with MODEL.KEYPOINT_ON"
        )
    crop = config.INPUT.CROP
    if len(crop.SIZE) != 2 or not all(side > 0 for side in crop.SIZE):
        raise UserError(f"INPUT.CROP.SIZE must be a height and a width above 0, not {crop.SIZE!r}")
    if crop.ENABLED and crop.TYPE.startswith("relative") and max(crop.SIZE) > 1:
        raise UserError(f"INPUT.CROP.SIZE {crop.SIZE!r} must be fractions of the image for INPUT.CROP.TYPE {crop.TYPE}")
    if crop.ENABLED and crop.TYPE.startswith("absolute") and any(side % 1 for side in crop.SIZE):
        raise UserError(f"INPUT.CROP.SIZE {crop.SIZE!r} must be whole pixels for INPUT.CROP.TYPE {crop.TYPE}")
    if crop.ENABLED and crop.TYPE == "absolute_range" and crop.SIZE[0] > crop.SIZE[1]:
        raise UserError(
            f"INPUT.CROP.SIZE {crop.SIZE!r} must be the least and the largest side for INPUT.CROP.TYPE absolute_range"
        )
    if config.DATALOADER.SAMPLER_TRAIN not in SAMPLERS:
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN must be one of {SAMPLERS}, not {config.DATALOADER.SAMPLER_TRAIN!r}; a fraction"
            " of the images is DATASETS.FRACTION"
        )


def _check_solver(config: CfgNode) -> None:
    solver = config.SOLVER
    # Main has a third schedule, with this key.
    names = ("WarmupMultiStepLR", "WarmupCosineLR", *["WarmupStepWithFixedGammaLR"] * ("NUM_DECAYS" in solver))
    one_of(config, "SOLVER.LR_SCHEDULER_NAME", names)
    if not 0 < solver.BASE_LR < math.inf:
        raise UserError(f"SOLVER.BASE_LR must be finite and above 0, not {solver.BASE_LR}")
    if solver.OPTIMIZER == "SGD" and solver.NESTEROV and not solver.MOMENTUM:
        raise UserError("SOLVER.NESTEROV True needs a SOLVER.MOMENTUM above 0")
    if not 0 < solver.LAYER_DECAY <= 1:
        raise UserError(f"SOLVER.LAYER_DECAY must be above 0 and at most 1, not {solver.LAYER_DECAY}")
    if not 0 <= solver.EMA < 1:
        raise UserError(f"SOLVER.EMA must be at least 0 and below 1, not {solver.EMA}")
    if sorted(set(solver.STEPS)) != list(solver.STEPS) or any(step < 1 for step in solver.STEPS):
        raise UserError(f"SOLVER.STEPS must be iterations in ascending order, not {tuple(solver.STEPS)}")
    if config.get("FLOAT32_PRECISION", "") not in ("", *MATMUL_PRECISIONS):  # a key of Detectron2's main branch
        raise UserError(f"FLOAT32_PRECISION must be one of {MATMUL_PRECISIONS}, not {config.FLOAT32_PRECISION!r}")


def _check_model(config: CfgNode) -> None:
    model, resnet = config.MODEL, config.MODEL.RESNETS
    for prefix, node in _nodes(model, "MODEL"):
        if "NORM" in node and node.NORM not in NORMS:
            raise UserError(f"{prefix}.NORM must be one of {', '.join(NORMS[1:])} or '', not {node.NORM!r}")
    if resnet.DEPTH not in DEPTHS:
        raise UserError(f"MODEL.RESNETS.DEPTH must be 18, 34, 50, 101 or 152, not {resnet.DEPTH}")
    basic = RES2_CHANNELS[resnet.DEPTH] == 64
    if basic and model.META_ARCHITECTURE == "GeneralizedRCNN" and model.ROI_HEADS.NAME.startswith("Res5"):
        raise UserError(
            f"MODEL.RESNETS.DEPTH {resnet.DEPTH} does not go with {model.ROI_HEADS.NAME}, a C4 head, which is made of"
            " bottlenecks: use an FPN recipe, or ResNet-50 or deeper"
        )
    if len(resnet.DEFORM_ON_PER_STAGE) != 4:
        raise UserError("MODEL.RESNETS.DEFORM_ON_PER_STAGE must be a list of 4, one for each stage")
    compiled = not isinstance(sys.modules.get("detectron2._C"), MissingOperators)
    rotated = ("RRPN", "RROIHeads", "RotatedAnchorGenerator", "ROIAlignRotated")
    named = {value_of(config, key) for key in keys(config) if isinstance(value_of(config, key), str)}
    if not compiled and (any(resnet.DEFORM_ON_PER_STAGE) or named & {*rotated}):
        raise UserError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE and rotated boxes need Detectron2's C++ operators, which are not"
            " installed: build Detectron2 from source"
        )
    if any(resnet.DEFORM_ON_PER_STAGE) and basic:
        raise UserError(f"MODEL.RESNETS.DEFORM_ON_PER_STAGE needs ResNet-50 or deeper, not ResNet-{resnet.DEPTH}")


def _add_newer_keys(config: CfgNode, path: Path) -> list[str]:
    """Put in the keys of main that a file names and this Detectron2 lacks, with their defaults; returns them."""
    text = path.read_text(errors="replace")
    added = [key for key in NEWER_KEYS if _last(key) in text and _last(key) not in _group(config, key)]
    for key in added:
        _group(config, key)[_last(key)] = NEWER_KEYS[key]
    return added


def _remove_newer_keys(config: CfgNode, added: list[str]) -> None:
    """Remove what `_add_newer_keys` put in, once the file has been read.

    Raises:
        UserError: a key has a value that only main can use.
    """
    for key in added:
        value = _group(config, key).pop(_last(key))
        if value != NEWER_KEYS[key]:
            raise UserError(
                f"{key} {value} needs Detectron2's main branch, installed from source: the installed Detectron2 lacks"
                f" this key, and behaves as with {NEWER_KEYS[key]!r}"
            )


def _group(config: CfgNode, key: str) -> CfgNode:
    for part in key.split(".")[:-1]:
        config = config[part]
    return config


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _nodes(config: CfgNode, prefix: str) -> Iterator[tuple[str, CfgNode]]:
    yield prefix, config
    for key, value in config.items():
        if isinstance(value, CfgNode):
            yield from _nodes(value, f"{prefix}.{key}")
