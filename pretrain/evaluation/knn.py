"""The kNN classifier: neighbours by cosine similarity, weighted votes, and accuracy."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.errors import UserError
from pretrain.distributed import group
from pretrain.evaluation.features import gather

TEMPERATURE = 0.07  # of the votes, as in DINO's protocol
NO_NEIGHBOUR = float("-inf")  # similarity in the place of a neighbour that does not exist: its vote is 0
TRAIN_CHUNK = 65536  # reference images at a time
LEAST_CLASSES_FOR_TOP5 = 10


def check_neighbours(key: str, k: int, images: int) -> None:
    """Refuse more neighbours than there are reference images. Raises UserError.

    Args:
        key: of the config, which says k.
        k: neighbours.
        images: that they are found among.
    """
    if k > images:
        raise UserError(
            f"{key} asks for {k} nearest neighbours, and there are {images} reference images: lower it to at most "
            f"{images}"
        )


def nearest(
    train: Tensor, train_labels: Tensor, test: Tensor, *, k: int, device: torch.device, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """The exact k nearest reference images of each test image, by cosine similarity.

    The device holds the test images and, at a time, `TRAIN_CHUNK` references and `chunk` x `TRAIN_CHUNK` similarities.

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
    # The references are the larger set: each comes to the device once, instead of once for each chunk of queries.
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
        (N, classes) scores; minus infinity for a class without a vote.
    """
    # Subtracting the largest keeps the ranking, and keeps exp() from overflowing.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    scores = weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)
    return scores.masked_fill(scores == 0, float("-inf"))


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
        `accuracies` for each k.
    """
    results = {}
    for k in ks:
        scores = vote(similarity[:, :k], neighbours[:, :k], classes=classes, temperature=temperature)
        results[k] = accuracies(scores, labels)
    return results


def merge_neighbours(similarity: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The nearest neighbours (N, k) of all, from those that each process found among its part of the references."""
    if group.world_size() == 1:
        return similarity, labels
    k = similarity.shape[1]
    merged, order = gather(similarity.T, device).T.topk(k, dim=1)
    return merged, gather(labels.T, device).T.gather(1, order)


def accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 accuracy in percent, and with `LEAST_CLASSES_FOR_TOP5` classes or more also top-5.

    Args:
        scores: (N, C); labels: (N,).
    """
    tops = (1, 5) if scores.shape[1] >= LEAST_CLASSES_FOR_TOP5 else (1,)
    return {f"top{top}": accuracy(scores, labels, top) for top in tops}


def accuracy(scores: Tensor, labels: Tensor, top: int = 1) -> float:
    """Percentage of the images whose label is among the `top` highest scores.

    A score of minus infinity or NaN never counts: it is a class without a vote, or a head that has diverged.

    Args:
        scores: (N, C); labels: (N,).
    """
    values, best = scores.topk(min(top, scores.shape[1]), dim=1)
    hits = (best == labels[:, None]) & (values > float("-inf"))
    return 100 * int(hits.any(dim=1).sum()) / len(labels)
