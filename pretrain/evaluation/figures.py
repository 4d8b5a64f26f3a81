"""The figures of pretraining runs: what is read from a run folder for each, and the drawing of it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from foundation import devices
from foundation.errors import UserError
from foundation.files import complete_file
from foundation.images import UnreadableImage
from foundation.json_files import as_number
from foundation.names import short_names
from pretrain.batches.augment import augment
from pretrain.batches.resizing import resize
from pretrain.config import build_streaming, build_views, resolve_precision
from pretrain.evaluation import plots
from pretrain.evaluation.features import build_pipeline, extract
from pretrain.images.joined import JoinedSource
from pretrain.images.labelled import Subset, build_labelled_source, split_labelled_folder
from pretrain.images.paths import split_roots
from pretrain.images.sources import UNLABELED, Source, build_source
from pretrain.objectives import TITLES
from pretrain.runs import checkpoint
from pretrain.runs.metrics import read_metrics
from pretrain.runs.weights import build_from, read_weights

NAMES = ("training", "information", "eigenvalues", "tsne", "neighbours", "views")
COMPARING = ("training", "eigenvalues")  # show all runs in one plot; the others are of the first
QUERIES, NEIGHBOURS, PAIRS = 8, 8, 8
THUMBNAIL = 128  # pixels of a side, in sheets
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


def draw(
    runs: Sequence[Path], config: CfgNode, only: Sequence[str], images: int, output: Path, ldmi_scale: str = "nats"
) -> None:
    """Draw the figures that are asked for. One that the runs have no data for is skipped with a warning.

    Of several runs, those of `COMPARING` show all; the others show the first, whose name they bear.

    Args:
        runs: directories of pretraining runs.
        config: of the first run.
        only: the figures, of `NAMES`.
        images: validation images for `tsne` and `neighbours`, at most.
        output: an existing folder.
        ldmi_scale: as in `plots.information_curves`.
    """
    named = dict(zip(_titles(runs), runs, strict=True))
    first = next(iter(named))
    if len(named) > 1:
        _tell(named, only, output)
    lines = {name: read_metrics(folder / "metrics.json") for name, folder in named.items()}
    features: list[tuple[Tensor, Subset]] = []

    def embedded() -> tuple[Tensor, Subset]:
        if not features:  # two figures need them
            features.append(validation_features(runs[0], config, images))
        return features[0]

    figures: dict[str, Callable[[], Figure | None]] = {
        "training": lambda: plots.training_curves(lines),
        "information": lambda: information(lines[first], config.PROJECTOR.DIMS[-1], ldmi_scale),
        "eigenvalues": lambda: eigenvalues(named),
        "tsne": lambda: tsne(*embedded(), seed=config.SEED, name=first),
        "neighbours": lambda: neighbours(*embedded()),
        "views": lambda: view_pairs(config),
    }
    for name in only:
        figure = figures[name]()
        if figure is None:
            logger.warning("no %s: the run has logged nothing for it", name)
            continue
        if len(named) > 1 and name not in (*COMPARING, "tsne"):  # which has the name in its title
            figure.suptitle(first, fontsize=9, parse_math=False)
        for suffix in ("png", "svg"):
            with complete_file(output / f"{name}.{suffix}") as draft:
                figure.savefig(draft, dpi=150, bbox_inches="tight")
        logger.info("%s", output / f"{name}.png")


def _titles(runs: Sequence[Path]) -> list[str]:
    """Names of runs that tell them apart; where that is an objective, the objective as its authors write it."""
    names = short_names(runs)
    titles = [TITLES.get(name.removeprefix("OBJECTIVE.NAME="), name) for name in names]
    return titles if len(set(titles)) == len(names) else names


def _tell(named: Mapping[str, Path], only: Sequence[str], output: Path) -> None:
    """Log which figures show all runs, which the first, and where they are written."""
    compared, single = ([name for name in only if (name in COMPARING) == wanted] for wanted in (True, False))
    parts = [f"of {', '.join(named)}: {', '.join(compared)}"] if compared else []
    parts += [f"of {next(iter(named))} only: {', '.join(single)}"] if single else []
    logger.info("%s; all are written to %s", "; ".join(parts), output)


def information(lines: Sequence[dict[str, float]], dim: int, ldmi_scale: str = "nats") -> Figure | None:
    """LDMI and probe accuracy over the epochs; None if the run has logged neither.

    A line of the probe has no epoch; it gets that of the line of the same step.

    Args:
        lines: of metrics.json.
        dim: P, dimension of the embedding.
        ldmi_scale: as in `plots.information_curves`.
    """
    epochs = {line["iteration"]: line["epoch"] for line in lines if "epoch" in line}
    probed = [{**line, "epoch": epochs[line["iteration"]]} for line in lines if line["iteration"] in epochs]
    kinds = {"linear_top1": "linear top-1 (%)", "knn_top1": "kNN top-1 (%)"}
    key = next((key for key in kinds if any(key in line for line in lines)), "knn_top1")
    curves = plots.series(lines, "ldmi"), plots.series(probed, key)
    if not any(len(x) for x, _ in curves):
        return None
    return plots.information_curves(*curves, kinds[key], dim, ldmi_scale)


def eigenvalues(runs: dict[str, Path]) -> Figure | None:
    """Eigenvalues of the covariance of the first views' embeddings, at the end of each run; None if no run has any."""
    spectra = {}
    for name, folder in runs.items():
        log, last = folder / "spectrum.json", folder / "checkpoints" / "last.pt"
        lines = read_metrics(log) if log.is_file() else []
        logged = [spectrum for line in lines if (spectrum := _first_spectrum(line)) is not None]
        if logged:
            spectra[name] = logged[-1]
        elif last.is_file():
            covariance = checkpoint.load(last)["objective"]["covariance"][0]
            spectra[name] = torch.linalg.eigvalsh(covariance).flip(0).numpy()
    return plots.eigenvalue_spectra(spectra) if spectra else None


def _first_spectrum(line: Mapping[str, Any]) -> np.ndarray | None:
    """The eigenvalues of the first views, (P,), in a line of spectrum.json; None where it has no list of numbers."""
    views = line.get("eigenvalues")
    values = views[0] if isinstance(views, list) and views else None
    numbers = [as_number(value) for value in values] if isinstance(values, list) else []
    return np.array(numbers) if numbers and None not in numbers else None


def validation_features(folder: Path, config: CfgNode, images: int) -> tuple[Tensor, Subset]:
    """Features (N, F) of randomly chosen images, `evaluation_images`, by the run's encoder, and these images."""
    source = evaluation_images(config)
    chosen = np.random.Generator(np.random.Philox(config.SEED)).permutation(len(source))[:images]
    subset = Subset(source, np.sort(chosen))
    device = torch.device("cuda" if devices.is_usable() else "cpu")
    weights = read_weights(str(folder))
    encoder = build_from(weights, config.ENCODER.NAME, config.ENCODER.STEM).to(device)
    precision = resolve_precision(config.TRAIN.PRECISION, device)
    features, _ = extract(encoder, subset, build_pipeline(config, device), precision=precision, title="features")
    return features, subset


def evaluation_images(config: CfgNode) -> Source:
    """The labelled images that a run was monitored with or its dataset has; without any, those it was trained on."""
    data, streaming = config.DATA, build_streaming(config)
    if config.PROBE.ROOT:
        return split_labelled_folder(config.PROBE.ROOT)[1]
    if data.NAME == "folder" and not any((Path(root) / "val").is_dir() for root in split_roots(data.ROOT)):
        logger.info("there is no folder val: tsne and neighbours show the images of pretraining, without classes")
    else:
        try:
            return build_labelled_source(data.NAME, data.ROOT, "val", streaming)
        except UserError as error:
            logger.warning(
                "no labelled images (%s); tsne and neighbours show the images of pretraining, without classes", error
            )
    return JoinedSource([build_source(data.NAME, data.ROOT, "pretrain", data.CLASSES, streaming)])


def tsne(features: Tensor, images: Subset, seed: int, name: str) -> Figure:
    """The t-SNE of features (N, F) by the run of this name: points in space, coloured by class; without classes, images
    on a map.
    """
    from sklearn.manifold import TSNE as Embedding  # takes seconds to import

    perplexity = min(TSNE["perplexity"], (len(features) - 1) / 3)
    flat = {} if images.classes else {"n_components": 2}
    points = Embedding(**{**TSNE, **flat, "perplexity": perplexity}, random_state=seed).fit_transform(features.numpy())
    title = f"t-SNE of the features of {len(features):,} images, {name}"
    if images.classes:
        return plots.embedding_scatter(points, np.asarray(images.labels), images.classes, title)
    chosen = plots.spread_out(points)
    if len(chosen) < len(points):
        title += f"; {len(chosen)} of them are shown"
    return plots.embedding_images(points[chosen], [thumbnail(images, int(i)) for i in chosen], title)


def neighbours(features: Tensor, images: Subset) -> Figure:
    """Some images, and the others whose features (N, F) are the most similar to theirs; frames tell classes apart."""
    queries, nearest, _ = most_similar(features)
    rows, frames = [], []
    for query, found in zip(queries, nearest, strict=True):
        rows.append([thumbnail(images, int(i)) for i in (query, *found)])
        frames.append([None, *(_frame(images.labels[query], images.labels[i]) for i in found)])
    return plots.image_sheet(rows, ["query", "nearest"], frames)


def most_similar(features: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At most `QUERIES` images at even distances, their nearest neighbours, and the cosines of the features (N, F).

    Returns:
        The images (Q,); for each the `NEIGHBOURS` most similar others, or all where there are fewer, (Q, K), the most
        similar first; and their similarities (Q, K).
    """
    unit = F.normalize(features, dim=1)
    queries = np.linspace(0, len(features) - 1, min(QUERIES, len(features))).astype(int)
    similarity = unit[queries] @ unit.T
    similarity[torch.arange(len(queries)), torch.from_numpy(queries)] = -torch.inf  # not the image itself
    values, nearest = similarity.topk(min(NEIGHBOURS, len(features) - 1), dim=1)
    return queries, nearest.numpy(), values.numpy()


def _frame(label: int, other: int) -> str | None:
    """Colour of a neighbour's frame: none where there are no labels."""
    if UNLABELED in (label, other):
        return None
    return plots.FRAME_RIGHT if label == other else plots.FRAME_WRONG


def thumbnail(images: Subset, index: int) -> np.ndarray:
    """The image for a sheet, resized to `THUMBNAIL` x `THUMBNAIL` pixels, (H, W, 3) uint8. A damaged one is white."""
    try:
        pixels = torch.from_numpy(images.open(index).decode().copy()).permute(2, 0, 1)
    except UnreadableImage:
        return np.full((THUMBNAIL, THUMBNAIL, 3), 255, np.uint8)
    return resize(pixels, THUMBNAIL, THUMBNAIL).permute(1, 2, 0).numpy()


def view_pairs(config: CfgNode) -> Figure:
    """Pairs of views of a few training images, as the encoder gets them, before normalisation."""
    data = config.DATA
    source = build_source(data.NAME, data.ROOT, "pretrain", data.CLASSES, build_streaming(config))
    dataset = build_views(config, source)
    batch = dataset.read([(0, index) for index in range(min(PAIRS, len(source)))])
    views = [augment(batch.images[v], batch.params[v], torch.zeros(3), torch.ones(3)) for v in range(2)]
    pixels = [(view * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy() for view in views]
    originals = Subset(source, batch.indices.numpy())
    rows = [[thumbnail(originals, i), pixels[0][i], pixels[1][i]] for i in range(len(originals))]
    return plots.image_sheet(rows, ["image", "view 1", "view 2"])
