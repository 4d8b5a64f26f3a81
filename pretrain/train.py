"""Pretrain an encoder with CorInfoMax.

    python pretrain/train.py                                            the embedded dataset, minutes on a CPU
    python pretrain/train.py --config imagenet1k_R50 DATA.ROOT /imagenet
    torchrun --nproc_per_node 8 pretrain/train.py --config imagenet1k_R50 DATA.ROOT /imagenet

The run directory gets config.yaml, log.txt, metrics.json, spectrum.json, TensorBoard events, checkpoints/ and, in the
end, encoder.safetensors. An interrupted run goes on with the same command and --resume. At SIGTERM, SIGINT or SIGUSR1
a run saves and leaves with status 75 (docs/reliability.md).
"""

import contextlib
import logging
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from fvcore.common.config import CfgNode
from torch import nn

from foundation import devices
from foundation.config import load_config
from foundation.errors import ArgumentParser, UserError, run
from foundation.files import report_disk_errors
from pretrain.batches.loader import report_dead_workers
from pretrain.batches.sampler import check_batch
from pretrain.batches.scan import check_data
from pretrain.config import build_streaming, get_defaults, validate
from pretrain.distributed import group
from pretrain.distributed.signals import STOPPED, StopRequest
from pretrain.encoder import SiameseNetwork
from pretrain.evaluation.probe import OnlineProbe
from pretrain.images.sources import build_source
from pretrain.runs import checkpoint, listing
from pretrain.runs.folder import add_run_options, open_run, plain
from pretrain.runs.weights import write_encoder
from pretrain.training.build import (
    build_batches,
    build_checkpoint_policy,
    build_network,
    build_parts,
    build_recorder,
    build_schedule,
    build_trainer,
)
from pretrain.training.estimate import describe_cost
from pretrain.training.loop import Skipped, train
from pretrain.training.plan import build_without_memory, describe_plan
from pretrain.training.recorder import Recorder
from pretrain.training.schedule import StepRange

logger = logging.getLogger("pretrain")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = build_parser().parse_args(argv)
    if args.list_runs:
        print(listing.table(Path(args.list_runs)))
        return
    config = load_config(get_defaults(), args.config, "pretrain", args.overrides)
    validate(config)
    if args.dry_run or args.check_data:
        place, processes = group.announced()
        if place == 0:  # one look is enough
            look(config, processes, check_images=args.check_data)
        return
    output = Path(args.output or f"output/{Path(args.config).stem}")
    with StopRequest() as request, report_disk_errors(output):
        device = group.start(devices.is_usable(), timedelta(seconds=config.TRAIN.PEER_TIMEOUT))
        try:
            with group.report_lost_peers(), devices.report_out_of_memory(advise(config)):
                complete = pretrain(config, output, args.resume, device, request)
        finally:
            group.stop()
    if not complete:
        raise SystemExit(STOPPED)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="pretrain/train.py", description="Pretrain an encoder with CorInfoMax.")
    parser.add_argument("--config", default="shapes_R18", help="a recipe in configs/pretrain, or a yaml file")
    add_run_options(parser, "output/<config>")
    parser.add_argument("--dry-run", action="store_true", help="print what the configuration comes to, and stop")
    parser.add_argument("--check-data", action="store_true", help="read every image, list the damaged ones, and stop")
    parser.add_argument(
        "--list-runs", nargs="?", const="output", metavar="DIR", help="list the runs below DIR (output), and stop"
    )
    return parser


def advise(config: CfgNode) -> str:
    """What to do where the batch does not fit a GPU."""
    part, share = config.TRAIN.MICRO_BATCH, config.TRAIN.BATCH_SIZE // group.world_size()
    change = f"lower TRAIN.MICRO_BATCH (now {part})" if 0 < part < share else f"set TRAIN.MICRO_BATCH below {share}"
    return f"{change}; loss and gradient stay those of the whole batch"


def look(config: CfgNode, processes: int, check_images: bool) -> None:
    """Check the configuration and the images without training, and print what they come to in so many processes."""
    data = config.DATA
    source = build_source(data.NAME, data.ROOT, "pretrain", data.CLASSES, build_streaming(config))
    if check_images:
        check_data(source, config.DATA.WORKERS, config.DATA.WORKER_TIMEOUT)
        return
    check_batch(len(source), config.TRAIN.BATCH_SIZE, processes)
    span = StepRange.of(config, len(source), first=0)
    print(yaml.safe_dump(plain(config), sort_keys=False))
    lines = describe_plan(
        images=len(source),
        batch_size=config.TRAIN.BATCH_SIZE,
        micro_batch=config.TRAIN.MICRO_BATCH,
        processes=processes,
        epochs=config.TRAIN.EPOCHS,
        warmup_epochs=config.TRAIN.WARMUP_EPOCHS,
        last_step=span.last,
        schedule=build_schedule(config, span.total, span.per_epoch),
        network=build_without_memory(partial(build_network, config)),
        dim=config.PROJECTOR.DIMS[-1],
    )
    print("\n".join(lines))
    device = torch.device("cuda" if devices.is_usable() else "cpu")
    print("\n".join(describe_cost(config, processes=processes, steps=span.last, device=device)))


def pretrain(config: CfgNode, output: Path, resume: bool, device: torch.device, request: StopRequest) -> bool:
    """Pretrain as the configuration says, into a run directory. Returns False where a signal has stopped it."""
    data = config.DATA
    source = build_source(data.NAME, data.ROOT, "pretrain", data.CLASSES, build_streaming(config))
    check_batch(len(source), config.TRAIN.BATCH_SIZE, group.world_size())
    probe = OnlineProbe(config, device) if config.PROBE.EVERY and group.is_main() else None
    start = open_run(output, config, resume)

    torch.manual_seed(config.SEED)
    parts = build_parts(config, device)
    position = restore(start, parts, output, len(source)) if start else {"step": 0}
    group.check_same(position["step"], "the step to go on from", device)
    span = StepRange.of(config, len(source), position["step"])
    trainer = build_trainer(config, parts, device, span.total, span.per_epoch)
    loader = build_batches(config, source, span, device)
    recorder = build_recorder(config, output, parts["criterion"], span) if group.is_main() else None
    logger.info("%d images, steps %d to %d, %d an epoch", len(source), span.first, span.last, span.per_epoch)
    logger.info("%s on %d %s process(es)", trainer.precision, group.world_size(), device.type)
    if group.world_size() == 1 and torch.cuda.device_count() > 1:
        logger.info("one of %d GPUs is used; torchrun --nproc_per_node takes more", torch.cuda.device_count())
    with report_dead_workers(loader), contextlib.closing(recorder) if recorder else contextlib.nullcontext():
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
            request=request,
            checkpoints=build_checkpoint_policy(config, output, parts, recorder, span.first, len(source)),
            end_epoch=partial(end_epoch, config, parts["network"], probe, recorder),
        )
    if not complete:
        logger.info("stopped as asked to; the same command with --resume goes on")
    elif group.is_main():
        export(config, output, parts["network"])
    return complete


def restore(state: dict[str, Any], parts: dict[str, Any], output: Path, images: int) -> dict[str, int]:
    """Put a checkpoint's state back. Returns the position to go on from.

    Raises:
        UserError: it is of another architecture, or of another number of `images`: its place in the epoch is lost.
    """
    if state["images"] != images:
        raise UserError(
            f"cannot resume {output}: it was begun on {state['images']} images, and there are {images} now; restore "
            "the dataset, or choose another --output"
        )
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
