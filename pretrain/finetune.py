"""Train the whole network, encoder and linear head, with labels: with few of them, or with all from scratch.

    python pretrain/finetune.py --config shapes_R18 --weights output/shapes_R18 --fraction 0.1
    python pretrain/finetune.py --config shapes_R18_supervised --weights random
    torchrun --nproc_per_node 8 pretrain/finetune.py --config imagenet1k_1percent --weights W DATA.ROOT /imagenet

The run directory gets config.yaml, log.txt, metrics.json, TensorBoard events, checkpoints/ and, in the end,
results.json and encoder.safetensors. An interrupted run goes on with the same command and --resume.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from fvcore.common.config import CfgNode

from foundation.command_line import add_run_options
from foundation.config import load_config
from foundation.errors import ArgumentParser, run
from pretrain.batches.views import ViewRecipe
from pretrain.config import build_streaming, resolve_precision
from pretrain.distributed import group
from pretrain.encoder import feature_dim
from pretrain.evaluation import supervised
from pretrain.evaluation.command import begin, describe, run_evaluation
from pretrain.evaluation.config import get_finetune_defaults, validate_finetune
from pretrain.evaluation.features import accuracy, extract, gather, own_share
from pretrain.evaluation.probe import build_pipeline
from pretrain.images.labelled import Subset, build_labelled_splits, class_balanced, listed, read_list
from pretrain.images.sources import Source
from pretrain.runs import checkpoint
from pretrain.runs.folder import plain
from pretrain.runs.weights import RANDOM, EncoderWeights, write_encoder
from pretrain.training.schedule import StepRange

logger = logging.getLogger("pretrain")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = build_parser().parse_args(argv)
    # A fraction that is asked for takes the place of the list that a recipe may name.
    fraction = [] if args.fraction is None else ["DATA.FRACTION", args.fraction, "DATA.LIST", "", "DATA.LIST_URL", ""]
    config = load_config(get_finetune_defaults(), args.config, "finetune", [*args.overrides, *fraction])
    validate_finetune(config)
    run_evaluation("finetune", finetune, config, args)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="pretrain/finetune.py", description="Train encoder and linear head with labels.")
    parser.add_argument("--config", required=True, help="a recipe in configs/finetune, or a yaml file")
    parser.add_argument("--weights", default=RANDOM, help="checkpoint, run directory, safetensors, or `random`")
    parser.add_argument(
        "--fraction", help="of the training images of each class, above 0 and at most 1; instead of a list"
    )
    add_run_options(parser, "output/finetune_<config>")
    return parser


def finetune(
    config: CfgNode, weights: EncoderWeights, output: Path, resume: bool, device: torch.device
) -> dict[str, Any]:
    """Train as the configuration says, in a run directory. Returns what was found."""
    train, val = build_labelled_splits(config.DATA.NAME, config.DATA.ROOT, build_streaming(config))
    train = Subset(train, choose(config, train))
    encoder, before, start = begin(config, weights, output, resume=resume, images=len(train))

    torch.manual_seed(config.SEED)
    head = supervised.build_head(feature_dim(config.ENCODER.NAME), len(train.classes))
    model = supervised.Classifier(encoder, head, resolve_precision(config.TRAIN.PRECISION, device))
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = build_learner(config, model, device)
    if start:
        checkpoint.fill(model, start["model"], output)
        learner.optimizer.load_state_dict(start["optimizer"])
    logger.info("%s (%s), %d and %d images", weights.source, config.ENCODER.NAME, len(train), len(val))
    record = {
        "format": checkpoint.FINETUNE,
        "config": plain(config),
        "encoder_sha256": before,
        "trained_by": name_training(weights),
    }
    found = fit(config, learner, model, train, val, start, record, output)
    if group.is_main():
        write_encoder(
            output,
            model.encoder,
            objective=name_training(weights),
            name=config.ENCODER.NAME,
            stem=config.ENCODER.STEM,
            mean=config.DATA.MEAN,
            std=config.DATA.STD,
        )
    about = describe(config, weights, before) | {"fraction": config.DATA.FRACTION, "images": len(train)}
    return {**about, **found}


def name_training(weights: EncoderWeights) -> str:
    """What has trained the encoder in the end, in a word, for tables and reports."""
    return "supervised" if weights.init == RANDOM else f"{weights.init}, fine-tuned"


def choose(config: CfgNode, train: Source) -> np.ndarray:
    """Places of the training images to use: those on a list, or a fraction of each class."""
    data = config.DATA
    if data.LIST or data.LIST_URL:
        return listed(train, read_list(data.LIST, data.LIST_URL, data.LIST_SHA256), data.LIST or data.LIST_URL)
    if data.FRACTION < 1:
        return class_balanced(train.labels, data.FRACTION, config.SEED)
    return np.arange(len(train))


def build_learner(config: CfgNode, model: supervised.Classifier, device: torch.device) -> supervised.Learner:
    """Encoder and head, each with its learning rate and decay."""
    c = config.FINETUNE
    optimizer = supervised.build_optimizer(
        config.TRAIN.OPTIMIZER,
        [list(model.encoder.parameters()), list(model.head.parameters())],
        momentum=config.TRAIN.MOMENTUM,
        weight_decay=config.TRAIN.WEIGHT_DECAY,
    )
    schedules = [
        supervised.build_schedule(config, base, gamma)
        for base, gamma in ((c.ENCODER_LR, c.ENCODER_GAMMA), (c.HEAD_LR, c.HEAD_GAMMA))
    ]
    return supervised.Learner(group.wrap(model, device), optimizer, schedules)


def fit(
    config: CfgNode,
    learner: supervised.Learner,
    model: supervised.Classifier,
    train: Source,
    val: Source,
    start: dict[str, Any] | None,
    record: Mapping[str, Any],
    output: Path,
) -> Mapping[str, float]:
    """Train from the start, or from a checkpoint on. Returns the accuracy of the trained model.

    Args:
        record: what a checkpoint says of the run.
    """
    pipeline = build_pipeline(config, next(model.parameters()).device)
    span = StepRange.of(config, len(train), start["position"]["step"] if start else 0)
    recipe = ViewRecipe(crop_scale=tuple(config.AUGMENT.CROP_SCALE), flip=config.AUGMENT.FLIP)
    batches = supervised.training_batches(len(train), span, config.TRAIN.BATCH_SIZE, config.SEED)

    def measure() -> dict[str, float]:
        scores, labels = extract(model, val, pipeline, precision="float32", indices=own_share(len(val)))
        scores, labels = gather(scores, pipeline.device), gather(labels, pipeline.device)
        values = {f"top{top}": accuracy(scores, labels, top) for top in (1, 5)}
        logger.info("top-1 %.2f %%, top-5 %.2f %%", *values.values())
        return values

    return supervised.fit(
        learner,
        supervised.image_batches(train, pipeline, batches, recipe),
        span,
        output=output,
        log_period=config.LOG.PERIOD,
        names=["loss"],
        measure=measure,
        state=lambda: {**record, "model": model.state_dict()},
    )


def cli() -> NoReturn:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
