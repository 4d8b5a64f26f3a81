"""Every key of the pretraining configuration, with its default, and the checks on their values.

Recipes are the files in `configs/pretrain/`; they state only what differs from here.
"""

import torch
from fvcore.common.config import CfgNode

from foundation.config import each_in_range, in_range, one_of
from foundation.errors import UserError
from pretrain.batches.draws import Augmentation
from pretrain.batches.views import ViewDataset
from pretrain.encoder import ENCODERS, STEMS
from pretrain.images.sources import DATASETS, FOLDERS, Source
from pretrain.images.stream import Streaming
from pretrain.objectives import OBJECTIVES

OPTIMIZERS = ("sgd", "lars", "lars_vicreg")
DECODES = ("exact", "scaled")
PROBES = ("knn", "linear")
PRECISIONS = ("auto", "float32", "bfloat16")
CUDA_GRAPHS = ("auto", "on", "off")
MAX_SEED = 2**32 - 1  # of scikit-learn's generators


def get_defaults() -> CfgNode:
    """The defaults: optimisation and augmentation of the article, on the embedded dataset."""
    c = CfgNode()
    c.SEED = 0  # of weights, data order and augmentation
    _add_images(c)
    c.ENCODER = CfgNode()
    c.ENCODER.NAME = "resnet50"  # one of pretrain.encoder.ENCODERS
    c.ENCODER.STEM = "imagenet"  # or cifar, for images of about 32 pixels
    c.ENCODER.ZERO_INIT_RESIDUAL = False  # initialise residual branches with 0; short trainings of ResNet-50 need it
    c.ENCODER.WEIGHTS = ""  # file or run to begin from: any checkpoint that can be converted; empty: random weights
    c.PROJECTOR = CfgNode()
    c.PROJECTOR.DIMS = [8192, 8192, 512]  # the last is P, the dimension of the embedding
    c.PROJECTOR.NORM = True  # BatchNorm in the hidden layers
    c.PROJECTOR.LAST_BIAS = True  # bias of the last layer
    c.OBJECTIVE = CfgNode()
    c.OBJECTIVE.NAME = "corinfomax"  # or one to compare with: pretrain.objectives.OBJECTIVES
    c.OBJECTIVE.ATTRACTION = 2000.0  # alpha
    c.OBJECTIVE.FORGETTING = 0.1  # lambda, the weight of the OLD covariance
    c.OBJECTIVE.EPS = 1e-8  # added to the diagonals of the covariances
    _add_training(c)
    c.CHECKPOINT = CfgNode()  # besides the one after each epoch
    c.CHECKPOINT.MINUTES = 10.0  # save after this time, checked with each log line; 0: never
    c.CHECKPOINT.STEPS = 0  # save after this number of steps; 0: never
    c.LOG = CfgNode()
    c.LOG.PERIOD = 10  # steps between lines of metrics.json
    c.LOG.WANDB = ""  # project of Weights & Biases that receives them too; empty: none
    c.PROBE = CfgNode()  # accuracy of the encoder on labelled images during training
    c.PROBE.EVERY = 0  # epochs; 0: never
    c.PROBE.KIND = "knn"  # or linear: a linear head, trained anew each time
    c.PROBE.ROOT = ""  # folder of the labelled images, one folder per class; empty: those of the dataset
    c.PROBE.K = 20  # neighbours
    c.PROBE.MAX_TRAIN = 20000  # reference images at most
    return c


def _add_images(c: CfgNode) -> None:
    """The images and their augmentation."""
    c.DATA = CfgNode()
    c.DATA.NAME = "shapes"  # one of pretrain.images.sources.DATASETS
    c.DATA.ROOT = ""  # the dataset's folder; empty: the default location, if there is one. Of webdataset also URLs
    c.DATA.CLASSES = ""  # of a folder: a file that lists the class folders to take, or imagenet100; empty: all
    c.DATA.WINDOW = 0  # of webdataset: number of tars among which images are shuffled at a time; 0: all
    c.DATA.CACHE = ""  # folder for downloaded tars; empty: ~/.cache/corinfomax/shards
    c.DATA.CACHE_GB = 100.0  # size limit of that folder; at least two windows of tars
    c.DATA.WORKERS = 2  # loader processes for each training process; 0 reads in the training process itself
    c.DATA.IMAGE_SIZE = 64  # pixels
    c.DATA.DECODE = "exact"  # or scaled: JPEGs at 1/2, 1/4 or 1/8 where views, also the probe's, keep their size
    c.DATA.MEAN = [0.485, 0.456, 0.406]  # RGB, of values in [0, 1]
    c.DATA.STD = [0.229, 0.224, 0.225]  # likewise, standard deviations
    c.DATA.MAX_UNREADABLE = 0.01  # fraction of damaged images, at least one image, above which a run stops; 0: none
    c.DATA.WORKER_TIMEOUT = 300  # seconds without a batch after which a hanging worker is reported and the run stops
    c.AUGMENT = CfgNode()  # thesis Table B.1; pairs are [first view, second view]
    c.AUGMENT.REGION = [1.0, 1.0]  # fraction of the image's area that both views are cropped from; below 1 for scenes
    c.AUGMENT.CROP_SCALE = [0.08, 1.0]  # fraction of the region's area
    c.AUGMENT.FLIP = 0.5  # probability of a horizontal flip
    c.AUGMENT.JITTER = 0.8  # probability of the colour jitter
    c.AUGMENT.BRIGHTNESS = 0.4  # largest change of brightness, as a fraction
    c.AUGMENT.CONTRAST = 0.4  # largest change of contrast, as a fraction
    c.AUGMENT.SATURATION = 0.2  # largest change of saturation, as a fraction
    c.AUGMENT.HUE = 0.1  # largest shift of the hue, as a fraction of the circle
    c.AUGMENT.GRAY = 0.2  # probability of greyscale
    c.AUGMENT.BLUR = [1.0, 0.1]  # probability of Gaussian blur, of the first and the second view
    c.AUGMENT.BLUR_SIGMA = [0.1, 2.0]  # pixels
    c.AUGMENT.SOLARIZE = [0.0, 0.2]  # probability of solarisation, of the first and the second view


def _add_training(c: CfgNode) -> None:
    """The optimisation, and the limits of a run."""
    c.TRAIN = CfgNode()
    c.TRAIN.EPOCHS = 100  # passes over the images
    c.TRAIN.BATCH_SIZE = 1536  # over all processes
    c.TRAIN.LR = 0.2  # after the warm-up
    c.TRAIN.LR_PER_256 = 0.0  # above 0: for each 256 images of the batch, instead of TRAIN.LR
    c.TRAIN.MIN_LR = 1e-6  # at the last step
    c.TRAIN.WARMUP_EPOCHS = 10  # epochs of linear warm-up, fewer than TRAIN.EPOCHS
    c.TRAIN.WARMUP_LR = 0.003  # at the first step
    c.TRAIN.OPTIMIZER = "sgd"  # or lars (as Barlow Twins has it) or lars_vicreg (as VICReg has it)
    c.TRAIN.MOMENTUM = 0.9  # of the optimizer
    c.TRAIN.WEIGHT_DECAY = 1e-4  # of the optimizer
    c.TRAIN.PRECISION = "auto"  # float32, bfloat16, or auto: bfloat16 where the hardware supports it
    c.TRAIN.COMPILE = False  # torch.compile
    c.TRAIN.CUDA_GRAPH = "auto"  # on, off, or auto: where the host would slow down a GPU, and there is one process
    c.TRAIN.MICRO_BATCH = 0  # images at a time in each process; 0: all. The loss stays that of the whole batch
    c.TRAIN.MAX_STEPS = 0  # stop after this number of steps; 0: no limit
    c.TRAIN.MAX_SKIPPED = 10  # limit on skipped batches, whose loss or gradient is not finite
    c.TRAIN.PEER_TIMEOUT = 600  # seconds without an answer after which a process treats the others as dead


def validate(config: CfgNode) -> None:
    """Refuse values that cannot work. Raises UserError naming the key."""
    check_values(config)
    _check_agreement(config)


def check_values(config: CfgNode) -> None:
    """Refuse values that cannot work whatever the others are. Raises UserError naming the key."""
    one_of(config, "DATA.NAME", DATASETS)
    one_of(config, "DATA.DECODE", DECODES)
    one_of(config, "ENCODER.NAME", ENCODERS)
    one_of(config, "ENCODER.STEM", STEMS)
    one_of(config, "OBJECTIVE.NAME", tuple(OBJECTIVES))
    one_of(config, "PROBE.KIND", PROBES)
    one_of(config, "TRAIN.OPTIMIZER", OPTIMIZERS)
    one_of(config, "TRAIN.PRECISION", PRECISIONS)
    one_of(config, "TRAIN.CUDA_GRAPH", CUDA_GRAPHS)
    for key in (
        "DATA.WORKER_TIMEOUT",
        "TRAIN.PEER_TIMEOUT",
        "TRAIN.EPOCHS",
        "LOG.PERIOD",
        "PROBE.K",
        "PROBE.MAX_TRAIN",
    ):
        in_range(config, key, 1)
    in_range(config, "TRAIN.BATCH_SIZE", 2)
    in_range(config, "DATA.IMAGE_SIZE", 1, 4096)
    in_range(config, "DATA.WORKERS", 0, 1024)
    in_range(config, "DATA.WINDOW", 0)
    in_range(config, "DATA.CACHE_GB", 1e-6)
    in_range(config, "SEED", 0, MAX_SEED)
    for key in ("WARMUP_EPOCHS", "MICRO_BATCH", "MAX_STEPS", "MAX_SKIPPED", "MIN_LR", "WARMUP_LR", "WEIGHT_DECAY"):
        in_range(config, f"TRAIN.{key}", 0)
    for key in ("CHECKPOINT.MINUTES", "CHECKPOINT.STEPS", "PROBE.EVERY", "OBJECTIVE.ATTRACTION", "OBJECTIVE.EPS"):
        in_range(config, key, 0)
    in_range(config, "TRAIN.LR", 1e-12)
    in_range(config, "TRAIN.LR_PER_256", 0)
    in_range(config, "DATA.MAX_UNREADABLE", 0, 1)
    in_range(config, "TRAIN.MOMENTUM", 0, 0.9999)
    in_range(config, "OBJECTIVE.FORGETTING", 0, 0.999999)
    for key in ("FLIP", "JITTER", "GRAY"):
        in_range(config, f"AUGMENT.{key}", 0, 1)
    for key, most in {"BRIGHTNESS": 10, "CONTRAST": 10, "SATURATION": 10, "HUE": 0.5}.items():
        in_range(config, f"AUGMENT.{key}", 0, most)
    for key in ("BLUR", "SOLARIZE"):
        each_in_range(config, f"AUGMENT.{key}", 2, 0, 1)
    for key in ("REGION", "CROP_SCALE"):
        each_in_range(config, f"AUGMENT.{key}", 2, 1e-6, 1)
    each_in_range(config, "AUGMENT.BLUR_SIGMA", 2, 1e-3, 2)
    each_in_range(config, "DATA.MEAN", 3, 0, 1)
    each_in_range(config, "DATA.STD", 3, 1e-6, 1)
    each_in_range(config, "PROJECTOR.DIMS", len(config.PROJECTOR.DIMS) or 1, 1)


def _check_agreement(config: CfgNode) -> None:
    """Refuse values that are valid one by one and contradict each other."""
    for key in ("REGION", "CROP_SCALE", "BLUR_SIGMA"):
        low, high = config.AUGMENT[key]
        if low > high:
            raise UserError(f"AUGMENT.{key} is [smallest, largest], not [{low:g}, {high:g}]")
    if learning_rate(config) < config.TRAIN.MIN_LR:
        key = "TRAIN.LR_PER_256 x TRAIN.BATCH_SIZE / 256" if config.TRAIN.LR_PER_256 else "TRAIN.LR"
        raise UserError(f"TRAIN.MIN_LR ({config.TRAIN.MIN_LR:g}) must not be above {key} ({learning_rate(config):g})")
    if config.DATA.CLASSES and config.DATA.NAME not in FOLDERS:
        raise UserError(f"DATA.CLASSES chooses among class folders, and {config.DATA.NAME} has none; leave it empty")
    if config.DATA.WINDOW and config.DATA.NAME != "webdataset":
        raise UserError(f"DATA.WINDOW is a number of tars, and {config.DATA.NAME} has none; leave it 0")
    if config.TRAIN.WARMUP_EPOCHS >= config.TRAIN.EPOCHS:
        raise UserError(
            f"TRAIN.WARMUP_EPOCHS ({config.TRAIN.WARMUP_EPOCHS}) must be below TRAIN.EPOCHS ({config.TRAIN.EPOCHS}); "
            f"add TRAIN.WARMUP_EPOCHS {config.TRAIN.EPOCHS // 10}"
        )


def learning_rate(config: CfgNode) -> float:
    """The learning rate after the warm-up."""
    return config.TRAIN.LR_PER_256 * config.TRAIN.BATCH_SIZE / 256 or config.TRAIN.LR


def build_streaming(config: CfgNode) -> Streaming:
    """How remote tars are cached, in pretraining and in evaluation, which has no windows."""
    data = config.DATA
    window, patience = data.get("WINDOW", 0), data.get("WORKER_TIMEOUT", Streaming.patience)
    return Streaming(data.CACHE, data.CACHE_GB, window, patience)


def build_views(config: CfgNode, source: Source) -> ViewDataset:
    """The random views of a source's images, as pretraining takes them."""
    size, region = config.DATA.IMAGE_SIZE, tuple(config.AUGMENT.REGION)
    scaled = config.DATA.DECODE == "scaled"
    return ViewDataset(source, size, build_augmentations(config), config.SEED, region=region, scaled=scaled)


def build_augmentations(config: CfgNode) -> tuple[Augmentation, Augmentation]:
    """The distributions of the first and the second view."""
    a = config.AUGMENT
    first, second = (
        Augmentation(
            crop_scale=tuple(a.CROP_SCALE),
            flip=a.FLIP,
            jitter=a.JITTER,
            brightness=a.BRIGHTNESS,
            contrast=a.CONTRAST,
            saturation=a.SATURATION,
            hue=a.HUE,
            gray=a.GRAY,
            blur=a.BLUR[view],
            blur_sigma=tuple(a.BLUR_SIGMA),
            solarize=a.SOLARIZE[view],
        )
        for view in range(2)
    )
    return first, second


def resolve_precision(precision: str, device: torch.device) -> str:
    """`float32` or `bfloat16`; `auto` becomes bfloat16 where the device multiplies it in hardware.

    Measured on a CPU with AVX512-BF16: a ResNet-18 step in bfloat16 takes half the time of float32 or less.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # Not public, and absent from some releases; without them float32 is the safe answer.
        checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        fast = any(check() for check in checks if check)
    return "bfloat16" if fast else "float32"
