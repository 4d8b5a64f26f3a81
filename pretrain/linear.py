"""Judge an encoder: linear classifiers on its frozen features, and weighted nearest neighbours.

    python pretrain/linear.py --weights output/shapes_R18                 a run directory, checkpoint or safetensors
    python pretrain/linear.py --weights random                            the encoder untrained, to compare with
    torchrun --nproc_per_node 8 pretrain/linear.py --config imagenet1k_R50 --weights W DATA.ROOT /imagenet

The run directory gets config.yaml, log.txt, metrics.json, TensorBoard events, the heads' checkpoints, and in the end
results.json. An interrupted run goes on with the same command and --resume.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from foundation.command_line import add_run_options
from foundation.config import load_config
from foundation.errors import ArgumentParser, run
from pretrain.batches.views import ViewRecipe
from pretrain.config import build_streaming, resolve_precision
from pretrain.distributed import group
from pretrain.evaluation import supervised
from pretrain.evaluation.command import begin, describe, run_evaluation
from pretrain.evaluation.config import get_linear_defaults, validate_linear
from pretrain.evaluation.features import accuracy, knn_accuracy, merge_neighbours, nearest
from pretrain.evaluation.frozen import Frozen
from pretrain.evaluation.probe import build_pipeline
from pretrain.images.labelled import build_labelled_splits
from pretrain.images.sources import Source
from pretrain.runs import checkpoint
from pretrain.runs.folder import plain
from pretrain.runs.weights import EncoderWeights, fingerprint
from pretrain.training.schedule import StepRange

logger = logging.getLogger("pretrain")


class EncoderChanged(RuntimeError):
    """The encoder is not what it was before its evaluation: the figures are worthless."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = build_parser().parse_args(argv)
    config = load_config(get_linear_defaults(), args.config, "linear", args.overrides)
    validate_linear(config)
    run_evaluation("linear", judge, config, args)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="pretrain/linear.py", description="Linear and kNN accuracy of a frozen encoder.")
    parser.add_argument("--weights", required=True, help="checkpoint, run directory, safetensors, or `random`")
    parser.add_argument("--config", default="shapes_R18", help="a recipe in configs/linear, or a yaml file")
    add_run_options(parser, "output/linear_<config>")
    return parser


def judge(config: CfgNode, weights: EncoderWeights, output: Path, resume: bool, device: torch.device) -> dict[str, Any]:
    """Evaluate an encoder as the configuration says, in a run directory. Returns what was found."""
    train, val = build_labelled_splits(config.DATA.NAME, config.DATA.ROOT, build_streaming(config))
    encoder, before, start = begin(config, weights, output, resume=resume, images=len(train))
    encoder = encoder.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    frozen = Frozen(encoder, build_pipeline(config, device), resolve_precision(config.TRAIN.PRECISION, device))
    logger.info("%s (%s), %d and %d images", weights.source, config.ENCODER.NAME, len(train), len(val))

    val_features = frozen.features_of_all(val, "features of the validation images")
    results = judge_neighbours(config, frozen, train, val_features) if config.KNN.K else {}
    record = {"format": checkpoint.LINEAR, "config": plain(config), "encoder_sha256": before}
    results |= judge_linear(config, frozen, train, val_features, start, record, output)
    if fingerprint(encoder) != before:
        raise EncoderChanged("the evaluation has changed the encoder: a defect, please report it")
    return {**describe(config, weights, before), **results}


def judge_neighbours(
    config: CfgNode, frozen: Frozen, train: Source, val_features: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """Accuracy by nearest neighbours among the training images, on central crops."""
    references, labels = frozen.features(train, "features of the training images")
    device = frozen.pipeline.device
    neighbours = nearest(references, labels, val_features[0], k=max(config.KNN.K), device=device)
    found = knn_accuracy(
        *merge_neighbours(*neighbours, device),
        val_features[1],
        ks=config.KNN.K,
        classes=len(train.classes),
        temperature=config.KNN.TEMPERATURE,
    )
    for k, values in found.items():
        logger.info("kNN, k %d: top-1 %.2f %%, top-5 %.2f %%", k, values["top1"], values["top5"])
    first = config.KNN.K[0]
    by_k = {str(k): values for k, values in found.items()}
    return {"knn_top1": found[first]["top1"], "knn_top5": found[first]["top5"], "k": first, "knn": by_k}


def judge_linear(
    config: CfgNode,
    frozen: Frozen,
    train: Source,
    val_features: tuple[Tensor, Tensor],
    start: dict[str, Any] | None,
    record: Mapping[str, Any],
    output: Path,
) -> dict[str, Any]:
    """Accuracy of linear classifiers: trained on random views of the training images, one for each learning rate.

    Args:
        start: the checkpoint to go on from.
        record: what a checkpoint says of the run.
    """
    rates = list(config.LINEAR.LR)
    device = frozen.pipeline.device
    torch.manual_seed(config.SEED)
    heads = supervised.LinearHeads(len(rates), val_features[0].shape[1], len(train.classes)).to(device)
    learner = build_learner(config, heads, device)
    if start:
        checkpoint.fill(heads, {name.removeprefix("head."): t for name, t in start["model"].items()}, output)
        learner.optimizer.load_state_dict(start["optimizer"])
    span = StepRange.of(config, len(train), start["position"]["step"] if start else 0)
    batches = supervised.training_batches(len(train), span, config.TRAIN.BATCH_SIZE, config.SEED)
    recipe = ViewRecipe(crop_scale=tuple(config.AUGMENT.CROP_SCALE), flip=config.AUGMENT.FLIP)

    def measure() -> dict[str, float]:
        return dict(_by_head(rates, _accuracies(heads, val_features)))

    def state() -> dict[str, Any]:
        return {**record, "model": {f"head.{name}": tensor for name, tensor in heads.state_dict().items()}}

    supervised.fit(
        learner,
        frozen.batches(train, batches, recipe, config.LINEAR.CACHED_VIEWS),
        span,
        output=output,
        log_period=config.LOG.PERIOD,
        names=[name for name, _ in _by_head(rates, [{"loss": 0.0} for _ in rates])],
        measure=measure,
        state=state,
    )
    return summarise(rates, _accuracies(heads, val_features))


def build_learner(config: CfgNode, heads: supervised.LinearHeads, device: torch.device) -> supervised.Learner:
    """The heads, each with its learning rate."""
    optimizer = supervised.build_optimizer(
        config.TRAIN.OPTIMIZER,
        [list(head.parameters()) for head in heads],
        momentum=config.TRAIN.MOMENTUM,
        weight_decay=config.TRAIN.WEIGHT_DECAY,
    )
    schedules = [supervised.build_schedule(config, base, config.LINEAR.GAMMA) for base in config.LINEAR.LR]
    return supervised.Learner(group.wrap(heads, device), optimizer, schedules)


def summarise(rates: Sequence[float], accuracies: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Every head's accuracy, and the best head's as the result.

    The best of several is chosen on the images that it is then reported on, as in DINO's protocol.
    """
    heads = [{"lr": rate, **values} for rate, values in zip(rates, accuracies, strict=True)]
    for head in heads:
        logger.info("linear, learning rate %g: top-1 %.2f %%, top-5 %.2f %%", *head.values())
    best = max(heads, key=lambda head: head["linear_top1"])
    return {**{key: best[key] for key in ("linear_top1", "linear_top5", "lr")}, "heads": heads}


@torch.no_grad()
def _accuracies(heads: supervised.LinearHeads, val_features: tuple[Tensor, Tensor]) -> list[dict[str, float]]:
    features, labels = val_features
    found = []
    for head in heads:
        scores = torch.cat([head(part.to(head.weight.device)).cpu() for part in features.split(8192)])
        found.append({f"linear_top{top}": accuracy(scores, labels, top) for top in (1, 5)})
    return found


def _by_head(rates: Sequence[float], values: Sequence[Mapping[str, float]]) -> list[tuple[str, float]]:
    """Names for metrics.json: the plain ones for a single head, else with the learning rate."""
    suffixes = [""] if len(rates) == 1 else [f"_lr{rate:g}" for rate in rates]
    return [(key + suffix, value) for suffix, row in zip(suffixes, values, strict=True) for key, value in row.items()]


def cli() -> NoReturn:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
