"""A pretraining run in its run folder: begin or resume, train, export the encoder."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from foundation.errors import UserError
from foundation.names import counted
from foundation.signals import StopRequest
from pretrain.batches.loader import report_dead_workers
from pretrain.batches.sampler import check_batch
from pretrain.config import build_streaming
from pretrain.distributed import group
from pretrain.encoder import SiameseNetwork
from pretrain.images.sources import Source, build_source
from pretrain.runs import checkpoint
from pretrain.runs.folder import open_run, withdraw_outcome
from pretrain.runs.weights import read_weights, write_encoder
from pretrain.training.build import (
    build_batches,
    build_checkpoint_policy,
    build_parts,
    build_recorder,
    build_trainer,
    report_failed_compilation,
)
from pretrain.training.cuda_graph import capture_step, uses_graph
from pretrain.training.loop import Skipped, train
from pretrain.training.recorder import Recorder
from pretrain.training.schedule import StepRange
from pretrain.training.suitability import check_architecture

Probe = Callable[[nn.Module], dict[str, float]]
logger = logging.getLogger("pretrain")


def pretrain(
    config: CfgNode,
    output: Path,
    resume: bool,
    device: torch.device,
    request: StopRequest,
    build_probe: Callable[[], Probe],
    remarks: Sequence[str] = (),
    check_count: Callable[[int], Sequence[str]] = lambda images: (),
    origin: str = "DATA.ROOT",
) -> bool:
    """Pretrain as the configuration says, into a run folder.

    Args:
        config: of the run.
        output: the run folder.
        resume: continue from its last checkpoint, if there is one.
        device: of this process.
        request: of the signals that stop a run.
        build_probe: builds what measures the encoder each `PROBE.EVERY` epochs; called only where that is set.
        remarks: lines for the log, such as the plan that the configuration comes from.
        check_count: further lines, about the number of images.
        origin: the option or key that DATA.ROOT comes from, for messages.

    Returns:
        False where a signal has stopped the run before its end.
    """
    data = config.DATA
    streaming = build_streaming(config)
    source = build_source(data.NAME, data.ROOT, "pretrain", data.CLASSES, streaming, together=True, origin=origin)
    check_batch(len(source), config.TRAIN.BATCH_SIZE, group.world_size())
    uses_graph(config, device, config.TRAIN.BATCH_SIZE // group.world_size())  # an error comes before there is a run
    probe = build_probe() if config.PROBE.EVERY and group.is_main() else None
    start = open_run(output, config, resume)
    for line in [*remarks, *check_count(len(source))]:
        logger.info("%s", line)

    torch.manual_seed(config.SEED)
    parts = build_parts(config, device)
    if start:
        position = restore(start, parts, output, len(source))
        del start  # its tensors would take the memory of a checkpoint as long as the run lasts
    else:
        position = {"step": 0}
        fill_encoder(parts["network"].encoder, config.ENCODER.WEIGHTS, config)
    group.check_same(position["step"], "the step to go on from", device)
    span = StepRange.of(config, len(source), position["step"])
    if span.first >= span.last:
        logger.info("the run is complete: %s", counted(span.last, "step"))
    elif not take_steps(config, output, source, parts, span, position.get("skipped", 0), device, request, probe):
        logger.info("stopped as requested; the same command with --resume continues")
        return False
    if group.is_main():
        path = export(config, output, parts["network"])
        request.finish()
        logger.info("the encoder is in %s", path)
    return True


def take_steps(
    config: CfgNode,
    output: Path,
    source: Source,
    parts: dict[str, Any],
    span: StepRange,
    skipped: int,
    device: torch.device,
    request: StopRequest,
    probe: Probe | None,
) -> bool:
    """Train from the first step of `span` to the last, and record and save on the way.

    Args:
        config, output, device, request: as in `pretrain`.
        source: the images.
        parts: as `build_parts` gives them, at the first step.
        skipped: batches that were skipped before it.
        probe: measures the encoder each `PROBE.EVERY` epochs; None: it is not measured.

    Returns:
        False where a signal has stopped the run before the last step.
    """
    trainer = build_trainer(config, parts, device, span.total, span.per_epoch)
    pairs = config.TRAIN.BATCH_SIZE // group.world_size()
    if uses_graph(config, device, pairs):
        capture_step(trainer, pairs, config.DATA.IMAGE_SIZE)
    loader = build_batches(config, source, span, device)
    if group.is_main() and span.first:
        withdraw_outcome(output)
    recorder = build_recorder(config, output, parts["criterion"], span) if group.is_main() else None
    log_start(len(source), span, trainer.precision, device)
    closing = contextlib.closing(recorder) if recorder else contextlib.nullcontext()
    with report_dead_workers(), report_failed_compilation(config.TRAIN.COMPILE), closing:
        return train(
            trainer,
            loader,
            first_step=span.first,
            last_step=span.last,
            steps_per_epoch=span.per_epoch,
            log_period=config.LOG.PERIOD,
            max_unreadable=config.DATA.MAX_UNREADABLE,
            skipped=Skipped(skipped, config.TRAIN.MAX_SKIPPED),
            recorder=recorder,
            request=request,
            checkpoints=build_checkpoint_policy(config, output, parts, recorder, span.first, len(source)),
            end_epoch=partial(run_probe, config.PROBE.EVERY, parts["network"], probe, recorder),
        )


def log_start(images: int, span: StepRange, precision: str, device: torch.device) -> None:
    """Log the steps that are left, and what they are taken on."""
    logger.info("%d images, steps %d to %d, %d an epoch", images, span.first, span.last, span.per_epoch)
    logger.info("%s on %s", precision, counted(group.world_size(), f"{device.type} process"))
    if group.world_size() == 1 and torch.cuda.device_count() > 1:
        logger.info("one of %d GPUs is used; torchrun --nproc_per_node uses more", torch.cuda.device_count())


def fill_encoder(encoder: nn.Module, weights: str, config: CfgNode) -> None:
    """Begin from existing weights: every tensor of the encoder is replaced; the projector stays as initialised.

    Args:
        encoder: as `build_encoder` gives it, on its device.
        weights: a file or a run folder that `read_weights` reads; empty: nothing is done.
        config: whose ENCODER.NAME and ENCODER.STEM the weights must have.

    Raises:
        UserError: they cannot be read, or are of another architecture.
    """
    if not weights:
        return
    found = read_weights(weights)
    check_architecture(found, config)
    checkpoint.fill(encoder, found.tensors, Path(found.source))
    logger.info("the encoder begins from %s (%s); the projector is new", found.source, found.init)


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


def run_probe(
    every: int,
    network: SiameseNetwork,
    probe: Probe | None,
    recorder: Recorder | None,
    epoch: int,
    step: int,
) -> None:
    """Measure the encoder at the end of each `every`-th epoch."""
    if probe and recorder and epoch % every == 0:
        values = probe(network.encoder)
        recorder.write(step - 1, values)
        for name, value in values.items():
            logger.info("epoch %d: %s %.2f %%", epoch, name.replace("knn", "kNN").replace("_top1", " top-1"), value)


def export(config: CfgNode, output: Path, network: nn.Module) -> Path:
    """Write the finished encoder to the run folder. Returns the file."""
    return write_encoder(
        output,
        network.encoder,  # type: ignore[arg-type]
        objective=config.OBJECTIVE.NAME,
        name=config.ENCODER.NAME,
        stem=config.ENCODER.STEM,
        mean=config.DATA.MEAN,
        std=config.DATA.STD,
        begun_from=config.ENCODER.WEIGHTS,
    )
