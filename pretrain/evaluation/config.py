"""Every key of the evaluation configurations, with its default, and the checks on their values.

Recipes are the files in `configs/linear/` and `configs/finetune/`; they state only what differs from here.
"""

from fvcore.common.config import CfgNode

from foundation.config import each_in_range, in_range, one_of
from foundation.errors import UserError
from pretrain.batches.resizing import INTERPOLATIONS
from pretrain.config import DECODES, MAX_SEED, PRECISIONS
from pretrain.encoder import ENCODERS, STEMS
from pretrain.images.sources import DATASETS

HEAD_INITS = ("uniform", "normal")
OPTIMIZERS = ("sgd", "lars")
SCHEDULES = ("cosine", "step")


def get_linear_defaults() -> CfgNode:
    """Linear heads on the frozen encoder, and kNN. Defaults: the article's protocol, but for ImageNet-1K."""
    c = _common()
    c.TRAIN.EPOCHS = 100  # thesis B.2
    c.LINEAR = CfgNode()
    c.LINEAR.LR = [0.2]  # thesis B.2; several: heads trained side by side, of which the best is reported
    c.LINEAR.INIT = "uniform"  # PyTorch's default, as in the authors' code; or normal: N(0, 0.01²), biases 0
    c.LINEAR.GAMMA = 0.1  # at each of TRAIN.MILESTONES, where TRAIN.SCHEDULE is step
    c.LINEAR.CACHED_VIEWS = 0  # augmented views whose features are computed once; 0: fresh views in every epoch
    c.KNN = CfgNode()
    c.KNN.K = [20, 10, 100, 200]  # the first is reported as knn_top1; empty: no kNN
    c.KNN.TEMPERATURE = 0.07  # of the votes: exp(similarity / temperature)
    return c


def get_finetune_defaults() -> CfgNode:
    """All layers trained with labels. Defaults: thesis B.2.5."""
    c = _common()
    c.TRAIN.EPOCHS = 20
    c.TRAIN.SCHEDULE = "step"
    c.TRAIN.MILESTONES = [5, 10, 15]
    c.DATA.FRACTION = 1.0  # of the training images of each class, 0 < fraction <= 1; also --fraction
    c.DATA.LIST = ""  # or a text file that names the training images
    c.DATA.LIST_URL = ""  # or the URL where that file is published
    c.DATA.LIST_SHA256 = ""  # digest that the file must have
    c.FINETUNE = CfgNode()
    c.FINETUNE.ENCODER_LR = 0.005  # learning rate of the encoder
    c.FINETUNE.HEAD_LR = 30.0  # learning rate of the linear head
    c.FINETUNE.ENCODER_GAMMA = 0.2  # of the encoder's learning rate at each of TRAIN.MILESTONES
    c.FINETUNE.HEAD_GAMMA = 0.1  # of the head's learning rate at each of TRAIN.MILESTONES
    return c


def _common() -> CfgNode:
    c = CfgNode()
    c.SEED = 0  # of heads, data order, augmentation, random encoder, and the choice of a fraction
    c.DATA = CfgNode()
    c.DATA.NAME = "shapes"  # one of pretrain.images.sources.DATASETS
    c.DATA.ROOT = ""  # the dataset's folder; empty: the default location, for datasets that have one
    c.DATA.CACHE = ""  # folder for downloaded tars; empty: ~/.cache/corinfomax/shards
    c.DATA.CACHE_GB = 100.0  # their size limit; shuffled images need room for all of them
    c.DATA.WORKERS = 2  # loader processes for each process; 0 reads in the process itself
    c.DATA.IMAGE_SIZE = 64  # pixels
    c.DATA.DECODE = "exact"  # or scaled: JPEGs at 1/2, 1/4 or 1/8 of their size where views keep their size
    c.DATA.INTERPOLATION = "bicubic"  # of every resize (thesis B.1.3); or bilinear
    c.DATA.MEAN = []  # RGB, of values in [0, 1]; empty: those of the encoder's training, else ImageNet's
    c.DATA.STD = []  # likewise, standard deviations
    c.DATA.MAX_UNREADABLE = 0.01  # fraction of damaged images, at least one image, above which a run stops; 0: none
    c.AUGMENT = CfgNode()  # training views; test views are a central crop (thesis B.1.2)
    c.AUGMENT.CROP_SCALE = [0.08, 1.0]  # fraction of the image's area
    c.AUGMENT.FLIP = 0.5  # probability of a horizontal flip
    c.ENCODER = CfgNode()
    c.ENCODER.NAME = ""  # one of pretrain.encoder.ENCODERS; empty: what the weights say
    c.ENCODER.STEM = ""  # imagenet or cifar; empty: what the weights say, else imagenet
    c.ENCODER.ZERO_INIT_RESIDUAL = False  # of --weights random: initialise residual branches with 0
    c.TRAIN = CfgNode()
    c.TRAIN.EPOCHS = 1
    c.TRAIN.BATCH_SIZE = 256  # over all processes (thesis B.2)
    c.TRAIN.DROP_LAST = False  # leave out an epoch's incomplete last batch; the authors' code trains on it
    c.TRAIN.OPTIMIZER = "sgd"  # or lars, as SimSiam's linear evaluation has it
    c.TRAIN.MOMENTUM = 0.9  # of the optimizer
    c.TRAIN.WEIGHT_DECAY = 0.0  # of the optimizer
    c.TRAIN.SCHEDULE = "cosine"  # or step
    c.TRAIN.FINAL = 0.01  # of the cosine schedule: last learning rate as a fraction of the first (thesis: 0.2 to 0.002)
    c.TRAIN.MILESTONES = [20, 40, 60, 80]  # epochs, of the step schedule
    c.TRAIN.PRECISION = "auto"  # of the encoder: float32, bfloat16, or auto
    c.TRAIN.MAX_STEPS = 0  # stop after this number of steps; 0: no limit
    c.LOG = CfgNode()
    c.LOG.PERIOD = 10  # steps between lines of metrics.json
    return c


def validate_linear(config: CfgNode) -> None:
    """Refuse values that could not work. Raises UserError naming the key."""
    _validate_common(config)
    each_in_range(config, "LINEAR.LR", len(config.LINEAR.LR) or 1, 1e-12)
    if len(set(config.LINEAR.LR)) < len(config.LINEAR.LR):
        raise UserError(f"LINEAR.LR {config.LINEAR.LR} names a learning rate twice; give each once")
    one_of(config, "LINEAR.INIT", HEAD_INITS)
    in_range(config, "LINEAR.GAMMA", 0, 1)
    in_range(config, "LINEAR.CACHED_VIEWS", 0)
    each_in_range(config, "KNN.K", len(config.KNN.K), 1)
    in_range(config, "KNN.TEMPERATURE", 1e-6)


def validate_finetune(config: CfgNode) -> None:
    """Refuse values that could not work. Raises UserError naming the key."""
    _validate_common(config)
    if config.TRAIN.BATCH_SIZE < 2:
        raise UserError("TRAIN.BATCH_SIZE 1: BatchNorm needs at least two images in each step; raise it")
    if not 0 < config.DATA.FRACTION <= 1:
        raise UserError(f"DATA.FRACTION must be above 0 and at most 1, not {config.DATA.FRACTION:g}")
    if config.DATA.LIST_URL and not config.DATA.LIST_SHA256:
        raise UserError("DATA.LIST_URL needs DATA.LIST_SHA256, to verify the download")
    if config.DATA.FRACTION < 1 and (config.DATA.LIST or config.DATA.LIST_URL):
        raise UserError("DATA.FRACTION and DATA.LIST both select the training images; set only one of them")
    for key in ("FINETUNE.ENCODER_LR", "FINETUNE.HEAD_LR"):
        in_range(config, key, 0)
    for key in ("FINETUNE.ENCODER_GAMMA", "FINETUNE.HEAD_GAMMA"):
        in_range(config, key, 0, 1)


def _validate_common(config: CfgNode) -> None:
    one_of(config, "DATA.NAME", DATASETS)
    one_of(config, "ENCODER.NAME", ("", *ENCODERS))
    one_of(config, "ENCODER.STEM", ("", *STEMS))
    one_of(config, "DATA.DECODE", DECODES)
    one_of(config, "DATA.INTERPOLATION", INTERPOLATIONS)
    one_of(config, "TRAIN.OPTIMIZER", OPTIMIZERS)
    one_of(config, "TRAIN.SCHEDULE", SCHEDULES)
    one_of(config, "TRAIN.PRECISION", PRECISIONS)
    for key in ("DATA.IMAGE_SIZE", "TRAIN.EPOCHS", "TRAIN.BATCH_SIZE", "LOG.PERIOD"):
        in_range(config, key, 1)
    for key in ("DATA.WORKERS", "TRAIN.MAX_STEPS", "TRAIN.WEIGHT_DECAY"):
        in_range(config, key, 0)
    in_range(config, "SEED", 0, MAX_SEED)
    for key in ("DATA.MAX_UNREADABLE", "AUGMENT.FLIP", "TRAIN.FINAL"):
        in_range(config, key, 0, 1)
    in_range(config, "DATA.CACHE_GB", 1e-6)
    in_range(config, "TRAIN.MOMENTUM", 0, 0.9999)
    each_in_range(config, "AUGMENT.CROP_SCALE", 2, 1e-6, 1)
    each_in_range(config, "TRAIN.MILESTONES", len(config.TRAIN.MILESTONES), 0)
    for key, low in (("MEAN", 0.0), ("STD", 1e-6)):
        if config.DATA[key]:
            each_in_range(config, f"DATA.{key}", 3, low, 1)
