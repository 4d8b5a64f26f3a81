"""Resize a folder of images once and pack it into tars, so that training reads and decodes less.

    python pretrain/pack.py PHOTOS PACKED                       shorter side 256 pixels at most, in PACKED/*.tar
    python pretrain/pack.py IMAGENET PACKED --side 320          train/ and val/ with their classes
    python pretrain/train.py PACKED                             pretrain on the tars

The tars have WebDataset's form: `000000042.jpg` and, of labelled images, `000000042.cls` with the number of the class.
Beside them are an index in the form of WebDataset's `widsindex` (images.json, or train.json and val.json), classes.txt,
and names.tsv with the file that each image was. Each tar is read back and decoded before it gets its name. The same
command again continues where it was interrupted. Damaged images are left out and listed in damaged.txt.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from foundation.errors import ArgumentParser, UserError, run
from foundation.signals import StopRequest

SIDES = (256, 320, 512)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises UserError where an argument, a file or a value cannot be used."""
    args = build_parser().parse_args(argv)
    for option, low, high in (("side", 16, 4096), ("quality", 1, 100), ("images", 1, 1_000_000), ("workers", 0, 1024)):
        value = getattr(args, option)
        if not low <= value <= high:
            raise UserError(f"--{option} must be from {low} to {high}, not {value}")
    with StopRequest("stopping now; the same command continues") as request:
        pack_images(args, request)


def pack_images(args: argparse.Namespace, request: StopRequest) -> None:
    """Pack as the command line says. Raises UserError as `main`."""
    with request.importing():
        from foundation.locks import hold
        from pretrain.images.packing import Form, check_target, logger, pack
        from pretrain.runs.metrics import start_logging

    source, target = Path(args.source), Path(args.target)
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give the folder that holds the images")
    check_target(target)
    hold(target)
    start_logging(target)
    summary = pack(source, target, Form(args.side, args.quality, args.images), args.workers)
    request.finish()
    logger.info("%s", summary)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="pretrain/pack.py", description="Resize images once, and pack them into tars.")
    parser.add_argument("source", metavar="PHOTOS", help="a folder of images, nested or flat, or with train/ and val/")
    parser.add_argument("target", metavar="PACKED", help="a folder for the tars, new or of an interrupted run")
    usual = ", ".join(map(str, SIDES))
    parser.add_argument("--side", type=int, default=256, metavar="S", help=f"shorter side at most; usual: {usual}")
    parser.add_argument("--quality", type=int, default=92, metavar="Q", help="of the JPEGs that are written")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="images in a tar")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes; 0: this one alone")
    return parser


def cli() -> NoReturn:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
