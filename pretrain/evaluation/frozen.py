"""A frozen encoder: its features as a dataset to train on, fresh in every epoch or cached."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foundation.devices import send
from pretrain.batches.sampler import ShuffledBatches
from pretrain.batches.views import ViewRecipe
from pretrain.evaluation.features import Pipeline, extract, gather, own_share
from pretrain.evaluation.supervised import image_batches
from pretrain.images.sources import Source


@dataclass(frozen=True)
class Frozen:
    """An encoder that only gives features.

    Args:
        encoder: in eval mode, without gradients.
        precision: `float32` or `bfloat16`.
    """

    encoder: nn.Module
    pipeline: Pipeline
    precision: str

    def features(self, source: Source, title: str, **view: Any) -> tuple[Tensor, Tensor]:
        """Features and labels of this process's share of the images. `view`: recipe, seed, epoch of `extract`."""
        indices = own_share(len(source))
        return extract(
            self.encoder,
            source,
            self.pipeline,
            precision=self.precision,
            indices=indices,
            title=title,
            **view,
        )

    def features_of_all(self, source: Source, title: str, **view: Any) -> tuple[Tensor, Tensor]:
        """Features and labels of all images, on every process."""
        features, labels = self.features(source, title, **view)
        return gather(features, self.pipeline.device), gather(labels, self.pipeline.device)

    def batches(
        self, source: Source, batches: ShuffledBatches, recipe: ViewRecipe, cached_views: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (N, F) of random views with labels (N,), on the device.

        Args:
            source: the images.
            batches: which of them, and when.
            recipe: of the views.
            cached_views: 0: new views in every epoch. n: those of the first n epochs, used again in turn.
        """
        if cached_views:
            return self._cached(source, batches, recipe, cached_views)
        return self._fresh(source, batches, recipe)

    @torch.no_grad()
    def _fresh(self, source: Source, batches: ShuffledBatches, recipe: ViewRecipe) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in image_batches(source, self.pipeline, batches, recipe):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                features = self.encoder(images)
            yield features.float(), labels

    def _cached(
        self, source: Source, batches: ShuffledBatches, recipe: ViewRecipe, views: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        cache = []
        for view in range(views):
            title = f"features of view {view + 1} of {views}"
            features, labels = self.features_of_all(source, title, recipe=recipe, seed=batches.seed, epoch=view)
            cache.append(features.to(self.pipeline.device))
        return _from_cache(cache, labels.to(self.pipeline.device), batches)


def _from_cache(cache: Sequence[Tensor], labels: Tensor, batches: ShuffledBatches) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        epoch = batch[0][0]
        indices = send(torch.tensor([index for _, index in batch]), labels.device)
        yield cache[epoch % len(cache)][indices], labels[indices]
