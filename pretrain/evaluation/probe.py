"""The online probe: kNN accuracy of the encoder on the dataset's labels, while pretraining goes on."""

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn

from pretrain.config import build_streaming, resolve_precision
from pretrain.evaluation.features import Pipeline, extract, knn_accuracy, nearest
from pretrain.images.labelled import build_labelled_splits, split_labelled_folder

TEMPERATURE = 0.07  # of the votes; DINO's


class OnlineProbe:
    """Callable on an encoder; gives {"knn_top1": percent}. The labels are used for nothing else.

    Raises:
        UserError: the dataset has no labelled part.
    """

    def __init__(self, config: CfgNode, device: torch.device) -> None:
        if config.PROBE.ROOT:
            self._train, self._val = split_labelled_folder(config.PROBE.ROOT)
        else:
            self._train, self._val = build_labelled_splits(config.DATA.NAME, config.DATA.ROOT, build_streaming(config))
        count = min(len(self._train), config.PROBE.MAX_TRAIN)
        self._chosen = np.sort(np.random.Generator(np.random.Philox(0)).permutation(len(self._train))[:count])
        self._k, self._device = config.PROBE.K, device
        self._precision = resolve_precision(config.TRAIN.PRECISION, device)
        self._pipeline = build_pipeline(config, device)

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """Features of the reference images and of the validation images, and the accuracy by their neighbours."""
        train, train_labels = extract(
            encoder, self._train, self._pipeline, precision=self._precision, indices=self._chosen
        )
        val, val_labels = extract(encoder, self._val, self._pipeline, precision=self._precision)
        neighbours = nearest(train, train_labels, val, k=self._k, device=self._device)
        classes = len(self._train.classes)
        found = knn_accuracy(*neighbours, val_labels, ks=[self._k], classes=classes, temperature=TEMPERATURE)
        return {"knn_top1": found[self._k]["top1"]}


def build_pipeline(config: CfgNode, device: torch.device) -> Pipeline:
    """How a configuration's images come to the device."""
    return Pipeline(
        size=config.DATA.IMAGE_SIZE,
        mean=torch.tensor(config.DATA.MEAN, device=device),
        std=torch.tensor(config.DATA.STD, device=device),
        workers=config.DATA.WORKERS,
        device=device,
        max_unreadable=config.DATA.MAX_UNREADABLE,
    )
