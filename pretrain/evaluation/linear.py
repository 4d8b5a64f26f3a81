"""The linear evaluation: linear classifiers on the frozen features of an encoder, and weighted nearest neighbours."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from foundation.signals import StopRequest
from pretrain.batches.draws import Augmentation
from pretrain.config import build_streaming, resolve_precision
from pretrain.distributed import group
from pretrain.evaluation import supervised
from pretrain.evaluation.command import begin, describe
from pretrain.evaluation.features import FeatureExtractor, build_pipeline
from pretrain.evaluation.knn import accuracies, check_neighbours, knn_accuracy, merge_neighbours, nearest
from pretrain.images.labelled import build_labelled_splits
from pretrain.images.sources import Source
from pretrain.runs import checkpoint
from pretrain.runs.folder import plain
from pretrain.runs.weights import EncoderWeights, fingerprint
from pretrain.training.schedule import StepRange

logger = logging.getLogger("pretrain")


class EncoderChanged(RuntimeError):
    """The evaluation has changed the encoder, so that its results are invalid."""


def evaluate(
    config: CfgNode,
    weights: EncoderWeights,
    output: Path,
    recipe: str,
    resume: bool,
    device: torch.device,
    request: StopRequest,
) -> dict[str, Any]:
    """Evaluate an encoder as the configuration says, in a run folder. Returns the results.

    Raises:
        UserError: as `command.begin`, or an image or label cannot be used.
        EncoderChanged: a defect of this project.
    """
    train, val = build_labelled_splits(config.DATA.NAME, config.DATA.ROOT, build_streaming(config))
    if config.KNN.K:
        check_neighbours("KNN.K[0]", config.KNN.K[0], len(train))
    encoder, before, start, stored = begin(
        config,
        weights,
        output,
        recipe=recipe,
        resume=resume,
        images=len(train),
        outcome=("results.json",),
        request=request,
    )
    if stored:
        return stored
    encoder = encoder.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    precision = resolve_precision(config.TRAIN.PRECISION, device)
    extractor = FeatureExtractor(encoder, build_pipeline(config, device), precision)
    logger.info("%s (%s), %d and %d images", weights.source, config.ENCODER.NAME, len(train), len(val))

    request.leaving = "stopping before the first step; the features are computed again"
    val_features = extractor.all(val, "features of the validation images")
    results = evaluate_knn(config, extractor, train, val_features) if config.KNN.K else {}
    record = {"format": checkpoint.LINEAR, "config": plain(config), "encoder_sha256": before}
    results |= evaluate_heads(config, extractor, train, val_features, start, record, output, request)
    if fingerprint(encoder) != before:
        raise EncoderChanged("the evaluation has changed the encoder: a defect, please report it")
    return {**describe(config, weights, before), **results}


def evaluate_knn(
    config: CfgNode, extractor: FeatureExtractor, train: Source, val_features: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """Accuracy by nearest neighbours among the training images, on central crops. Numbers k above theirs are left out.

    `val_features`: features (N, F) and labels (N,) of the validation images.
    """
    ks = [k for k in config.KNN.K if k <= len(train)]
    references, labels = extractor.local(train, "features of the training images")
    device = extractor.pipeline.device
    neighbours = nearest(references, labels, val_features[0], k=max(ks), device=device)
    by_k = knn_accuracy(
        *merge_neighbours(*neighbours, device),
        val_features[1],
        ks=ks,
        classes=len(train.classes),
        temperature=config.KNN.TEMPERATURE,
    )
    for k, values in by_k.items():
        logger.info("kNN, k %d: %s", k, in_percent(values))
    for k in config.KNN.K:
        if k not in ks:
            logger.warning("kNN, k %d: left out, because there are only %d training images", k, len(train))
    first = ks[0]
    short = {f"knn_{name}": value for name, value in by_k[first].items()}
    return {**short, "k": first, "knn": {str(k): values for k, values in by_k.items()}}


def evaluate_heads(
    config: CfgNode,
    extractor: FeatureExtractor,
    train: Source,
    val_features: tuple[Tensor, Tensor],
    start: dict[str, Any] | None,
    record: Mapping[str, Any],
    output: Path,
    request: StopRequest,
) -> dict[str, Any]:
    """Accuracy of linear classifiers: trained on random views of the training images, one for each learning rate.

    Args:
        config: of the evaluation.
        extractor: gives the features.
        train: the training images.
        val_features: features (N, F) and labels (N,) of the validation images.
        start: the checkpoint to resume from.
        record: what a checkpoint says of the run.
        output: the run folder.
        request: of a signal to stop.
    """
    learning_rates = list(config.LINEAR.LR)
    device = extractor.pipeline.device
    torch.manual_seed(config.SEED)
    heads = supervised.LinearHeads(
        len(learning_rates), val_features[0].shape[1], len(train.classes), config.LINEAR.INIT
    ).to(device)
    trainer = build_trainer(config, heads, device)
    if start:
        checkpoint.fill(heads, {name.removeprefix("head."): t for name, t in start["model"].items()}, output)
        trainer.optimizer.load_state_dict(start["optimizer"])
    steps = StepRange.of(config, len(train), start["position"]["step"] if start else 0)
    batches = supervised.training_batches(
        len(train), steps, config.TRAIN.BATCH_SIZE, config.SEED, config.TRAIN.DROP_LAST
    )
    augmentation = Augmentation(crop_scale=tuple(config.AUGMENT.CROP_SCALE), flip=config.AUGMENT.FLIP)

    def measure() -> dict[str, float]:
        return dict(_by_head(learning_rates, _accuracies(heads, val_features)))

    def state() -> dict[str, Any]:
        return {**record, "model": {f"head.{name}": tensor for name, tensor in heads.state_dict().items()}}

    supervised.fit(
        trainer,
        extractor.batches(train, batches, augmentation, config.LINEAR.CACHED_VIEWS),
        steps,
        output=output,
        log_period=config.LOG.PERIOD,
        names=[name for name, _ in _by_head(learning_rates, [{"loss": 0.0} for _ in learning_rates])],
        request=request,
        measure=measure,
        state=state,
    )
    last = _accuracies(heads, val_features)
    return summarise(learning_rates, last, _best_epochs(learning_rates, output, steps.per_epoch))


def build_trainer(config: CfgNode, heads: supervised.LinearHeads, device: torch.device) -> supervised.SupervisedTrainer:
    """The trainer of the heads, each with its learning rate."""
    optimizer = supervised.build_optimizer(
        config.TRAIN.OPTIMIZER,
        [list(head.parameters()) for head in heads],
        momentum=config.TRAIN.MOMENTUM,
        weight_decay=config.TRAIN.WEIGHT_DECAY,
    )
    schedules = [supervised.build_schedule(config, base, config.LINEAR.GAMMA) for base in config.LINEAR.LR]
    return supervised.SupervisedTrainer(group.wrap(heads), optimizer, schedules)


def summarise(
    learning_rates: Sequence[float],
    accuracies: Sequence[Mapping[str, float]],
    best_epochs: Sequence[tuple[float, int] | None],
) -> dict[str, Any]:
    """Every head's accuracy, and the best head's as the result.

    The best of several heads is chosen on the images that it is then reported on, as in DINO's protocol. What is
    compared is the accuracy after the last epoch; each head's best epoch is reported beside it (VICReg's protocol).
    """
    heads = []
    for learning_rate, values, best in zip(learning_rates, accuracies, best_epochs, strict=True):
        head: dict[str, Any] = {"lr": learning_rate, **values}
        if best:
            head |= {"linear_best_top1": best[0], "linear_best_epoch": best[1]}
        heads.append(head)
        shown = in_percent({name.removeprefix("linear_"): value for name, value in values.items()})
        suffix = f"; best epoch {best[1]} with {best[0]:.2f} %" if best else ""
        logger.info("linear, learning rate %g: %s%s", learning_rate, shown, suffix)
    chosen = max(heads, key=lambda head: head["linear_top1"])
    return {**chosen, "heads": heads}


def in_percent(values: Mapping[str, float]) -> str:
    """`{"top1": 71.3}` as `top-1 71.30 %`."""
    return ", ".join(f"{name.replace('top', 'top-')} {value:.2f} %" for name, value in values.items())


@torch.no_grad()
def _accuracies(heads: supervised.LinearHeads, val_features: tuple[Tensor, Tensor]) -> list[dict[str, float]]:
    features, labels = val_features
    values = []
    for head in heads:
        scores = torch.cat([head(part.to(head.weight.device)).cpu() for part in features.split(8192)])
        values.append({f"linear_{name}": value for name, value in accuracies(scores, labels).items()})
    return values


def _best_epochs(learning_rates: Sequence[float], output: Path, steps_per_epoch: int) -> list[tuple[float, int] | None]:
    names = [name for name, _ in _by_head(learning_rates, [{"linear_top1": 0.0} for _ in learning_rates])]
    return [supervised.best_epoch(output, name, steps_per_epoch) for name in names]


def _by_head(learning_rates: Sequence[float], values: Sequence[Mapping[str, float]]) -> list[tuple[str, float]]:
    """Names for metrics.json: the plain ones for a single head, else with the learning rate."""
    suffixes = [""] if len(learning_rates) == 1 else [f"_lr{value:g}" for value in learning_rates]
    return [(key + suffix, value) for suffix, row in zip(suffixes, values, strict=True) for key, value in row.items()]
