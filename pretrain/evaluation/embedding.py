"""Features of folders of images, their neighbours, and near-duplicates by thumbnails."""

import csv
import io
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from foundation import devices
from foundation.errors import UserError
from foundation.files import complete_file, make_folder, report_disk_errors, write_atomic
from foundation.names import counted
from pretrain.config import resolve_precision
from pretrain.encoder import ENCODERS
from pretrain.evaluation.features import Pipeline, extract
from pretrain.evaluation.figures import most_similar, thumbnail
from pretrain.evaluation.knn import nearest
from pretrain.evaluation.plots import caption_letters, image_sheet
from pretrain.images.labelled import Subset
from pretrain.images.paths import locate
from pretrain.images.sources import Source, build_source
from pretrain.runs.metrics import start_logging
from pretrain.runs.weights import RANDOM, EncoderWeights, build_from, read_weights, trained_side

THUMBNAIL = 16  # pixels a side
CANDIDATES = 5  # nearest thumbnails that are looked at for each image
PAIRS_SHOWN = 8
SIDE_NEIGHBOURS, SIDE_PAIR = 1.2, 2.2  # inches: of an image in neighbours.png and duplicates.png
logger = logging.getLogger("pretrain")


@dataclass(frozen=True)
class Embedded:
    """Images with their features (N, F) and standardised thumbnails (N, 3 x THUMBNAIL**2)."""

    source: Source
    features: Tensor
    thumbnails: Tensor


@dataclass(frozen=True)
class Pair:
    """Two images that look the same."""

    first: int
    second: int  # of the other folder, or of the same
    correlation: float  # of the thumbnails
    similarity: float  # cosine of the features


def embed_folders(
    weights: str,
    images: str,
    against: str,
    output: Path,
    *,
    side: int,
    workers: int,
    threshold: float,
    encoder: str = "",
) -> None:
    """Embed a folder of images and look for near-duplicates; write the results into a folder.

    Args:
        weights: as in `read_weights`.
        images: a folder or tar.
        against: another one; empty: near-duplicates are looked for within `images`.
        output: a folder, which is made once weights and images are found.
        side: of the views in pixels; 0: as `trained_side` says.
        workers: loader processes.
        threshold: correlation of the thumbnails from which two images count as near-duplicates.
        encoder: its name, where the weights do not say; ResNet-18 for random ones.

    Raises:
        UserError: weights or images cannot be read.
    """
    found = read_weights(weights)
    network = _build_network(found, encoder)
    pipeline = _build_pipeline(found, side or trained_side(weights), workers, network.device)
    source = build_source(*locate([images]), "pretrain", origin="PHOTOS")
    reference = build_source(*locate([against]), "pretrain", origin="--against") if against else None
    make_folder(output)
    start_logging(output)
    own = embed(network, source, pipeline, "features")
    other = embed(network, reference, pipeline, "the other") if reference is not None else None
    pairs = near_duplicates(own, other, threshold)
    with report_disk_errors(output):
        _write_features(own, output)
        _write_pairs(pairs, own.source, (other or own).source, output)
    where = f"between {images} and {against}" if against else f"within {images}"
    found_pairs, images_of = counted(len(pairs), "near-duplicate"), counted(len(own.source), "image")
    logger.info("%s %s; features of %s in %s", found_pairs, where, images_of, output)


def embed(network: "WithThumbnail", source: Source, pipeline: Pipeline, title: str) -> Embedded:
    """Features and thumbnails of the images of a source that can be read, from their central crops.

    Raises:
        UserError: none can be read, or so many in a row cannot that the loader gives up.
    """
    precision = resolve_precision("auto", pipeline.device)
    rows, read = extract(network, _Numbered(source, np.arange(len(source))), pipeline, precision=precision, title=title)
    (intact,) = np.nonzero(read.numpy() == np.arange(len(source)))
    if len(intact) < len(source):  # in the place of the others the next image was read, which is no duplicate
        if not len(intact):
            raise UserError(f"none of the {len(source)} images can be read, such as {source.name(0)}")
        logger.warning("%d of %d images cannot be read and are left out", len(source) - len(intact), len(source))
        rows, source = rows[intact], Subset(source, intact)
    split = 3 * THUMBNAIL**2
    thumbnails = rows[:, -split:]
    return Embedded(source, rows[:, :-split].contiguous(), thumbnails - thumbnails.mean(dim=1, keepdim=True))


class _Numbered(Subset):
    """A subset whose labels are the numbers of the images, so that `extract` tells which image was read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "labels", self.indices)


def near_duplicates(own: Embedded, other: Embedded | None, threshold: float) -> list[Pair]:
    """Pairs of images whose thumbnails correlate by `threshold` or more, the most similar first.

    Of each image only the `CANDIDATES` nearest are looked at, so of a larger group of copies not every pair is found.

    A thumbnail is the central crop averaged to 16 x 16 pixels: re-encoding, resizing and neighbouring frames of a
    video leave it nearly unchanged. Crops and mirror images of an image have other thumbnails and are not found.

    Args:
        own: one set of images.
        other: another; None: pairs within `own`.
        threshold: correlation over pixels and channels.
    """
    reference = other or own
    count = len(reference.source)
    k = min(CANDIDATES + (other is None), count)
    device = torch.device("cpu")
    correlations, found = nearest(reference.thumbnails, torch.arange(count), own.thumbnails, k=k, device=device)
    pairs = {}
    for image, place in (correlations >= threshold).nonzero().tolist():
        neighbour = int(found[image, place])
        if other is None and image == neighbour:
            continue
        # Of many alike, an image may be among the nearest of another, and not the reverse.
        first, second = (image, neighbour) if other is not None else sorted((image, neighbour))
        similarity = F.cosine_similarity(own.features[first], reference.features[second], dim=0)
        pairs[first, second] = Pair(first, second, float(correlations[image, place]), float(similarity))
    return sorted(pairs.values(), key=lambda pair: -pair.correlation)


class WithThumbnail(nn.Module):
    """An encoder that gives, beside the features, the image averaged to `THUMBNAIL` pixels a side: one row for each."""

    def __init__(self, encoder: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.encoder = encoder.to(device)
        self.device = device

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S) -> (N, F + 3 x THUMBNAIL**2), float32."""
        small = F.adaptive_avg_pool2d(images.float(), THUMBNAIL)
        return torch.cat([self.encoder(images).float(), small.flatten(1)], dim=1)


def _build_network(weights: EncoderWeights, encoder: str) -> WithThumbnail:
    name = weights.name or encoder or ("resnet18" if weights.init == RANDOM else "")
    if not weights.name and name not in ENCODERS:
        known = ", ".join(ENCODERS)
        raise UserError(f"{weights.source} does not say which encoder it holds; add --encoder, one of {known}")
    torch.manual_seed(0)
    device = torch.device("cuda" if devices.is_usable() else "cpu")
    return WithThumbnail(build_from(weights, name, weights.stem or "imagenet"), device)


def _build_pipeline(weights: EncoderWeights, side: int, workers: int, device: torch.device) -> Pipeline:
    mean, std = (torch.tensor(values, device=device) for values in weights.statistics)
    # Features of one photograph decoded both ways have a cosine of 1.000.
    return Pipeline(side, mean, std, workers, device, max_unreadable=None, scaled=True)


def _write_features(embedded: Embedded, output: Path) -> None:
    """features.npy, names.txt and, of two images or more, neighbours.png."""
    content = io.BytesIO()
    np.save(content, embedded.features.numpy())
    write_atomic(output / "features.npy", content.getvalue())
    source = embedded.source
    names = "".join(f"{source.name(i)}\n" for i in range(len(source)))
    write_atomic(output / "names.txt", os.fsencode(names))
    if len(source) > 1:
        _save(_draw_neighbours(embedded), output / "neighbours.png")


def _draw_neighbours(embedded: Embedded) -> Figure:
    """Some images, and the others whose features are the most similar, with their names, ranks and similarities."""
    images = Subset(embedded.source, np.arange(len(embedded.source)))
    queries, nearest, similarities = most_similar(embedded.features)
    rows = [[thumbnail(images, int(i)) for i in (query, *found)] for query, found in zip(queries, nearest, strict=True)]
    captions = [[_shown(images.name(int(query)))] for query in queries]
    for row, found, values in zip(captions, nearest, similarities, strict=True):
        names = [_shown(images.name(int(i))) for i in found]
        row += [f"{name}\n{rank}: {v:.3f}" for rank, (name, v) in enumerate(zip(names, values, strict=True), 1)]
    return image_sheet(rows, ["image", "nearest: similarity"], captions=captions, side=SIDE_NEIGHBOURS)


def _shown(name: str, side: float = SIDE_NEIGHBOURS) -> str:
    """A file's name with its folder's, the end of it where a line below an image of this side is too short for all."""
    text = os.fsencode("/".join(Path(name).parts[-2:])).decode("utf-8", "replace")  # a name may be no text
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    most = caption_letters(side)
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _write_pairs(pairs: Sequence[Pair], own: Source, other: Source, output: Path) -> None:
    """duplicates.csv, and duplicates.png where there is a pair."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["image", "near_duplicate", "correlation", "feature_similarity"])
    for pair in pairs:
        row = [own.name(pair.first), other.name(pair.second), f"{pair.correlation:.4f}", f"{pair.similarity:.4f}"]
        table.writerow(row)
    write_atomic(output / "duplicates.csv", os.fsencode(text.getvalue()))
    sheet = output / "duplicates.png"
    sheet.unlink(missing_ok=True)
    if pairs:
        shown = pairs[:PAIRS_SHOWN]
        subsets = [Subset(own, np.array([p.first for p in shown])), Subset(other, np.array([p.second for p in shown]))]
        rows = [[thumbnail(subset, i) for subset in subsets] for i in range(len(shown))]
        captions = [
            [_shown(own.name(p.first), SIDE_PAIR), f"{_shown(other.name(p.second), SIDE_PAIR)}\n{p.correlation:.4f}"]
            for p in shown
        ]
        titles = ["image", "near-duplicate: correlation"]
        _save(image_sheet(rows, titles, captions=captions, side=SIDE_PAIR), sheet)


def _save(figure: Figure, path: Path) -> None:
    with complete_file(path) as draft, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # letters of names that the typeface lacks are boxes
        figure.savefig(draft, dpi=150, bbox_inches="tight")
