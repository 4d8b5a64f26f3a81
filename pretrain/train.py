"""Pretrain an encoder with CorInfoMax.

    python pretrain/train.py PHOTOS                   your own images: folders (nested or flat) or tars, one or several
    python pretrain/train.py PHOTOS --dry-run         the plan for them with its reasons, and a verdict; trains nothing
    python pretrain/train.py PHOTOS --weights FILE    the same, beginning from existing weights
    python pretrain/train.py                          the embedded dataset, minutes on a CPU
    python pretrain/train.py --config imagenet1k_R50 DATA.ROOT /imagenet
    torchrun --nproc_per_node 8 pretrain/train.py --config imagenet1k_R50 DATA.ROOT /imagenet

The run folder gets config.yaml, log.txt, metrics.json, spectrum.json, TensorBoard events, checkpoints/ and, at the
end, encoder.safetensors. `--resume` continues an interrupted run with the configuration in its config.yaml. At SIGTERM,
SIGINT or SIGUSR1 a run saves and exits with status 75 (docs/reliability.md).
"""

import argparse
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from foundation.command_line import add_keys_option, add_run_options, split_paths
from foundation.errors import ArgumentParser, UserError, run

if TYPE_CHECKING:
    import torch
    from fvcore.common.config import CfgNode

    from foundation.signals import StopRequest

DEMO = "shapes_R18"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises UserError where an argument, a file or a value cannot be used."""
    args = parse(argv)
    if args.list_runs is not None:
        list_runs(args.list_runs)
    elif args.check_data or args.dry_run:
        inspect(args)
    else:
        train(args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with `paths` and `overrides` apart and the plain options among the overrides.

    Raises:
        UserError: the command line is wrong, or --hours cannot be used with it.
    """
    args = build_parser().parse_args(argv)
    args.paths, args.overrides = split_paths(args.overrides)
    for option, key in PLAIN_OPTIONS.items():
        value = getattr(args, option)
        if value is not None:
            args.overrides += [key, str(value)]
    if args.hours is not None and (not args.paths or args.config or not 0 < args.hours < math.inf):
        raise UserError("--hours is the time that a plan may use: give it with PATH, without --config, and above 0")
    return args


PLAIN_OPTIONS = {
    "epochs": "TRAIN.EPOCHS",
    "batch_size": "TRAIN.BATCH_SIZE",
    "encoder": "ENCODER.NAME",
    "weights": "ENCODER.WEIGHTS",
}


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="pretrain/train.py",
        description="Pretrain an encoder with CorInfoMax: on your own images (PATH...), by a recipe (--config), or, "
        "without either, on the embedded dataset.",
    )
    parser.add_argument("--config", default="", help="a recipe in configs/pretrain, or a yaml file")
    add_run_options(parser, "output/<config or folder>", paths=True)
    own = parser.add_argument_group("plain options")
    own.add_argument("--epochs", type=int, metavar="N", help="passes over the images (TRAIN.EPOCHS)")
    own.add_argument("--batch-size", type=int, metavar="N", help="images in a step, over all processes")
    own.add_argument("--hours", type=float, metavar="H", help="time that the plan for your own images may use")
    own.add_argument("--encoder", metavar="NAME", help="resnet18, resnet34, resnet50 or resnet101")
    own.add_argument("--weights", metavar="FILE", help="begin from these weights (ENCODER.WEIGHTS)")
    only = parser.add_argument_group("print and stop (one of them)").add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="the plan with its reasons, its cost and a verdict")
    only.add_argument("--check-data", action="store_true", help="read every image and list the damaged ones")
    only.add_argument("--list-runs", nargs="?", const="output", metavar="DIR", help="the runs below DIR (output)")
    add_keys_option(parser, "pretrain.config:get_defaults")
    return parser


def list_runs(root: str) -> None:
    """Print a table of the runs below a folder. Raises UserError where there is no such folder."""
    from pretrain.runs import listing

    if not root:  # of an unset variable; Path would take it for the working directory
        raise UserError("--list-runs names no folder: give one, or leave it out for output")
    print(listing.table(Path(root)))


def inspect(args: argparse.Namespace) -> None:
    """Check the images (--check-data), or print the configuration and its cost for the processes that were started."""
    import torch
    import yaml

    from foundation import devices
    from pretrain.batches.sampler import check_batch
    from pretrain.batches.scan import check_data
    from pretrain.config import build_streaming
    from pretrain.distributed import group
    from pretrain.images.sources import build_source
    from pretrain.runs.folder import plain
    from pretrain.training.dry_run import describe

    place, processes = group.announced()
    if place != 0:  # one process answers for all
        return
    config = load_settings(args)
    data, streaming = config.DATA, build_streaming(config)  # a plan leaves what is used of these as it is
    images = (data.NAME, data.ROOT, "pretrain", data.CLASSES, streaming)
    device = torch.device("cuda" if devices.is_usable() else "cpu")
    if args.check_data:
        check_data(build_source(*images, origin=origin_of(args)), data.WORKERS, data.WORKER_TIMEOUT)
        return
    config, plan = resolve(args, config, device, processes)
    source = build_source(*images, origin=origin_of(args))
    check_batch(len(source), config.TRAIN.BATCH_SIZE, processes)
    if not args.planned:
        print(yaml.safe_dump(plain(config), sort_keys=False))
    print("\n".join([*plan, *describe(config, source, processes, device)]))


def train(args: argparse.Namespace) -> None:
    """Train, in each of the processes that were started."""
    from foundation.signals import STOPPED, StopRequest

    with StopRequest() as request:  # from here on Ctrl-C is acknowledged, while the imports take seconds
        complete = train_in_group(args, request)
    if not complete:
        raise SystemExit(STOPPED)


def train_in_group(args: argparse.Namespace, request: "StopRequest") -> bool:
    """Join the other processes, resolve the configuration and train. Returns False where a signal stopped the run."""
    with request.importing():
        from datetime import timedelta

        import torch

        from foundation import devices
        from foundation.files import report_disk_errors
        from pretrain.distributed import group
        from pretrain.evaluation.probe import OnlineProbe
        from pretrain.training.run import pretrain
        from pretrain.training.suitability import steps_warning

    output = output_folder(args)
    settings = load_settings(args)
    use_cuda = devices.is_usable()
    place, processes = group.announced()
    # Before the processes join: a plan times training steps, which would wait for the others if they had.
    kind = torch.device("cuda" if use_cuda else "cpu")
    resolved = group.attempt(lambda: resolve(args, settings, kind, processes)) if place == 0 else None
    with report_disk_errors(output):
        device = group.start(use_cuda, timedelta(seconds=settings.TRAIN.PEER_TIMEOUT))
        try:
            with group.report_lost_peers():
                config, remarks = group.from_main(resolved)
                build_probe = partial(OnlineProbe, config, device)
                # The first start has said it to a run that is continued.
                check_count = (lambda _: ()) if continues_run(args) else partial(steps_warning, config, args.planned)
                with devices.report_out_of_memory(advise(config)):
                    common = config, output, args.resume, device, request
                    return pretrain(*common, build_probe, remarks, check_count, origin_of(args))
        finally:
            group.stop()


def output_folder(args: argparse.Namespace) -> Path:
    """The run folder: as given, or that of the run whose config.yaml is given, or named after the recipe or the first
    folder of images.
    """
    from pretrain.runs.folder import folder_of

    if args.output:
        return Path(args.output)
    if own := folder_of(args.config):
        return own
    name = Path(args.config or DEMO).stem
    if args.paths and not args.config:
        name = Path(args.paths[0]).resolve().name.removesuffix(".tar") or "images"
        name = os.fsencode(name).decode("utf-8", "replace")  # TensorBoard takes no other
    return Path("output") / name


def continues_run(args: argparse.Namespace) -> bool:
    """Whether there is a run to continue: `--resume` may be given to the first start too."""
    from pretrain.runs import checkpoint

    return args.resume and checkpoint.exists(output_folder(args))


def origin_of(args: argparse.Namespace) -> str:
    """The option or key that names the images, for messages."""
    return "PATH" if args.paths else "DATA.ROOT"


def load_settings(args: argparse.Namespace) -> "CfgNode":
    """The configuration as far as it is known before the images are read.

    A run that is resumed without --config has its own config.yaml as the recipe. PATH sets DATA.NAME and DATA.ROOT.

    Raises:
        UserError: a wrong key or value, or a PATH that holds no images.
    """
    from foundation.config import RUN_CONFIG, apply_overrides, check_keys, load_config
    from pretrain.config import check_values, get_defaults, validate
    from pretrain.images.paths import locate

    own = output_folder(args) / RUN_CONFIG
    recipe = args.config or (str(own) if args.resume and own.is_file() else "" if args.paths else DEMO)
    config = load_config(get_defaults(), recipe, "pretrain") if recipe else get_defaults()
    check_keys(config, args.overrides)  # first: what is wrongly taken for a key has taken the next word along
    if args.paths:
        config.DATA.NAME, config.DATA.ROOT = locate(args.paths)
    apply_overrides(config, args.overrides)
    args.planned = not recipe
    # A plan changes the other values before they have to agree with those that are given.
    (check_values if args.planned else validate)(config)
    return config


def resolve(
    args: argparse.Namespace, config: "CfgNode", device: "torch.device", processes: int
) -> "tuple[CfgNode, list[str]]":
    """The configuration that the run uses, with remarks on it: the plan for own images, or what a recipe lacks.

    Raises:
        UserError: the images cannot be read, the recipe cannot work on them, or the run folder holds another run or
            lies among the images.
    """
    from foundation.config import override_pairs
    from pretrain.config import validate
    from pretrain.images.paths import check_outside
    from pretrain.runs.folder import refuse_begun
    from pretrain.training.own_images import plan_run
    from pretrain.training.suitability import check_inputs, memory_warning, probe_warning

    remarks: list[str] = []
    begins = not continues_run(args)
    if not args.dry_run:  # before a plan measures the images and the machine
        refuse_begun(output_folder(args), config, args.resume)
        if begins:
            check_outside(output_folder(args), args.paths)
    if args.planned:
        given = {key for key, _ in override_pairs(args.overrides)}
        config, remarks = plan_run(config, given, device, processes, args.hours)
        validate(config)
    if begins:
        check_inputs(config)
    if not args.planned and not args.dry_run:
        remarks = memory_warning(config, device, processes)
    if begins:
        remarks = [*remarks, *probe_warning(config)]
    return config, remarks


def advise(config: "CfgNode") -> str:
    """What to do where the batch does not fit a GPU."""
    from pretrain.distributed import group

    part, share = config.TRAIN.MICRO_BATCH, config.TRAIN.BATCH_SIZE // group.world_size()
    change = f"lower TRAIN.MICRO_BATCH (now {part})" if 0 < part < share else f"set TRAIN.MICRO_BATCH below {share}"
    return f"{change}; loss and gradient stay those of the whole batch"


def cli() -> NoReturn:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
