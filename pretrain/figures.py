"""Draw what a pretraining run has learned, as PNG and SVG.

    python pretrain/figures.py output/shapes_R18
    python pretrain/figures.py output/corinfomax output/simclr --output figures     several runs on the same axes

    training      loss, its terms and the learning rate
    information   LDMI and the accuracy of the online probe over the epochs (thesis Fig. 5.1), if they were logged
    eigenvalues   of the projector covariance of the first views, sorted (thesis Fig. 5.3)
    tsne          t-SNE of the encoder's features of validation images (thesis Fig. 5.4, with its parameters), in three
                  dimensions; without classes, a map in two dimensions with the images themselves
    neighbours    validation images and their nearest neighbours; framed in green where the class agrees, else in red
    views         pairs of augmented views, as the encoder sees them

Of several runs, `training` and `eigenvalues` compare all, and the others are of the first run, whose `figures` folder
gets them all unless there is an --output. The last three need the run's dataset. LDMI is in nats;
`--ldmi-scale article` draws 4 LDMI / P, the scale of the thesis's figure.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from foundation.errors import ArgumentParser, UserError, run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises UserError where an argument, a file or a value cannot be used."""
    args = build_parser().parse_args(argv)

    from foundation.config import RUN_CONFIG, load_config
    from foundation.files import make_folder, report_disk_errors
    from pretrain.config import get_defaults
    from pretrain.evaluation.figures import NAMES, draw
    from pretrain.runs.metrics import start_logging

    if args.images < 2:
        raise UserError(f"--images must be at least 2, not {args.images}")
    only = args.only.split(",") if args.only else list(NAMES)
    unknown = [name for name in only if name not in NAMES]
    if unknown:
        raise UserError(f"--only {unknown[0]!r} is not one of {', '.join(NAMES)}")
    runs = [Path(name) for name in args.runs]
    for folder in runs:
        refuse_other_runs(folder)
        if not (folder / RUN_CONFIG).is_file() or not (folder / "metrics.json").is_file():
            raise UserError(f"{folder} is not the directory of a pretraining run: no config.yaml or no metrics.json")
    # A sheet shows a damaged image in white; no number depends on it.
    changes = ["DATA.WORKERS", "0", "DATA.MAX_UNREADABLE", "1.0"]
    config = load_config(get_defaults(), str(runs[0] / RUN_CONFIG), "pretrain", changes)
    if args.root:
        config.DATA.ROOT = args.root
    output = Path(args.output) if args.output else runs[0] / "figures"
    make_folder(output)
    start_logging(output)
    with report_disk_errors(output):
        draw(runs, config, only, args.images, output, args.ldmi_scale)


def refuse_other_runs(folder: Path) -> None:
    """Raises UserError where a folder holds a run of another command than pretraining."""
    from foundation.run_kinds import DETECTION, PRETRAIN, identify

    kind = identify(folder)
    if kind is not None and kind.name != PRETRAIN:
        other = "; detection/report.py draws figures of detectors" if kind.name == DETECTION else ""
        raise UserError(f"{folder} is a run of {kind.command}, not of pretraining{other}")


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="pretrain/figures.py", description="Draw figures of pretraining runs, as PNG and SVG.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="directories of pretraining runs")
    parser.add_argument("--output", default="", help="folder for the figures; figures in the first RUN_DIR by default")
    parser.add_argument(
        "--only", default="", help="some of them, with commas: training,information,eigenvalues,tsne,neighbours,views"
    )
    parser.add_argument(
        "--images", type=int, default=10000, help="validation images for tsne and neighbours, at most (10000)"
    )
    parser.add_argument(
        "--ldmi-scale",
        choices=("nats", "article", "both"),
        default="nats",
        help="axis of `information`: LDMI in nats, 4 LDMI / P as in the thesis, or both",
    )
    parser.add_argument("--root", default="", help="the dataset's folder, if it has moved")
    return parser


def cli() -> NoReturn:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
