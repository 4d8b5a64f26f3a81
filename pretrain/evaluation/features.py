"""Features of a frozen encoder, and the kNN classifier on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.batches.augment import augment
from pretrain.batches.loader import build_loader, read_batches, report_unreadable
from pretrain.batches.sampler import SequentialBatches
from pretrain.batches.views import ViewDataset, ViewRecipe
from pretrain.distributed import group
from pretrain.images.sources import Source
from pretrain.runs.metrics import Progress

NO_NEIGHBOUR = float("-inf")  # similarity in the place of a neighbour that is not there: its vote is 0
TRAIN_CHUNK = 65536  # reference images at a time


@dataclass(frozen=True)
class Pipeline:
    """How images come to the device.

    Args:
        size: pixels of the square view.
        mean, std: (3,) of values in [0, 1], on the device.
        workers: loader processes.
        device: where the encoder is.
        max_unreadable: share of damaged images above which an error is raised.
    """

    size: int
    mean: Tensor
    std: Tensor
    workers: int
    device: torch.device
    max_unreadable: float = 0.01


@torch.no_grad()
def extract(
    encoder: nn.Module,
    source: Source,
    pipeline: Pipeline,
    *,
    precision: str,
    indices: np.ndarray | None = None,
    recipe: ViewRecipe | None = None,
    seed: int = 0,
    epoch: int = 0,
    batch_size: int = 256,
    title: str = "",
) -> tuple[Tensor, Tensor]:
    """Features of one view of each image, in eval mode; the encoder's mode is restored afterwards.

    Args:
        encoder: images (N, 3, size, size) -> features (N, F), or anything with a row for each image.
        source: the images.
        precision: `float32` or `bfloat16`.
        indices: of the images to use; all by default.
        recipe: a random view; by default the central crop.
        seed, epoch: of the random view.
        title: shown with the progress; empty: none is shown.

    Returns:
        features (M, F) float32 and labels (M,) int64, on the CPU, in the order of `indices`.
    """
    chosen = np.arange(len(source)) if indices is None else indices
    dataset = ViewDataset(source, pipeline.size, [recipe] if recipe else [], seed)
    batches = SequentialBatches(chosen, batch_size, epoch)
    progress = Progress(len(batches), unit="batch", shown=bool(title))
    was_training = encoder.training
    encoder.eval()
    # One allocation for all: a list of batches, concatenated, would need twice the memory.
    features, labels, filled = torch.empty(0), torch.empty(len(chosen), dtype=torch.int64), 0
    unreadable: set[str] = set()
    for batch in read_batches(build_loader(dataset, batches, pipeline.workers, pipeline.device)):
        report_unreadable(batch, unreadable, pipeline.max_unreadable * len(source))
        images = batch.images[0].to(pipeline.device, non_blocking=True)
        images = augment(images, batch.params[0], pipeline.mean, pipeline.std)
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            rows = encoder(images).float().cpu()
        if not filled:
            features = torch.empty(len(chosen), rows.shape[1])
        features[filled : filled + len(rows)] = rows
        labels[filled : filled + len(rows)] = batch.labels
        filled += len(rows)
        progress.advance(title)
    progress.close()
    encoder.train(was_training)
    return features, labels


def own_share(count: int) -> np.ndarray:
    """The places, of `count`, that this process works on: one of as many equal parts as there are processes."""
    return np.array_split(np.arange(count), group.world_size())[group.rank()]


def nearest(
    train: Tensor, train_labels: Tensor, test: Tensor, *, k: int, device: torch.device, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """The exact k nearest reference images of each test image, by cosine similarity.

    On the device are the test images and, at a time, `TRAIN_CHUNK` references and `chunk` x `TRAIN_CHUNK` similarities.

    Args:
        train: (M, F) features, on the CPU; train_labels: (M,).
        test: (N, F) features, on the CPU.
        k: neighbours.
        device: where to compute.
        chunk: test images at a time.

    Returns:
        similarities (N, k), descending, and labels (N, k), on the CPU. Where M < k, the rest is `NO_NEIGHBOUR`.
    """
    queries = [F.normalize(part.to(device), dim=1) for part in test.split(chunk)]
    best = [torch.full((len(part), k), NO_NEIGHBOUR, device=device) for part in queries]
    best_labels = [torch.zeros(len(part), k, dtype=torch.int64, device=device) for part in queries]
    # The references are the many, so they come to the device once and not once for each chunk.
    for references, labels in zip(train.split(TRAIN_CHUNK), train_labels.split(TRAIN_CHUNK), strict=True):
        references, labels = F.normalize(references.to(device), dim=1), labels.to(device)
        for i, part in enumerate(queries):
            similarity, index = (part @ references.T).topk(min(k, len(references)), dim=1)
            best[i], order = torch.cat([best[i], similarity], dim=1).topk(k, dim=1)
            best_labels[i] = torch.cat([best_labels[i], labels[index]], dim=1).gather(1, order)
    return torch.cat(best).cpu(), torch.cat(best_labels).cpu()


def vote(similarity: Tensor, labels: Tensor, *, classes: int, temperature: float) -> Tensor:
    """Class scores by votes of weight exp(cosine similarity / temperature), as in DINO's protocol.

    Args:
        similarity: (N, k) of the neighbours, descending; labels: (N, k).
        classes: number of classes.

    Returns:
        (N, classes) scores, the higher the likelier.
    """
    # Subtracting the largest leaves the ranking as it is, and keeps exp() from overflowing.
    votes = ((similarity - similarity[:, :1]) / temperature).exp()
    return votes.new_zeros(len(labels), classes).scatter_add_(1, labels, votes)


def knn_accuracy(
    similarity: Tensor,
    neighbours: Tensor,
    labels: Tensor,
    *,
    ks: Sequence[int],
    classes: int,
    temperature: float,
) -> dict[int, dict[str, float]]:
    """Accuracy by weighted k nearest neighbours, for several k from one search.

    Args:
        similarity: (N, max(ks)) of the neighbours, descending; neighbours: (N, max(ks)), their labels.
        labels: (N,) true ones.
        ks: numbers of neighbours.

    Returns:
        for each k {"top1": percent, "top5": percent}.
    """
    results = {}
    for k in ks:
        scores = vote(similarity[:, :k], neighbours[:, :k], classes=classes, temperature=temperature)
        results[k] = {f"top{top}": accuracy(scores, labels, top) for top in (1, 5)}
    return results


def merge_neighbours(similarity: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The nearest neighbours (N, k) of all, from those that each process found among its part of the references."""
    if group.world_size() == 1:
        return similarity, labels
    k = similarity.shape[1]
    merged, order = gather(similarity.T, device).T.topk(k, dim=1)
    return merged, gather(labels.T, device).T.gather(1, order)


def gather(rows: Tensor, device: torch.device) -> Tensor:
    """The rows of all processes, in the order of the processes, on the CPU. Their numbers may differ."""
    if group.world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.world_size())]
    torch.distributed.all_gather(counts, torch.tensor([len(rows)], device=device))
    longest = int(torch.cat(counts).max())
    padded = torch.zeros(longest, *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows.to(device)
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(count)].cpu() for part, count in zip(parts, counts, strict=True)])


def accuracy(scores: Tensor, labels: Tensor, top: int = 1) -> float:
    """Share in percent of the images whose label is among the `top` best scores. scores (N, C), labels (N,)."""
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices
    return 100 * int((best == labels[:, None]).any(dim=1).sum()) / len(labels)
