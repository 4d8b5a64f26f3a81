"""Features of a frozen encoder, and the kNN classifier on them."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.augment import augment
from pretrain.data import Source
from pretrain.loader import SequentialBatches, build_loader
from pretrain.metrics import Progress
from pretrain.views import ViewDataset, ViewRecipe


@torch.no_grad()
def extract(
    encoder: nn.Module,
    source: Source,
    *,
    size: int,
    mean: Tensor,
    std: Tensor,
    precision: str,
    workers: int,
    device: torch.device,
    indices: np.ndarray | None = None,
    recipe: ViewRecipe | None = None,
    seed: int = 0,
    epoch: int = 0,
    batch_size: int = 256,
    title: str = "",
) -> tuple[Tensor, Tensor]:
    """Features of one view of each image, in eval mode; the encoder's mode is restored afterwards.

    Args:
        encoder: images (N, 3, size, size) -> features (N, F).
        source: the images.
        size: pixels of the view.
        mean, std: (3,) on `device`.
        precision: `float32` or `bfloat16`.
        indices: of the images to use; all by default.
        recipe: a random view; by default the central crop.
        seed, epoch: of the random view.
        title: shown with the progress; empty: none is shown.

    Returns:
        features (M, F) float32 and labels (M,) int64, on the CPU, in the order of `indices`.
    """
    chosen = np.arange(len(source)) if indices is None else indices
    dataset = ViewDataset(source, size, [recipe] if recipe else [], seed)
    batches = SequentialBatches(chosen, batch_size, epoch)
    progress = Progress(len(batches), unit="batch", shown=bool(title))
    was_training = encoder.training
    encoder.eval()
    features, labels = [], []
    for batch in build_loader(dataset, batches, workers, device):
        images = augment(batch.images[0].to(device, non_blocking=True), batch.params[0], mean, std)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            features.append(encoder(images).float().cpu())
        labels.append(batch.labels)
        progress.advance(title)
    progress.close()
    encoder.train(was_training)
    return torch.cat(features), torch.cat(labels)


def knn_predict(
    train: Tensor, train_labels: Tensor, test: Tensor, *, k: int, classes: int, temperature: float = 0.07, chunk: int = 1024
) -> Tensor:
    """Class scores by weighted k nearest neighbours: votes exp(cosine similarity / temperature), as in DINO's protocol.

    Args:
        train: (M, F) features; train_labels: (M,).
        test: (N, F) features.
        k: neighbours; M where there are fewer.
        classes: number of classes.
        chunk: test images at a time, which bounds the memory to chunk x M similarities.

    Returns:
        (N, classes) scores, the higher the likelier.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    scores = torch.zeros(len(test), classes)
    for start in range(0, len(test), chunk):
        similarity = test[start : start + chunk] @ train.T
        top, index = similarity.topk(min(k, len(train)), dim=1)
        # Subtracting the largest leaves the ranking as it is, and keeps exp() from overflowing.
        votes = ((top - top[:, :1]) / temperature).exp()
        scores[start : start + chunk].scatter_add_(1, train_labels[index], votes)
    return scores


def accuracy(scores: Tensor, labels: Tensor, top: int = 1) -> float:
    """Share in percent of the images whose label is among the `top` best scores. scores (N, C), labels (N,)."""
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(dim=1).float().mean().item()
