"""Features of a folder of images, a sheet of nearest neighbours, and near-duplicates.

    python pretrain/embed.py --weights output/photos PHOTOS
    python pretrain/embed.py --weights output/photos PHOTOS --against TEST      near-duplicates between two folders

Writes to --output (default: output/embed_<folder>):

    features.npy     (N, F) float32, one row per image; images that cannot be read are left out
    names.txt        the image of each row
    neighbours.png   some images with their nearest neighbours by the features, with names and cosine similarities
    duplicates.csv   pairs of images that look the same: within PHOTOS, or between PHOTOS and TEST
    duplicates.png   the first of these pairs, with names and correlations

Images of pretraining that are also in a test set make its results too good: check with --against before training.
`--weights random` needs no checkpoint and finds near-duplicates as well, since these are compared by their pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from foundation.errors import ArgumentParser, UserError, run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises UserError where an argument, a file or a value cannot be used."""
    args = build_parser().parse_args(argv)
    if not 0 < args.threshold <= 1:
        raise UserError(f"--threshold is a correlation above 0 and at most 1, not {args.threshold:g}")
    for option, most in (("size", 4096), ("workers", 1024)):
        if not 0 <= getattr(args, option) <= most:
            raise UserError(f"--{option} must be from 0 to {most}, not {getattr(args, option)}")

    from pretrain.evaluation.embedding import embed_folders
    from pretrain.images.paths import check_outside

    output = Path(args.output or f"output/embed_{Path(args.images).resolve().name}")
    check_outside(output, [args.images, *([args.against] if args.against else [])])
    embed_folders(
        args.weights,
        args.images,
        args.against,
        output,
        side=args.size,
        workers=args.workers,
        threshold=args.threshold,
        encoder=args.encoder,
    )


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="pretrain/embed.py",
        description="Compute features, nearest neighbours and near-duplicates of a folder of images.",
    )
    parser.add_argument("images", metavar="PHOTOS", help="a folder of images, nested or flat, or a tar")
    parser.add_argument("--weights", required=True, help="a run folder, a checkpoint, or `random`")
    parser.add_argument("--against", default="", metavar="FOLDER", help="look for near-duplicates of its images")
    parser.add_argument("--output", default="", help="folder for the results; output/embed_<folder> by default")
    parser.add_argument("--size", type=int, default=0, metavar="S", help="side of the view; that of the run, or 224")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="loader processes")
    parser.add_argument("--encoder", default="", metavar="NAME", help="where the weights do not say: resnet50, ...")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.95,
        help="correlation of two thumbnails that counts as near-duplicate; the 5 nearest of each image are looked at",
    )
    return parser


def cli() -> NoReturn:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
