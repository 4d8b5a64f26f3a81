"""Judge a frozen encoder on another set of images: logistic regression, or VOC07 with one SVM for each class.

    python pretrain/transfer.py --weights output/shapes_R18 --data /data/flowers     train/ and val/ by class
    python pretrain/transfer.py --weights output/imagenet1k_R50 --voc07 /data/VOCdevkit/VOC2007

Logistic regression on the features of central crops. Its regularisation is the one that does best on a tenth of the
training images held out, and then it is trained on all of them. VOC07: squared hinge loss, C by cross-validation in 3
folds, the mean over the classes of the average precision on the test images (VISSL's protocol).
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from foundation import devices
from foundation.errors import ArgumentParser, UserError, run
from pretrain import classifiers
from pretrain.config import resolve_precision
from pretrain.distributed import group
from pretrain.encoder import ENCODERS, STEMS
from pretrain.evaluation.features import Pipeline, extract
from pretrain.images.labelled import build_labelled_splits
from pretrain.images.voc07 import read_voc07
from pretrain.runs.folder import write_results
from pretrain.runs.metrics import start_logging
from pretrain.runs.weights import IMAGENET_MEAN, IMAGENET_STD, EncoderWeights, build_from, read_weights

logger = logging.getLogger("pretrain")
Features = Callable[[Any], tuple[np.ndarray, np.ndarray]]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = build_parser().parse_args(argv)
    if bool(args.data) == bool(args.voc07):
        raise UserError("name either --data or --voc07")
    if args.image_size < 1:
        raise UserError(f"--image-size must be at least 1, not {args.image_size}")
    weights = read_weights(args.weights)
    name, stem = weights.name or args.encoder, weights.stem or args.stem
    if not name:
        raise UserError(f"{weights.source} does not say which encoder it holds; name it with --encoder")
    # Everything that can be wrong with the images is found before the encoder is built.
    images = read_voc07(Path(args.voc07)) if args.voc07 else build_labelled_splits("folder", args.data)
    torch.manual_seed(args.seed)
    features = build_features(weights, name, stem, args.image_size, args.workers)
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from error
    start_logging(output)
    logger.info("%s (%s), %d and %d images", weights.source, name, *(len(split) for split in images))
    judge = judge_voc07 if args.voc07 else judge_folder
    about = {"weights": weights.source, "init": weights.init, "encoder": name, "data": args.data or args.voc07}
    write_results(output, {"kind": "transfer", **about, "seed": args.seed, **judge(*images, features, args.seed)})


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="pretrain/transfer.py", description="A frozen encoder on another set of images.")
    parser.add_argument("--weights", required=True, help="checkpoint, run directory, safetensors, or `random`")
    parser.add_argument("--data", default="", help="a folder with train/ and val/, a folder for each class in both")
    parser.add_argument("--voc07", default="", help="the folder VOC2007, as its archives unpack")
    parser.add_argument("--output", default="output/transfer", help="folder for results.json and log.txt")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--encoder", default="", choices=("", *ENCODERS), help="for weights that do not say")
    parser.add_argument("--stem", default="imagenet", choices=STEMS, help="for weights that do not say")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--seed", type=int, default=0, help="of the images held out, and of a random encoder")
    return parser


def build_features(weights: EncoderWeights, name: str, stem: str, size: int, workers: int) -> Features:
    """Source -> features (N, F) of central crops and labels (N,)."""
    device = group.start(devices.is_usable())
    encoder = build_from(weights, name, stem).to(device)
    mean = torch.tensor(weights.mean or IMAGENET_MEAN, device=device)
    std = torch.tensor(weights.std or IMAGENET_STD, device=device)
    pipeline = Pipeline(size, mean, std, workers, device)

    def features(source: Any) -> tuple[np.ndarray, np.ndarray]:
        rows, labels = extract(encoder, source, pipeline, precision=resolve_precision("auto", device), title="features")
        return rows.numpy(), labels.numpy()

    return features


def judge_folder(train: Any, val: Any, features: Features, seed: int) -> dict[str, Any]:
    """Accuracy of logistic regression on class folders."""
    found = classifiers.logistic_regression(*features(train), *features(val), seed=seed)
    logger.info("logistic regression, C %g: top-1 %.2f %%", found["c"], found["top1"])
    return found


def judge_voc07(train: Any, test: Any, features: Features, seed: int) -> dict[str, Any]:
    """Mean average precision of linear SVMs on VOC07."""
    train_rows, test_rows = features(train)[0], features(test)[0]
    found = classifiers.voc07_svm(train_rows, train.present, test_rows, test.present)
    by_class = dict(zip(train.classes, found["ap"], strict=True))
    logger.info("VOC07: mAP %.2f %%", found["map"])
    return {"map": found["map"], "ap": by_class}


def cli() -> NoReturn:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
