"""Builds the parts of a pretraining run from its configuration: network, objective, optimizer, batches, checkpoints."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader

from foundation.errors import UserError
from foundation.wandb_mirror import open_wandb
from pretrain.batches.loader import build_loader
from pretrain.batches.sampler import ShuffledBatches
from pretrain.config import build_views, learning_rate, resolve_precision
from pretrain.corinfomax import RunningEstimates
from pretrain.distributed import group
from pretrain.encoder import SiameseNetwork, build_encoder, build_projector, feature_dim
from pretrain.images.sources import Source
from pretrain.images.tars import TarSource
from pretrain.objectives import build_criterion, needs_unit_length
from pretrain.runs import checkpoint
from pretrain.runs.folder import plain
from pretrain.training.lars import BARLOW_TWINS_PLAIN_LR, LARS
from pretrain.training.recorder import CheckpointPolicy, Recorder
from pretrain.training.schedule import StepRange, warmup_cosine
from pretrain.training.sgd import SGD
from pretrain.training.step import Trainer
from pretrain.training.two_views import TwoViewNetwork


def build_network(config: CfgNode) -> SiameseNetwork:
    """The encoder with its projector."""
    encoder = build_encoder(config.ENCODER.NAME, config.ENCODER.STEM, config.ENCODER.ZERO_INIT_RESIDUAL)
    projector = build_projector(
        feature_dim(config.ENCODER.NAME),
        config.PROJECTOR.DIMS,
        norm=config.PROJECTOR.NORM,
        last_bias=config.PROJECTOR.LAST_BIAS,
    )
    return SiameseNetwork(encoder, projector, needs_unit_length(config.OBJECTIVE.NAME))


def build_parts(config: CfgNode, device: torch.device) -> dict[str, Any]:
    """The parts whose state a checkpoint holds: `network`, `criterion` and `optimizer`."""
    network = TwoViewNetwork(build_network(config), together=device.type == "cpu")
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    criterion = build_criterion(
        config.OBJECTIVE.NAME,
        dim=config.PROJECTOR.DIMS[-1],
        attraction=config.OBJECTIVE.ATTRACTION,
        forgetting=config.OBJECTIVE.FORGETTING,
        eps=config.OBJECTIVE.EPS,
    )
    optimizer = build_optimizer(config, network)
    return {"network": network, "criterion": criterion.to(device), "optimizer": optimizer}


def build_optimizer(config: CfgNode, network: torch.nn.Module) -> torch.optim.Optimizer:
    """SGD, or LARS as the code of Barlow Twins (`lars`) or VICReg (`lars_vicreg`) has it.

    LARS neither adapts nor decays biases and norms. Barlow Twins gives them a learning rate of their own, VICReg the
    weights'.
    """
    decay = config.TRAIN.WEIGHT_DECAY
    options = {"lr": learning_rate(config), "momentum": config.TRAIN.MOMENTUM, "fused": True}
    if config.TRAIN.OPTIMIZER == "sgd":
        return SGD(network.parameters(), weight_decay=decay, **options)
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim == 1]
    groups = [{"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0.0, "adapt": False}]
    plain_lr = BARLOW_TWINS_PLAIN_LR if config.TRAIN.OPTIMIZER == "lars" else 1.0
    return LARS(groups, decayed_length=True, plain_lr=plain_lr, **options)


def build_batches(config: CfgNode, source: Source, span: StepRange, device: torch.device) -> DataLoader:
    """The batches of this process, from the first step on."""
    batches = ShuffledBatches(
        len(source),
        batch_size=config.TRAIN.BATCH_SIZE,
        seed=config.SEED,
        first_step=span.first,
        last_step=span.last,
        rank=group.rank(),
        world_size=group.world_size(),
        shards=source.shards if isinstance(source, TarSource) else (),
        window=config.DATA.WINDOW,
    )
    dataset = build_views(config, source)
    return build_loader(dataset, batches, config.DATA.WORKERS, device, config.DATA.WORKER_TIMEOUT)


def build_schedule(config: CfgNode, total_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Step -> learning rate."""
    return partial(
        warmup_cosine,
        total_steps=total_steps,
        warmup_steps=config.TRAIN.WARMUP_EPOCHS * steps_per_epoch,
        peak=learning_rate(config),
        warmup_start=config.TRAIN.WARMUP_LR,
        final=config.TRAIN.MIN_LR,
    )


def build_recorder(config: CfgNode, output: Path, criterion: RunningEstimates, span: StepRange) -> Recorder:
    """The recorder of the run."""
    mirrors = [open_wandb(config.LOG.WANDB, output, plain(config))] if config.LOG.WANDB else []
    return Recorder(output, span.first, criterion, span.per_epoch * config.TRAIN.WARMUP_EPOCHS, mirrors)


def build_checkpoint_policy(
    config: CfgNode, output: Path, parts: dict[str, Any], recorder: Recorder | None, first: int, images: int
) -> CheckpointPolicy:
    """The policy that saves checkpoints. `images`: their number in the dataset, which a checkpoint records."""

    def state() -> dict[str, Any]:
        return {
            "format": checkpoint.PRETRAIN,
            "model": parts["network"].state_dict(),
            "objective": parts["criterion"].state_dict(),
            "optimizer": parts["optimizer"].state_dict(),
            "config": plain(config),
            "images": images,
        }

    minutes, steps = config.CHECKPOINT.MINUTES, config.CHECKPOINT.STEPS
    return CheckpointPolicy(output, state, recorder, every_steps=steps, every_minutes=minutes, first_step=first)


def build_trainer(
    config: CfgNode, parts: dict[str, Any], device: torch.device, total_steps: int, steps_per_epoch: int
) -> Trainer:
    """The training step, with the network wrapped for several processes, and compiled if TRAIN.COMPILE says so.

    Raises:
        UserError: single images would pass the network, which BatchNorm cannot normalise.
    """
    _check_parts(config.TRAIN.BATCH_SIZE // group.world_size(), config.TRAIN.MICRO_BATCH)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all batches have one shape, so the search is done once
    network = parts["network"]
    if config.TRAIN.COMPILE:
        network.compile()
    return Trainer(
        network=group.wrap(network),
        criterion=parts["criterion"],
        optimizer=parts["optimizer"],
        learning_rate=build_schedule(config, total_steps, steps_per_epoch),
        mean=torch.tensor(config.DATA.MEAN, device=device),
        std=torch.tensor(config.DATA.STD, device=device),
        device=device,
        precision=resolve_precision(config.TRAIN.PRECISION, device),
        micro_batch=config.TRAIN.MICRO_BATCH,
    )


@contextlib.contextmanager
def report_failed_compilation(compiles: bool) -> Iterator[None]:
    """Report a failure of torch.compile within the block, which comes at the first step, as one line.

    Args:
        compiles: TRAIN.COMPILE.

    Raises:
        UserError: in place of the errors of torch.compile.
    """
    if not compiles:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        yield
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", error)
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise UserError(
            f"TRAIN.COMPILE: torch.compile failed ({reason}); a killed run can leave its cache damaged: remove "
            f"{cache_dir()}, or set TRAIN.COMPILE False"
        ) from error


def _check_parts(images: int, micro_batch: int) -> None:
    """Refuse single images, which BatchNorm cannot normalise. `images`: of a step in this process."""
    parts = -(-images // micro_batch) if micro_batch else 1
    if images // parts < 2 and group.world_size() == 1:  # with several processes BatchNorm has the images of all
        key = "TRAIN.BATCH_SIZE" if images < 2 else "TRAIN.MICRO_BATCH"
        raise UserError(f"{key}: BatchNorm needs at least two images in each pass; raise it")
