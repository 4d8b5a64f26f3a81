"""Fine-tuning: the whole network, encoder and linear head, trained with labels."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode

from foundation.signals import StopRequest
from pretrain.batches.draws import Augmentation
from pretrain.config import build_streaming, resolve_precision
from pretrain.distributed import group
from pretrain.distributed.batch_norm import ViewBatchNorm, convert
from pretrain.encoder import feature_dim
from pretrain.evaluation import supervised
from pretrain.evaluation.command import begin, describe
from pretrain.evaluation.features import build_pipeline, extract, gather, local_indices, random_views
from pretrain.evaluation.knn import accuracies
from pretrain.evaluation.linear import in_percent
from pretrain.images.labelled import Subset, build_labelled_splits, class_balanced, listed, read_list
from pretrain.images.sources import Source
from pretrain.runs import checkpoint
from pretrain.runs.folder import OUTCOME, plain
from pretrain.runs.weights import RANDOM, EncoderWeights, write_encoder
from pretrain.training.schedule import StepRange

logger = logging.getLogger("pretrain")


def finetune(
    config: CfgNode,
    weights: EncoderWeights,
    output: Path,
    recipe: str,
    resume: bool,
    device: torch.device,
    request: StopRequest,
) -> dict[str, Any]:
    """Train as the configuration says, in a run folder. Returns the results."""
    train, val = build_labelled_splits(config.DATA.NAME, config.DATA.ROOT, build_streaming(config))
    train = Subset(train, choose(config, train))
    encoder, before, start, stored = begin(
        config, weights, output, recipe=recipe, resume=resume, images=len(train), outcome=OUTCOME, request=request
    )
    if stored:
        return stored

    torch.manual_seed(config.SEED)
    convert(encoder, ViewBatchNorm)  # which has faster kernels on GPUs
    head = supervised.build_head(feature_dim(config.ENCODER.NAME), len(train.classes), "normal")
    model = supervised.Classifier(encoder, head, resolve_precision(config.TRAIN.PRECISION, device))
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = build_trainer(config, model, device)
    if start:
        checkpoint.fill(model, start["model"], output)
        trainer.optimizer.load_state_dict(start["optimizer"])
    logger.info("%s (%s), %d and %d images", weights.source, config.ENCODER.NAME, len(train), len(val))
    record = {
        "format": checkpoint.FINETUNE,
        "config": plain(config),
        "encoder_sha256": before,
        "trained_by": name_training(weights),
    }
    results = fit(config, trainer, model, train, val, start, record, output, request)
    if group.is_main():
        path = write_encoder(
            output,
            model.encoder,
            objective=name_training(weights),
            name=config.ENCODER.NAME,
            stem=config.ENCODER.STEM,
            mean=config.DATA.MEAN,
            std=config.DATA.STD,
        )
        logger.info("the encoder is in %s", path)
    about = describe(config, weights, before) | {"fraction": config.DATA.FRACTION, "images": len(train)}
    return {**about, **results}


def name_training(weights: EncoderWeights) -> str:
    """What the encoder was last trained with, for tables and reports."""
    return "supervised" if weights.init == RANDOM else f"{weights.init}, fine-tuned"


def choose(config: CfgNode, train: Source) -> np.ndarray:
    """Indices (M,) of the training images to use: those on a list, or a fraction of each class. Raises as `listed`."""
    data = config.DATA
    if data.LIST or data.LIST_URL:
        return listed(train, read_list(data.LIST, data.LIST_URL, data.LIST_SHA256), data.LIST or data.LIST_URL)
    if data.FRACTION < 1:
        return class_balanced(train.labels, data.FRACTION, config.SEED)
    return np.arange(len(train))


def build_trainer(config: CfgNode, model: supervised.Classifier, device: torch.device) -> supervised.SupervisedTrainer:
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
    return supervised.SupervisedTrainer(group.wrap(model), optimizer, schedules)


def fit(
    config: CfgNode,
    trainer: supervised.SupervisedTrainer,
    model: supervised.Classifier,
    train: Source,
    val: Source,
    start: dict[str, Any] | None,
    record: Mapping[str, Any],
    output: Path,
    request: StopRequest,
) -> dict[str, float]:
    """Train from the start, or from a checkpoint on. Returns the accuracy after the last and after the best epoch.

    Args:
        record: what a checkpoint says of the run.
        request: of a signal to stop.
    """
    pipeline = build_pipeline(config, next(model.parameters()).device)
    steps = StepRange.of(config, len(train), start["position"]["step"] if start else 0)
    augmentation = Augmentation(crop_scale=tuple(config.AUGMENT.CROP_SCALE), flip=config.AUGMENT.FLIP)
    batches = supervised.training_batches(
        len(train), steps, config.TRAIN.BATCH_SIZE, config.SEED, config.TRAIN.DROP_LAST
    )

    def measure() -> dict[str, float]:
        scores, labels = extract(model, val, pipeline, precision="float32", indices=local_indices(len(val)))
        scores, labels = gather(scores, pipeline.device), gather(labels, pipeline.device)
        values = accuracies(scores, labels)
        logger.info("%s", in_percent(values))
        return values

    values = supervised.fit(
        trainer,
        random_views(train, pipeline, batches, augmentation),
        steps,
        output=output,
        log_period=config.LOG.PERIOD,
        names=["loss"],
        request=request,
        measure=measure,
        state=lambda: {**record, "model": model.state_dict()},
    )
    best = supervised.best_epoch(output, "top1", steps.per_epoch)
    return dict(values) | ({"best_top1": best[0], "best_epoch": best[1]} if best else {})
