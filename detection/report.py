"""Compare runs: `python detection/report.py RUN_DIR... --output DIR`.

RUN_DIR is a run of any command (pretraining, linear evaluation, fine-tuning with labels, transfer, detection), or a
folder, which stands for all runs below it. Runs that differ in their seed only are averaged. Besides run folders,
only the images and annotations of the evaluation sets are read. DIR gets report.md, report.html with the pictures
inside, and the pictures as PNG.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from foundation.errors import ArgumentParser, run


def build_parser() -> ArgumentParser:
    """The arguments of the command."""
    parser = ArgumentParser(prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run, or a folder of runs")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the report")
    parser.add_argument("--title", default="Transfer of pretrained encoders", help="title of the page")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs and write both pages with their pictures."""
    arguments = build_parser().parse_args(argv)
    from foundation.names import counted
    from reporting.compose import write_report
    from reporting.runs import read_runs

    found = read_runs(arguments.runs)
    runs = counted(len({run.path for run in found.runs}), "run")
    left_out = f", {len(found.skipped)} left out" if found.skipped else ""
    tell = functools.partial(print, flush=True)
    tell(f"{runs} read{left_out}")
    write_report(found, arguments.title, arguments.output, tell)
    tell(f"The report on {runs}{left_out} is in {arguments.output / 'report.html'}")


def cli() -> NoReturn:
    """The command as a process: errors as one line, exit status 2."""
    run(main)


if __name__ == "__main__":
    cli()
