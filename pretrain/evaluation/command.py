"""What linear evaluation and fine-tuning share as commands: from weights and a recipe, in a run folder, to results.

Both can be resumed, run on one process or several, and end with results.json.
"""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import nn

from foundation import devices, published
from foundation.config import recipe_name
from foundation.errors import UserError
from foundation.files import report_disk_errors
from foundation.run_kinds import KINDS, read_results
from foundation.signals import StopRequest, end_workers_at_exit
from pretrain.batches.loader import report_dead_workers
from pretrain.batches.sampler import check_batch
from pretrain.distributed import group
from pretrain.runs.folder import folder_of, open_run, write_results
from pretrain.runs.weights import EncoderWeights, build_from, fingerprint, read_weights, resolve
from pretrain.training.schedule import StepRange

logger = logging.getLogger("pretrain")
Evaluate = Callable[[CfgNode, EncoderWeights, Path, str, bool, torch.device, StopRequest], Mapping[str, Any]]


def run_evaluation(
    kind: str, evaluate: Evaluate, config: CfgNode, args: argparse.Namespace, request: StopRequest
) -> None:
    """Evaluate the weights that the command line names, and write results.json.

    Args:
        kind: what it is called, in results.json and in the default run folder.
        evaluate: (config, weights, run folder, recipe, resume, device, request) -> results; called on every process.
        config: of the evaluation; its empty values are taken from the weights.
        args: `config`, `weights`, `output` and `resume`.
        request: of the signals that stop a run.
    """
    weights = read_weights(args.weights)
    config = resolve(config, weights)
    name = recipe_name(args.config)
    output = Path(args.output or folder_of(args.config) or f"output/{kind}_{name}")
    end_workers_at_exit()
    device = group.start(devices.is_usable())
    try:
        with (
            report_disk_errors(output),
            report_dead_workers(),
            group.report_lost_peers(),
            devices.report_out_of_memory("lower TRAIN.BATCH_SIZE, or share it among more processes"),
        ):
            results = evaluate(config, weights, output, name, args.resume, device, request)
            if group.is_main():
                write_results(output, {"kind": kind, "config": name, **results})
            request.finish()
            if group.is_main():
                found = [metric for metric in KINDS[kind].headline if metric.key in results]
                headline = (f"{metric.title} {results[metric.key]:.2f} %" for metric in found)
                logger.info("%s; all results are in %s", ", ".join(headline), output / "results.json")
                report_published(results, name, kind)
    finally:
        group.stop()


def report_published(results: Mapping[str, Any], recipe: str, kind: str) -> None:
    """Log the published result of the recipe beside the measured one, if there is one of the weights' objective."""
    metric = KINDS[kind].headline[0].key
    compared = published.compare(results[metric], recipe, kind, metric, str(results["init"]))
    if compared:
        logger.info("published: %s", compared)


class Beginning(NamedTuple):
    """What an evaluation starts from."""

    encoder: nn.Module  # on the CPU
    encoder_sha256: str  # of all its tensors
    checkpoint: dict[str, Any] | None  # to resume from
    results: dict[str, Any]  # of the run if it is complete already, which leaves nothing to do; else empty


def begin(
    config: CfgNode,
    weights: EncoderWeights,
    output: Path,
    *,
    recipe: str,
    resume: bool,
    images: int,
    outcome: Sequence[str],
    request: StopRequest,
) -> Beginning:
    """Build the encoder and open the run folder.

    Args:
        recipe: the name of the config.
        images: to train on.
        outcome: names of the files that a complete run has.
        request: of the signals that stop a run; a complete one has nothing to stop.

    Raises:
        UserError: the batch does not fit the images or processes, the weights do not fit the architecture, the run
            directory cannot be used, or it belongs to another encoder.
    """
    check_batch(images, config.TRAIN.BATCH_SIZE, group.world_size())
    torch.manual_seed(config.SEED)
    encoder = build_from(weights, config.ENCODER.NAME, config.ENCODER.STEM, config.ENCODER.ZERO_INIT_RESIDUAL)
    sha256 = fingerprint(encoder)
    checkpoint = open_run(output, config, resume, recipe)
    if checkpoint and checkpoint["encoder_sha256"] != sha256:
        raise UserError(f"{output} holds a run that began with another encoder; choose another --output")
    complete = checkpoint and checkpoint["position"]["step"] >= StepRange.of(config, images, first=0).last
    results = _stored_results(output, outcome, sha256) if complete else {}
    if results:
        request.finish()
        logger.info("the run is complete; these are the results that it has stored")
    return Beginning(encoder, sha256, checkpoint, results)


def _stored_results(output: Path, outcome: Sequence[str], encoder_sha256: str) -> dict[str, Any]:
    """The results of a complete run, on every process; empty where they, or another of its files, are missing."""

    def read() -> dict[str, Any]:
        results = read_results(output) if all((output / name).is_file() for name in outcome) else {}
        return results if results.get("encoder_sha256") == encoder_sha256 else {}

    return group.from_main(group.attempt(read) if group.is_main() else None)


def describe(config: CfgNode, weights: EncoderWeights, encoder_sha256: str) -> dict[str, Any]:
    """The entries of results.json that identify the evaluation."""
    return {
        "weights": weights.source,
        "init": weights.init,
        "dataset": config.DATA.NAME,
        "encoder": config.ENCODER.NAME,
        "encoder_sha256": encoder_sha256,
        "seed": config.SEED,
    }
