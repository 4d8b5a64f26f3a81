"""Train the whole network, encoder and linear head, with labels: with few of them, or with all from scratch.

    python pretrain/finetune.py --config shapes_R18 --weights output/shapes_R18 --fraction 0.1
    python pretrain/finetune.py --config shapes_R18_supervised --weights random
    torchrun --nproc_per_node 8 pretrain/finetune.py --config imagenet1k_1percent --weights W DATA.ROOT /imagenet

The run folder gets config.yaml, log.txt, metrics.json, TensorBoard events, checkpoints/ and, at the end,
results.json and encoder.safetensors. The same command with --resume continues an interrupted run.
"""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from foundation.command_line import add_keys_option, add_run_options
from foundation.errors import ArgumentParser, UserError, resumable, run
from foundation.signals import StopRequest


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises UserError where an argument, a file or a value cannot be used."""
    args = build_parser().parse_args(argv)
    if args.fraction is not None and not 0 < args.fraction <= 1:
        raise UserError(f"--fraction must be above 0 and at most 1, not {args.fraction:g}")
    with resumable(), StopRequest() as request:  # from here on, because the imports take seconds
        train(args, request)


def train(args: argparse.Namespace, request: StopRequest) -> None:
    """Fine-tune as the command line says."""
    with request.importing():
        from foundation.config import load_config
        from pretrain.evaluation.command import run_evaluation
        from pretrain.evaluation.config import get_finetune_defaults, validate_finetune
        from pretrain.evaluation.finetuning import finetune
        from pretrain.runs.folder import with_earlier_values

    # --fraction replaces the list that a recipe may name.
    lists = ["DATA.LIST", "", "DATA.LIST_URL", ""]
    fraction = [] if args.fraction is None else ["DATA.FRACTION", str(args.fraction), *lists]
    config = load_config(
        with_earlier_values(get_finetune_defaults(), args.config), args.config, "finetune", [*args.overrides, *fraction]
    )
    validate_finetune(config)
    run_evaluation("finetune", finetune, config, args, request)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="pretrain/finetune.py", description="Train encoder and linear head with labels.")
    parser.add_argument("--config", required=True, help="a recipe in configs/finetune, or a yaml file")
    parser.add_argument(
        "--weights", default="random", help="checkpoint, run folder, safetensors, or `random` (the default)"
    )
    parser.add_argument(
        "--fraction",
        type=float,
        metavar="F",
        help="of the training images of each class, above 0 and at most 1; instead of a list",
    )
    add_run_options(parser, "output/finetune_<config>")
    add_keys_option(parser, "pretrain.evaluation.config:get_finetune_defaults")
    return parser


def cli() -> NoReturn:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
