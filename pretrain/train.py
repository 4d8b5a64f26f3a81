"""Pretrain an encoder with CorInfoMax.

    python pretrain/train.py                                            the embedded dataset, minutes on a CPU
    python pretrain/train.py --config imagenet1k_R50 DATA.ROOT /imagenet
    torchrun --nproc_per_node 8 pretrain/train.py --config imagenet1k_R50 DATA.ROOT /imagenet

The run directory gets config.yaml, log.txt, metrics.json, spectrum.json, TensorBoard events, checkpoints/ and, in the
end, encoder.safetensors. An interrupted run goes on with the same command and --resume. At SIGTERM, SIGINT or SIGUSR1
a run saves and leaves with status 75 (docs/reliability.md).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from cli.config import load_config
from cli.errors import ArgumentParser, run
from pretrain import checkpoint, distributed
from pretrain.config import build_recipes, get_defaults, resolve_precision, validate
from pretrain.data import Source, build_source
from pretrain.encoder import SiameseNetwork, build_encoder, build_projector, feature_dim
from pretrain.engine import Trainer
from pretrain.loader import ShuffledBatches, build_loader, check_batch
from pretrain.loop import Skipped, train
from pretrain.objectives import build_criterion, wants_unit_length
from pretrain.probe import OnlineProbe
from pretrain.recorder import Recorder
from pretrain.rundir import open_run, plain
from pretrain.saving import Saver
from pretrain.schedule import warmup_cosine
from pretrain.signals import STOPPED
from pretrain.views import ViewDataset
from pretrain.weights import write_encoder

logger = logging.getLogger("pretrain")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = build_parser().parse_args(argv)
    config = load_config(get_defaults(), args.config, "pretrain", args.overrides)
    validate(config)
    device = distributed.start(torch.cuda.is_available(), timedelta(seconds=config.TRAIN.PEER_TIMEOUT))
    try:
        complete = pretrain(config, Path(args.output or f"output/{Path(args.config).stem}"), args.resume, device)
    finally:
        distributed.stop()
    if not complete:
        raise SystemExit(STOPPED)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="pretrain/train.py", description="Pretrain an encoder with CorInfoMax.")
    parser.add_argument("--config", default="shapes_R18", help="a recipe in configs/pretrain, or a yaml file")
    parser.add_argument("--output", default="", help="the run directory; output/<config> by default")
    parser.add_argument("--resume", action="store_true", help="go on where the run directory's last checkpoint is")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="config keys to change")
    return parser


def pretrain(config: CfgNode, output: Path, resume: bool, device: torch.device) -> bool:
    """Pretrain as the configuration says, into a run directory. Returns False where a signal has stopped it."""
    source = build_source(config.DATA.NAME, config.DATA.ROOT, "pretrain", config.DATA.CLASSES)
    check_batch(len(source), config.TRAIN.BATCH_SIZE, distributed.world_size())
    probe = OnlineProbe(config, device) if config.PROBE.EVERY and distributed.is_main() else None
    start = open_run(output, config, resume)

    torch.manual_seed(config.SEED)
    parts = build_parts(config, device)
    position = restore(start, parts, output) if start else {"step": 0}
    span = Span.of(config, len(source), position["step"])
    trainer = build_trainer(config, parts, device, span)
    loader = build_batches(config, source, span, device)
    recorder = Recorder(output, span.first, parts["criterion"], span.warmup) if distributed.is_main() else None
    logger.info("%d images, steps %d to %d, %d an epoch", len(source), span.first, span.last, span.per_epoch)
    logger.info("%s on %d %s process(es)", trainer.precision, distributed.world_size(), device.type)
    try:
        complete = train(
            trainer,
            loader,
            first_step=span.first,
            last_step=span.last,
            steps_per_epoch=span.per_epoch,
            log_period=config.LOG.PERIOD,
            max_unreadable=config.DATA.MAX_UNREADABLE,
            skipped=Skipped(position.get("skipped", 0), config.TRAIN.MAX_SKIPPED),
            recorder=recorder,
            saver=build_saver(config, output, parts, recorder, span.first),
            end_epoch=partial(end_epoch, config, parts["network"], probe, recorder),
        )
    finally:
        if recorder:
            recorder.close()
    if not complete:
        logger.info("stopped as asked to; the same command with --resume goes on")
    elif distributed.is_main():
        export(config, output, parts["network"])
    return complete


@dataclass(frozen=True)
class Span:
    """The steps of this process's part of the run, counted over all epochs from 0."""

    first: int
    last: int  # one past the last
    per_epoch: int
    total: int  # of the whole schedule
    warmup: int

    @classmethod
    def of(cls, config: CfgNode, images: int, first: int) -> "Span":
        """The steps that are left, in a dataset of `images`."""
        per_epoch = images // config.TRAIN.BATCH_SIZE
        total = per_epoch * config.TRAIN.EPOCHS
        last = min(total, config.TRAIN.MAX_STEPS or total)
        return cls(first, last, per_epoch, total, per_epoch * config.TRAIN.WARMUP_EPOCHS)


def build_parts(config: CfgNode, device: torch.device) -> dict[str, Any]:
    """What a checkpoint holds the state of: `network`, `criterion` and `optimizer`."""
    encoder = build_encoder(config.ENCODER.NAME, config.ENCODER.STEM)
    projector = build_projector(feature_dim(config.ENCODER.NAME), list(config.PROJECTOR.DIMS))
    network = SiameseNetwork(encoder, projector, wants_unit_length(config.OBJECTIVE.NAME))
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    criterion = build_criterion(
        config.OBJECTIVE.NAME,
        dim=config.PROJECTOR.DIMS[-1],
        attraction=config.OBJECTIVE.ATTRACTION,
        forgetting=config.OBJECTIVE.FORGETTING,
        eps=config.OBJECTIVE.EPS,
    )
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=config.TRAIN.LR,
        momentum=config.TRAIN.MOMENTUM,
        weight_decay=config.TRAIN.WEIGHT_DECAY,
        fused=True,
    )
    return {"network": network, "criterion": criterion.to(device), "optimizer": optimizer}


def build_batches(config: CfgNode, source: Source, span: Span, device: torch.device) -> DataLoader:
    """The batches: the share of this process, from the first step on."""
    batches = ShuffledBatches(
        len(source),
        batch_size=config.TRAIN.BATCH_SIZE,
        seed=config.SEED,
        first_step=span.first,
        last_step=span.last,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    dataset = ViewDataset(source, config.DATA.IMAGE_SIZE, build_recipes(config), config.SEED)
    return build_loader(dataset, batches, config.DATA.WORKERS, device, config.DATA.WORKER_TIMEOUT)


def build_schedule(config: CfgNode, span: Span) -> Callable[[int], float]:
    """Step -> learning rate."""
    return partial(
        warmup_cosine,
        total_steps=span.total,
        warmup_steps=span.warmup,
        peak=config.TRAIN.LR,
        warmup_start=config.TRAIN.WARMUP_LR,
        final=config.TRAIN.MIN_LR,
    )


def build_saver(config: CfgNode, output: Path, parts: dict[str, Any], recorder: Recorder | None, first: int) -> Saver:
    """What saves checkpoints, and when."""

    def state() -> dict[str, Any]:
        return {
            "format": checkpoint.PRETRAIN,
            "model": parts["network"].state_dict(),
            "objective": parts["criterion"].state_dict(),
            "optimizer": parts["optimizer"].state_dict(),
            "config": plain(config),
        }

    minutes, steps = config.CHECKPOINT.MINUTES, config.CHECKPOINT.STEPS
    return Saver(output, state, recorder, every_steps=steps, every_minutes=minutes, first_step=first)


def build_trainer(config: CfgNode, parts: dict[str, Any], device: torch.device, span: Span) -> Trainer:
    """The training step, with the network wrapped for several processes and compiled where asked for."""
    network = parts["network"]
    if config.TRAIN.COMPILE:
        network.compile()
    if distributed.world_size() > 1:
        if device.type == "cuda":  # torch has no SyncBatchNorm for the CPU: there each process has its own statistics
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        network = DistributedDataParallel(network, broadcast_buffers=False)
    return Trainer(
        network=network,
        criterion=parts["criterion"],
        optimizer=parts["optimizer"],
        learning_rate=build_schedule(config, span),
        mean=torch.tensor(config.DATA.MEAN, device=device),
        std=torch.tensor(config.DATA.STD, device=device),
        device=device,
        precision=resolve_precision(config.TRAIN.PRECISION, device),
        micro_batch=config.TRAIN.MICRO_BATCH,
    )


def restore(state: dict[str, Any], parts: dict[str, Any], output: Path) -> dict[str, int]:
    """Put a checkpoint's state back. Returns the position to go on from."""
    checkpoint.fill(parts["network"], state["model"], output)
    checkpoint.fill(parts["criterion"], state["objective"], output)
    parts["optimizer"].load_state_dict(state["optimizer"])
    return state["position"]


def end_epoch(
    config: CfgNode,
    network: SiameseNetwork,
    probe: OnlineProbe | None,
    recorder: Recorder | None,
    epoch: int,
    step: int,
) -> None:
    """Probe the encoder when it is time."""
    if probe and recorder and epoch % config.PROBE.EVERY == 0:
        values = probe(network.encoder)
        recorder.write(step - 1, values)
        logger.info("epoch %d: kNN top-1 %.2f %%", epoch, values["knn_top1"])


def export(config: CfgNode, output: Path, network: nn.Module) -> None:
    """Write the finished encoder for everyone."""
    write_encoder(
        output,
        network.encoder,  # type: ignore[arg-type]
        objective=config.OBJECTIVE.NAME,
        name=config.ENCODER.NAME,
        stem=config.ENCODER.STEM,
        mean=config.DATA.MEAN,
        std=config.DATA.STD,
    )


def cli() -> NoReturn:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
