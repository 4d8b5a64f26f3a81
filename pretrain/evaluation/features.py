"""Views of labelled images on the device, and the features that an encoder computes from them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from foundation.devices import send
from pretrain.batches.augment import augment
from pretrain.batches.draws import Augmentation
from pretrain.batches.loader import build_loader, read_batches, report_unreadable
from pretrain.batches.sampler import SequentialBatches, ShuffledBatches
from pretrain.batches.views import ViewDataset
from pretrain.distributed import group
from pretrain.images.sources import Source
from pretrain.runs.metrics import Progress


@dataclass(frozen=True)
class Pipeline:
    """How images reach the device.

    Args:
        size: pixels of the square view.
        mean, std: (3,) of values in [0, 1], on the device.
        workers: loader processes.
        device: where the encoder is.
        max_unreadable: fraction of damaged images above which an error is raised; None: the caller leaves them out.
        interpolation: of every resize, one of `resizing.INTERPOLATIONS`.
        scaled: whether to decode JPEGs at 1/2, 1/4 or 1/8 of their size where views keep their size.
    """

    size: int
    mean: Tensor
    std: Tensor
    workers: int
    device: torch.device
    max_unreadable: float | None = 0.01
    interpolation: str = "bicubic"
    scaled: bool = False

    def allowed_unreadable(self, images: int) -> float | None:
        """The number of damaged images among so many above which an error is raised."""
        return None if self.max_unreadable is None else self.max_unreadable * images


def build_pipeline(config: CfgNode, device: torch.device) -> Pipeline:
    """The pipeline of a configuration of pretraining or evaluation."""
    return Pipeline(
        size=config.DATA.IMAGE_SIZE,
        mean=torch.tensor(config.DATA.MEAN, device=device),
        std=torch.tensor(config.DATA.STD, device=device),
        workers=config.DATA.WORKERS,
        device=device,
        max_unreadable=config.DATA.MAX_UNREADABLE,
        interpolation=config.DATA.get("INTERPOLATION", "bicubic"),  # pretraining has no such key
        scaled=config.DATA.DECODE == "scaled",
    )


def random_views(
    source: Source, pipeline: Pipeline, batches: ShuffledBatches, augmentation: Augmentation
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random views (N, 3, S, S) of the images with their labels (N,), on the device.

    Args:
        source: the images.
        batches: of this process, each a list of (epoch, index).
        augmentation: distribution of the views.
    """
    dataset = ViewDataset(
        source, pipeline.size, [augmentation], batches.seed, pipeline.interpolation, scaled=pipeline.scaled
    )
    unreadable: set[str] = set()
    for batch in read_batches(build_loader(dataset, batches, pipeline.workers, pipeline.device)):
        report_unreadable(batch, unreadable, pipeline.allowed_unreadable(len(source)))
        images = batch.images[0].to(pipeline.device, non_blocking=True)
        labels = batch.labels.to(pipeline.device, non_blocking=True)
        yield augment(images, batch.params[0], pipeline.mean, pipeline.std), labels


@torch.no_grad()
def extract(
    encoder: nn.Module,
    source: Source,
    pipeline: Pipeline,
    *,
    precision: str,
    indices: np.ndarray | None = None,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    epoch: int = 0,
    batch_size: int = 256,
    title: str = "",
) -> tuple[Tensor, Tensor]:
    """Features of one view of each image, in eval mode; the encoder's mode is restored afterwards.

    Args:
        encoder: images (N, 3, size, size) -> features (N, F), or any module with a row for each image.
        source: the images.
        precision: `float32` or `bfloat16`.
        indices: of the images to use; all by default.
        augmentation: distribution of the view; by default the central crop.
        seed, epoch: of the random view.
        title: shown with the progress; empty: no progress is shown.

    Returns:
        features (M, F) float32 and labels (M,) int64, on the CPU, in the order of `indices`.
    """
    chosen = np.arange(len(source)) if indices is None else indices
    augmentations = [augmentation] if augmentation else []
    dataset = ViewDataset(source, pipeline.size, augmentations, seed, pipeline.interpolation, scaled=pipeline.scaled)
    batches = SequentialBatches(chosen, batch_size, epoch)
    progress = Progress(len(batches), unit="batch", shown=bool(title))
    was_training = encoder.training
    encoder.eval()
    # One allocation for all: a list of batches, concatenated, would need twice the memory.
    features, labels, filled = torch.empty(0), torch.empty(len(chosen), dtype=torch.int64), 0
    unreadable: set[str] = set()
    for batch in read_batches(build_loader(dataset, batches, pipeline.workers, pipeline.device)):
        report_unreadable(batch, unreadable, pipeline.allowed_unreadable(len(source)))
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


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen encoder with its pipeline.

    Args:
        encoder: in eval mode, without gradients.
        pipeline: of its images.
        precision: `float32` or `bfloat16`.
    """

    encoder: nn.Module
    pipeline: Pipeline
    precision: str

    def local(self, source: Source, title: str, **view: Any) -> tuple[Tensor, Tensor]:
        """Features (M, F) and labels (M,) of this process's part of the images.

        `view`: the arguments `augmentation`, `seed` and `epoch` of `extract`.
        """
        return extract(
            self.encoder,
            source,
            self.pipeline,
            precision=self.precision,
            indices=local_indices(len(source)),
            title=title,
            **view,
        )

    def all(self, source: Source, title: str, **view: Any) -> tuple[Tensor, Tensor]:
        """Features (N, F) and labels (N,) of all images, on every process."""
        features, labels = self.local(source, title, **view)
        return gather(features, self.pipeline.device), gather(labels, self.pipeline.device)

    def batches(
        self, source: Source, batches: ShuffledBatches, augmentation: Augmentation, cached_views: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (N, F) of random views with labels (N,), on the device.

        Args:
            source: the images.
            batches: of this process, each a list of (epoch, index).
            augmentation: distribution of the views.
            cached_views: 0: new views in every epoch. n: the views of the first n epochs, used again in turn.
        """
        if cached_views:
            return self._cached(source, batches, augmentation, cached_views)
        return self._fresh(source, batches, augmentation)

    @torch.no_grad()
    def _fresh(
        self, source: Source, batches: ShuffledBatches, augmentation: Augmentation
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in random_views(source, self.pipeline, batches, augmentation):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                features = self.encoder(images)
            yield features.float(), labels

    def _cached(
        self, source: Source, batches: ShuffledBatches, augmentation: Augmentation, views: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        cache = []
        for view in range(views):
            title = f"features of view {view + 1} of {views}"
            features, labels = self.all(source, title, augmentation=augmentation, seed=batches.seed, epoch=view)
            cache.append(features.to(self.pipeline.device))
        return _from_cache(cache, labels.to(self.pipeline.device), batches)


def _from_cache(cache: Sequence[Tensor], labels: Tensor, batches: ShuffledBatches) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        epoch = batch[0][0]
        indices = send(torch.tensor([index for _, index in batch]), labels.device)
        yield cache[epoch % len(cache)][indices], labels[indices]


def local_indices(count: int) -> np.ndarray:
    """Indices, among `count`, of this process's part: the images are divided evenly among the processes."""
    return np.array_split(np.arange(count), group.world_size())[group.rank()]


def gather(rows: Tensor, device: torch.device) -> Tensor:
    """The rows (M, ...) of all processes, in the order of the processes, on the CPU. M may differ between them."""
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
