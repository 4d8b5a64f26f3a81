"""Pretrain an encoder with CorInfoMax.

    python pretrain/train.py                                            the embedded dataset, minutes on a CPU
    python pretrain/train.py --config imagenet1k_R50 DATA.ROOT /imagenet
    torchrun --nproc_per_node 8 pretrain/train.py --config imagenet1k_R50 DATA.ROOT /imagenet

The run directory gets config.yaml, log.txt, metrics.json, TensorBoard events, checkpoints/ and, in the end,
encoder.safetensors. An interrupted run goes on with the same command and --resume.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cli.config import load_config
from cli.errors import ArgumentParser, run
from pretrain import checkpoint, distributed, engine
from pretrain.config import build_recipes, get_defaults, resolve_precision, validate
from pretrain.data import build_source
from pretrain.encoder import SiameseNetwork, build_encoder, build_projector, feature_dim
from pretrain.loader import ShuffledBatches, build_loader, check_batch
from pretrain.metrics import Metrics
from pretrain.objectives import build_criterion, wants_unit_length
from pretrain.probe import OnlineProbe
from pretrain.rundir import open_run, plain
from pretrain.schedule import warmup_cosine
from pretrain.views import ViewDataset
from pretrain.weights import write_encoder

logger = logging.getLogger("pretrain")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = build_parser().parse_args(argv)
    config = load_config(get_defaults(), args.config, "pretrain", args.overrides)
    validate(config)
    device = distributed.start(torch.cuda.is_available())
    try:
        pretrain(config, Path(args.output or f"output/{Path(args.config).stem}"), args.resume, device)
    finally:
        distributed.stop()


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="pretrain/train.py", description="Pretrain an encoder with CorInfoMax.")
    parser.add_argument("--config", default="shapes_R18", help="a recipe in configs/pretrain, or a yaml file")
    parser.add_argument("--output", default="", help="the run directory; output/<config> by default")
    parser.add_argument("--resume", action="store_true", help="go on where the run directory's last checkpoint is")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="config keys to change")
    return parser


def pretrain(config: CfgNode, output: Path, resume: bool, device: torch.device) -> None:
    """Pretrain as the configuration says, into a run directory."""
    source = build_source(config.DATA.NAME, config.DATA.ROOT, "pretrain")
    check_batch(len(source), config.TRAIN.BATCH_SIZE, distributed.world_size())
    probe = OnlineProbe(config, device) if config.PROBE.EVERY and distributed.is_main() else None
    start = open_run(output, config, resume)

    torch.manual_seed(config.SEED)
    parts = build_parts(config, device)
    first_step = restore(start, parts, output) if start else 0
    steps_per_epoch = len(source) // config.TRAIN.BATCH_SIZE
    total_steps = steps_per_epoch * config.TRAIN.EPOCHS
    last_step = min(total_steps, config.TRAIN.MAX_STEPS or total_steps)
    trainer = build_trainer(config, parts, device, total_steps, steps_per_epoch)
    loader = build_loader(
        ViewDataset(source, config.DATA.IMAGE_SIZE, build_recipes(config), config.SEED),
        ShuffledBatches(
            len(source),
            batch_size=config.TRAIN.BATCH_SIZE,
            seed=config.SEED,
            first_step=first_step,
            last_step=last_step,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        ),
        config.DATA.WORKERS,
        device,
    )
    metrics = Metrics(output, first_step) if distributed.is_main() else None
    logger.info("%d images, steps %d to %d, %d an epoch", len(source), first_step, last_step, steps_per_epoch)
    logger.info("%s on %d %s process(es)", trainer.precision, distributed.world_size(), device.type)
    engine.train(
        trainer,
        loader,
        first_step=first_step,
        last_step=last_step,
        steps_per_epoch=steps_per_epoch,
        log_period=config.LOG.PERIOD,
        max_unreadable=config.DATA.MAX_UNREADABLE,
        metrics=metrics,
        end_epoch=partial(end_epoch, config, output, parts, probe, metrics),
    )
    if metrics:
        metrics.close()
        export(config, output, parts["network"])


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


def build_trainer(
    config: CfgNode, parts: dict[str, Any], device: torch.device, total_steps: int, steps_per_epoch: int
) -> engine.Trainer:
    """The training step, with the network wrapped for several processes and compiled where asked for."""
    network = parts["network"]
    if config.TRAIN.COMPILE:
        network.compile()
    if distributed.world_size() > 1:
        if device.type == "cuda":  # torch has no SyncBatchNorm for the CPU: there each process has its own statistics
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        network = DistributedDataParallel(network, broadcast_buffers=False)
    schedule: Callable[[int], float] = partial(
        warmup_cosine,
        total_steps=total_steps,
        warmup_steps=config.TRAIN.WARMUP_EPOCHS * steps_per_epoch,
        peak=config.TRAIN.LR,
        warmup_start=config.TRAIN.WARMUP_LR,
        final=config.TRAIN.MIN_LR,
    )
    return engine.Trainer(
        network=network,
        criterion=parts["criterion"],
        optimizer=parts["optimizer"],
        learning_rate=schedule,
        mean=torch.tensor(config.DATA.MEAN, device=device),
        std=torch.tensor(config.DATA.STD, device=device),
        device=device,
        precision=resolve_precision(config.TRAIN.PRECISION, device),
        micro_batch=config.TRAIN.MICRO_BATCH,
    )


def restore(state: dict[str, Any], parts: dict[str, Any], output: Path) -> int:
    """Put a checkpoint's state back. Returns the step to go on from."""
    checkpoint.fill(parts["network"], state["model"], output)
    checkpoint.fill(parts["criterion"], state["objective"], output)
    parts["optimizer"].load_state_dict(state["optimizer"])
    return state["position"]["step"]


def end_epoch(
    config: CfgNode,
    output: Path,
    parts: dict[str, Any],
    probe: OnlineProbe | None,
    metrics: Metrics | None,
    epoch: int,
    step: int,
) -> None:
    """Save a checkpoint, and probe the encoder when it is time."""
    if not metrics:
        return
    state = {
        "format": checkpoint.PRETRAIN,
        "model": parts["network"].state_dict(),
        "objective": parts["criterion"].state_dict(),
        "optimizer": parts["optimizer"].state_dict(),
        "position": {"epoch": epoch, "step": step},
        "config": plain(config),
    }
    checkpoint.save(output, state)
    if probe and epoch % config.PROBE.EVERY == 0:
        values = probe(parts["network"].encoder)
        metrics.write(step - 1, values)
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
