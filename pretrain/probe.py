"""The online probe: kNN accuracy of the encoder on the dataset's labels, while pretraining goes on."""

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn

from cli.errors import UserError
from pretrain.config import resolve_precision
from pretrain.data import UNLABELED, Source, build_source
from pretrain.features import accuracy, extract, knn_predict


class OnlineProbe:
    """Callable on an encoder; gives {"knn_top1": percent}. The labels are used for nothing else.

    Raises:
        UserError: the dataset has no labelled part.
    """

    def __init__(self, config: CfgNode, device: torch.device) -> None:
        self._config, self._device = config, device
        self._train, self._val = (labelled_source(config, split) for split in ("train", "val"))
        count = min(len(self._train), config.PROBE.MAX_TRAIN)
        self._chosen = np.sort(np.random.Generator(np.random.Philox(0)).permutation(len(self._train))[:count])

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """Features of the reference images and of the validation images, and the accuracy by their neighbours."""
        config = self._config
        options = {
            "size": config.DATA.IMAGE_SIZE,
            "mean": torch.tensor(config.DATA.MEAN, device=self._device),
            "std": torch.tensor(config.DATA.STD, device=self._device),
            "precision": resolve_precision(config.TRAIN.PRECISION, self._device),
            "workers": config.DATA.WORKERS,
            "device": self._device,
        }
        train, train_labels = extract(encoder, self._train, indices=self._chosen, **options)
        val, val_labels = extract(encoder, self._val, **options)
        scores = knn_predict(train, train_labels, val, k=config.PROBE.K, classes=len(self._train.classes))
        return {"knn_top1": accuracy(scores, val_labels)}


def labelled_source(config: CfgNode, split: str) -> Source:
    """The `train` or `val` images of a configuration's dataset. Raises UserError where they have no labels."""
    source = build_source(config.DATA.NAME, config.DATA.ROOT, split)
    if UNLABELED in source.labels:
        raise UserError(f"{split} images of {config.DATA.NAME} {config.DATA.ROOT} have no labels: one folder per class is expected")
    return source
