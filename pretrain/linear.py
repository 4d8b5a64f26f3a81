"""Evaluate an encoder: linear classifiers on its frozen features, and weighted nearest neighbours.

    python pretrain/linear.py --weights output/shapes_R18                 a run folder, checkpoint or safetensors
    python pretrain/linear.py --weights random                            the untrained encoder, to compare with
    torchrun --nproc_per_node 8 pretrain/linear.py --config imagenet1k_R50 --weights W DATA.ROOT /imagenet

The run folder gets config.yaml, log.txt, metrics.json, TensorBoard events, the heads' checkpoints, and at the end
results.json. The same command with --resume continues an interrupted run.
"""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from foundation.command_line import add_keys_option, add_run_options
from foundation.errors import ArgumentParser, resumable, run
from foundation.signals import StopRequest


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises UserError where an argument, a file or a value cannot be used."""
    args = build_parser().parse_args(argv)
    with resumable(), StopRequest() as request:  # from here on, because the imports take seconds
        measure(args, request)


def measure(args: argparse.Namespace, request: StopRequest) -> None:
    """Evaluate as the command line says."""
    with request.importing():
        from foundation.config import load_config
        from pretrain.evaluation.command import run_evaluation
        from pretrain.evaluation.config import get_linear_defaults, validate_linear
        from pretrain.evaluation.linear import evaluate
        from pretrain.runs.folder import with_earlier_values

    config = load_config(with_earlier_values(get_linear_defaults(), args.config), args.config, "linear", args.overrides)
    validate_linear(config)
    run_evaluation("linear", evaluate, config, args, request)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="pretrain/linear.py", description="Measure linear and kNN accuracy of a frozen encoder."
    )
    parser.add_argument("--weights", required=True, help="checkpoint, run folder, safetensors, or `random`")
    parser.add_argument("--config", default="shapes_R18", help="a recipe in configs/linear, or a yaml file")
    add_run_options(parser, "output/linear_<config>")
    add_keys_option(parser, "pretrain.evaluation.config:get_linear_defaults")
    return parser


def cli() -> NoReturn:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
