"""Evaluate a frozen encoder on another set of images: logistic regression, or VOC07 with one SVM for each class.

    python pretrain/transfer.py --weights output/shapes_R18 --data /data/flowers     train/ and val/ by class
    python pretrain/transfer.py --weights output/imagenet1k_R50 --voc07 /data/VOCdevkit/VOC2007

Logistic regression on the features of central crops: its regularisation is the one with the highest accuracy on a
tenth of the training images held out; then it is trained on all of them. VOC07: squared hinge loss, C by
cross-validation in 3 folds, the mean over the classes of the average precision on the test images (VISSL's protocol).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from foundation.errors import ArgumentParser, UserError, run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises UserError where an argument, a file or a value cannot be used."""
    args = build_parser().parse_args(argv)
    check_options(args)

    import torch

    from foundation import devices
    from foundation.files import make_folder, report_disk_errors
    from pretrain.batches.loader import report_dead_workers
    from pretrain.distributed import group
    from pretrain.evaluation.transfer import (
        build_features,
        check_classes,
        check_presence,
        evaluate_folder,
        evaluate_voc07,
        logger,
        refuse_other_results,
    )
    from pretrain.images.labelled import build_labelled_splits
    from pretrain.images.voc07 import read_voc07
    from pretrain.runs.folder import write_results
    from pretrain.runs.metrics import start_logging
    from pretrain.runs.weights import read_weights, trained_side

    weights = read_weights(args.weights)
    name, stem = weights.name or args.encoder, weights.stem or args.stem
    side = args.image_size or trained_side(args.weights)
    if not name:
        raise UserError(f"{weights.source} does not say which encoder it holds; name it with --encoder")
    # Everything that can be wrong with the images is found before the encoder is built.
    voc07 = read_voc07(Path(args.voc07)) if args.voc07 else None
    splits = voc07 or build_labelled_splits("folder", args.data, origin="--data")
    if voc07:
        check_presence(voc07[0])
    else:
        check_classes(splits[0])
    about = {
        "kind": "transfer",
        "weights": weights.source,
        "init": weights.init,
        "encoder": name,
        "stem": stem,
        "data": args.data or args.voc07,
        "image_size": side,
        "seed": args.seed,
    }
    output = Path(args.output)
    refuse_other_results(output, about)
    torch.manual_seed(args.seed)
    features = build_features(weights, name, stem, side, args.workers, group.start(devices.is_usable()))
    make_folder(output)
    start_logging(output)
    counts = [len(split) for split in splits]
    logger.info("%s (%s), %d and %d images, crops of %d pixels", weights.source, name, *counts, side)
    with (
        report_disk_errors(output),
        report_dead_workers(),
        devices.report_out_of_memory("choose a smaller --image-size"),
    ):
        results = evaluate_voc07(*voc07, features) if voc07 else evaluate_folder(*splits, features, args.seed)
        write_results(output, {**about, **results})


def check_options(args: argparse.Namespace) -> None:
    """Raises UserError where a value of the command line cannot be used."""
    if bool(args.data) == bool(args.voc07):
        raise UserError("name either --data or --voc07")
    for option, value, least in (
        ("--image-size", args.image_size, 1),
        ("--workers", args.workers, 0),
        ("--seed", args.seed, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{option} must be at least {least}, not {value}")

    from pretrain.config import MAX_SEED
    from pretrain.encoder import ENCODERS, STEMS

    if args.seed > MAX_SEED:
        raise UserError(f"--seed must be at most {MAX_SEED}, not {args.seed}")

    for option, value, known in (("--encoder", args.encoder, ("", *ENCODERS)), ("--stem", args.stem, STEMS)):
        if value not in known:
            raise UserError(f"{option} {value!r} is not one of {', '.join(filter(None, known))}")


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="pretrain/transfer.py", description="Evaluate a frozen encoder on another set of images."
    )
    parser.add_argument("--weights", required=True, help="checkpoint, run folder, safetensors, or `random`")
    parser.add_argument("--data", default="", help="a folder with train/ and val/, a folder for each class in both")
    parser.add_argument("--voc07", default="", help="the folder VOC2007, as its archives unpack")
    parser.add_argument("--output", default="output/transfer", help="folder for results.json and log.txt")
    parser.add_argument("--image-size", type=int, metavar="S", help="side of the crops; that of the run, or 224")
    parser.add_argument("--encoder", default="", help="architecture (resnet50), where the weights do not name it")
    parser.add_argument("--stem", default="imagenet", help="imagenet or cifar, where the weights do not name it")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out images and of a random encoder")
    return parser


def cli() -> NoReturn:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
