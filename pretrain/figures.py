"""Draw what a pretraining run has learned, as PNG and SVG.

    python pretrain/figures.py output/shapes_R18
    python pretrain/figures.py output/corinfomax output/simclr --output figures     several runs on the same axes

    training      loss, its terms and the learning rate
    information   LDMI and the accuracy of the online probe over the epochs (thesis Fig. 5.1); where they were logged
    eigenvalues   of the projector covariance of the first views, sorted (thesis Fig. 5.3)
    tsne          t-SNE of the encoder's features of validation images (thesis Fig. 5.4, with its parameters)
    neighbours    validation images and their nearest neighbours; framed in green where the class agrees
    views         pairs of augmented views, as the encoder sees them

The last three are of the first run and need its dataset.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from fvcore.common.config import CfgNode
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from foundation import devices
from foundation.config import load_config
from foundation.errors import ArgumentParser, UserError, run
from foundation.names import short_names
from pretrain.batches.augment import augment
from pretrain.batches.views import ViewDataset, collate, resize
from pretrain.config import build_recipes, build_streaming, get_defaults, resolve_precision
from pretrain.evaluation import plots
from pretrain.evaluation.features import extract
from pretrain.evaluation.probe import build_pipeline
from pretrain.images.labelled import Subset, build_labelled_source
from pretrain.images.sources import build_source
from pretrain.runs import checkpoint
from pretrain.runs.metrics import read_metrics, start_logging
from pretrain.runs.weights import build_from, read_weights

NAMES = ("training", "information", "eigenvalues", "tsne", "neighbours", "views")
QUERIES, NEIGHBOURS, PAIRS = 8, 8, 8
# Thesis Section 5.6: three dimensions, perplexity 50, early exaggeration 12, 1000 iterations, random initialisation.
TSNE: dict[str, Any] = {
    "n_components": 3,
    "perplexity": 50,
    "early_exaggeration": 12.0,
    "max_iter": 1000,
    "init": "random",
    "learning_rate": 208.33,
}
logger = logging.getLogger("pretrain")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = build_parser().parse_args(argv)
    only = args.only.split(",") if args.only else list(NAMES)
    unknown = [name for name in only if name not in NAMES]
    if unknown:
        raise UserError(f"--only {unknown[0]!r} is not one of {', '.join(NAMES)}")
    runs = [Path(name) for name in args.runs]
    for folder in runs:
        if not (folder / "config.yaml").is_file() or not (folder / "metrics.json").is_file():
            raise UserError(f"{folder} is not the directory of a pretraining run: no config.yaml or no metrics.json")
    config = load_config(get_defaults(), str(runs[0] / "config.yaml"), "pretrain", ["DATA.WORKERS", "0"])
    if args.root:
        config.DATA.ROOT = args.root
    output = Path(args.output) if args.output else runs[0] / "figures"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from error
    start_logging(output)
    draw(runs, config, only, args.images, output)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="pretrain/figures.py", description="Figures of pretraining runs, as PNG and SVG.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="directories of pretraining runs")
    parser.add_argument("--output", default="", help="folder for the figures; RUN_DIR/figures by default")
    parser.add_argument("--only", default="", help=f"some of them, with commas: {','.join(NAMES)}")
    parser.add_argument("--images", type=int, default=2000, help="validation images for tsne and neighbours")
    parser.add_argument("--root", default="", help="the dataset's folder, where it has moved")
    return parser


def draw(runs: Sequence[Path], config: CfgNode, only: Sequence[str], images: int, output: Path) -> None:
    """Draw the figures that are asked for; one that the runs have no data for is passed over, with a word."""
    named = dict(zip(short_names(runs), runs, strict=True))
    lines = {name: read_metrics(folder / "metrics.json") for name, folder in named.items()}
    features: list[tuple[Tensor, Subset]] = []

    def embedded() -> tuple[Tensor, Subset]:
        if not features:  # two figures need them
            features.append(validation_features(runs[0], config, images))
        return features[0]

    figures: dict[str, Callable[[], Figure | None]] = {
        "training": lambda: plots.training_curves(lines),
        "information": lambda: information(lines[next(iter(lines))]),
        "eigenvalues": lambda: eigenvalues(named),
        "tsne": lambda: tsne(*embedded(), seed=config.SEED),
        "neighbours": lambda: neighbours(*embedded(), size=config.DATA.IMAGE_SIZE),
        "views": lambda: view_pairs(config),
    }
    for name in only:
        figure = figures[name]()
        if figure is None:
            logger.warning("no %s: the run has logged nothing for it", name)
            continue
        for suffix in ("png", "svg"):
            figure.savefig(output / f"{name}.{suffix}", dpi=150, bbox_inches="tight")
        logger.info("%s", output / f"{name}.png")


def information(lines: Sequence[dict[str, float]]) -> Figure | None:
    """LDMI and probe accuracy over the epochs. The probe's lines have no epoch of their own: it is that of the step."""
    epochs = {line["iteration"]: line["epoch"] for line in lines if "epoch" in line}
    accuracy = [{**line, "epoch": epochs[line["iteration"]]} for line in lines if line["iteration"] in epochs]
    curves = plots.series(lines, "ldmi"), plots.series(accuracy, "knn_top1")
    return plots.information_curves(*curves) if any(len(x) for x, _ in curves) else None


def eigenvalues(runs: dict[str, Path]) -> Figure | None:
    """Of the covariance of the first views' embeddings, at the end of each run."""
    spectra = {}
    for name, folder in runs.items():
        log, last = folder / "spectrum.json", folder / "checkpoints" / "last.pt"
        lines = read_metrics(log) if log.is_file() else []
        if lines:
            spectra[name] = np.asarray(lines[-1]["eigenvalues"][0])
        elif last.is_file():
            covariance = checkpoint.load(last)["objective"]["covariance"][0]
            spectra[name] = torch.linalg.eigvalsh(covariance).flip(0).numpy()
    return plots.eigenvalue_spectra(spectra) if spectra else None


def validation_features(folder: Path, config: CfgNode, images: int) -> tuple[Tensor, Subset]:
    """Features (N, F) of randomly chosen validation images by the run's encoder, and these images."""
    source = build_labelled_source(config.DATA.NAME, config.DATA.ROOT, "val", build_streaming(config))
    chosen = np.random.Generator(np.random.Philox(config.SEED)).permutation(len(source))[:images]
    subset = Subset(source, np.sort(chosen))
    device = torch.device("cuda" if devices.is_usable() else "cpu")
    weights = read_weights(str(folder))
    encoder = build_from(weights, config.ENCODER.NAME, config.ENCODER.STEM).to(device)
    precision = resolve_precision(config.TRAIN.PRECISION, device)
    features, _ = extract(encoder, subset, build_pipeline(config, device), precision=precision, title="features")
    return features, subset


def tsne(features: Tensor, images: Subset, seed: int) -> Figure:
    """The features' t-SNE, coloured by class."""
    from sklearn.manifold import TSNE as Embedding  # takes seconds to import

    perplexity = min(TSNE["perplexity"], (len(features) - 1) / 3)
    points = Embedding(**{**TSNE, "perplexity": perplexity}, random_state=seed).fit_transform(features.numpy())
    return plots.embedding_scatter(points, np.asarray(images.labels), images.classes)


def neighbours(features: Tensor, images: Subset, size: int) -> Figure:
    """Some images, and the others that are the most similar to them."""
    unit = F.normalize(features, dim=1)
    queries = np.linspace(0, len(images) - 1, min(QUERIES, len(images))).astype(int)
    similarity = unit[queries] @ unit.T
    similarity[torch.arange(len(queries)), torch.from_numpy(queries)] = -torch.inf  # not the image itself
    nearest = similarity.topk(min(NEIGHBOURS, len(images) - 1), dim=1).indices.numpy()
    rows, frames = [], []
    for query, found in zip(queries, nearest, strict=True):
        rows.append([thumbnail(images, int(i), size) for i in (query, *found)])
        agree = [images.labels[i] == images.labels[query] for i in found]
        frames.append([None, *(plots.FRAME_RIGHT if same else plots.FRAME_WRONG for same in agree)])
    return plots.image_sheet(rows, ["query", "nearest"], frames)


def thumbnail(images: Subset, index: int, size: int) -> np.ndarray:
    """The image, squeezed into a square."""
    pixels = torch.from_numpy(images.read(index).copy()).permute(2, 0, 1)
    return resize(pixels, size, size).permute(1, 2, 0).numpy()


def view_pairs(config: CfgNode) -> Figure:
    """Pairs of views of a few training images, as the encoder gets them but for the normalisation."""
    source = build_source(config.DATA.NAME, config.DATA.ROOT, "pretrain", streaming=build_streaming(config))
    dataset = ViewDataset(source, config.DATA.IMAGE_SIZE, build_recipes(config), config.SEED)
    batch = collate([dataset[(0, index)] for index in range(min(PAIRS, len(source)))])
    views = [augment(batch.images[v], batch.params[v], torch.zeros(3), torch.ones(3)) for v in range(2)]
    pixels = [(view * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy() for view in views]
    originals = Subset(source, batch.indices.numpy())
    rows = [
        [thumbnail(originals, i, config.DATA.IMAGE_SIZE), pixels[0][i], pixels[1][i]] for i in range(len(originals))
    ]
    return plots.image_sheet(rows, ["image", "view 1", "view 2"])


def cli() -> NoReturn:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    cli()
