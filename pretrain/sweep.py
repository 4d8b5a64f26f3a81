"""Pretrain and evaluate several times, with other values of any config keys, and put the results in a table.

    python pretrain/sweep.py --config shapes_objectives                   CorInfoMax beside other objectives
    python pretrain/sweep.py --config cifar100_attraction ROOT /data      thesis Table 5.4
    python pretrain/sweep.py --config my.yaml SEEDS '[0, 1, 2]'

Each run has a folder of its own below --output, `<values>/seed<n>/`, which holds `pretrain` and `linear`. The same
command continues an interrupted sweep: complete runs are kept, an incomplete one is resumed. The table is in table.md
and, with the metrics of every run, in results.json.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from foundation.command_line import add_keys_option
from foundation.errors import ArgumentParser, run
from foundation.signals import StopRequest


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises UserError where an argument, a file or a value cannot be used."""
    args = build_parser().parse_args(argv)
    with StopRequest("stopping now; the same command continues") as request:
        execute(args, request)
        request.finish()


def execute(args: argparse.Namespace, request: StopRequest) -> None:
    """Run the sweep that the command line names. Raises UserError as `main`."""
    with request.importing():
        from foundation.config import load_config
        from foundation.files import report_disk_errors
        from foundation.locks import hold
        from foundation.run_kinds import refuse_other_kind
        from pretrain.evaluation.sweep import get_defaults, plan, sweep
        from pretrain.runs.metrics import start_logging

    config = load_config(get_defaults(), args.config, "sweep", args.overrides)
    plan(config)  # a wrong key or value is an error before there is a folder
    name = Path(args.config).stem
    output = Path(args.output or f"output/sweep_{name}")
    refuse_other_kind(output, "sweep")
    hold(output)  # each run holds its own folder besides
    start_logging(output)
    with report_disk_errors(output):
        sweep(config, name, output, request)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="pretrain/sweep.py", description="Pretrain and evaluate with several values of any config keys."
    )
    parser.add_argument("--config", required=True, help="a sweep in configs/sweep, or a yaml file")
    parser.add_argument("--output", default="", help="folder for all runs; output/sweep_<config> by default")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="keys of the sweep to change")
    add_keys_option(parser, "pretrain.evaluation.sweep:get_defaults")
    return parser


def cli() -> NoReturn:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
