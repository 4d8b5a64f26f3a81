"""The online probe: accuracy of the encoder on the dataset's labels during pretraining."""

from collections.abc import Callable

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import UserError
from pretrain.config import build_streaming, resolve_precision
from pretrain.evaluation.features import build_pipeline, extract
from pretrain.evaluation.knn import TEMPERATURE, accuracy, check_neighbours, nearest, vote
from pretrain.images.labelled import build_labelled_splits, split_labelled_folder

ITERATIONS = 100  # of L-BFGS at most, for the linear head
WEIGHT_DECAY = 1e-3  # of the linear head, on standardised features


class OnlineProbe:
    """Callable on an encoder; returns {"knn_top1": percent} or {"linear_top1": percent}, by `PROBE.KIND`.

    The labels are not used for training. The result depends on the encoder alone, so that a resumed run measures the
    same as an uninterrupted one.

    Raises:
        UserError: the dataset has no labelled part, or it is smaller than PROBE.K.
    """

    def __init__(self, config: CfgNode, device: torch.device) -> None:
        if config.PROBE.ROOT:
            self._train, self._val = split_labelled_folder(config.PROBE.ROOT)
        else:
            try:
                splits = build_labelled_splits(config.DATA.NAME, config.DATA.ROOT, build_streaming(config))
            except UserError as error:
                raise UserError(f"PROBE.EVERY needs labelled images: {error}, or set PROBE.ROOT") from error
            self._train, self._val = splits
        count = min(len(self._train), config.PROBE.MAX_TRAIN)
        if config.PROBE.KIND == "knn":
            check_neighbours("PROBE.K", config.PROBE.K, count)
        self._chosen = np.sort(np.random.Generator(np.random.Philox(0)).permutation(len(self._train))[:count])
        self._kind, self._k, self._device = config.PROBE.KIND, config.PROBE.K, device
        self._precision = resolve_precision(config.TRAIN.PRECISION, device)
        self._pipeline = build_pipeline(config, device)

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """Features of the reference images and of the validation images, and the accuracy by either classifier."""
        train, train_labels = extract(
            encoder, self._train, self._pipeline, precision=self._precision, indices=self._chosen
        )
        val, val_labels = extract(encoder, self._val, self._pipeline, precision=self._precision)
        classes = len(self._train.classes)
        if self._kind == "linear":
            predict = fit_linear(train.to(self._device), train_labels.to(self._device), classes)
            return {"linear_top1": accuracy(predict(val.to(self._device)).cpu(), val_labels)}
        neighbours = nearest(train, train_labels, val, k=self._k, device=self._device)
        return {"knn_top1": accuracy(vote(*neighbours, classes=classes, temperature=TEMPERATURE), val_labels)}


def fit_linear(features: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression by L-BFGS on standardised features, begun at 0.

    Args:
        features: (M, F); labels: (M,).
        classes: number of classes.

    Returns:
        features (N, F) -> logits (N, classes).
    """
    std, mean = torch.std_mean(features, dim=0, correction=0)
    scale = std.clamp(min=1e-6)
    rows = (features - mean) / scale
    weight = rows.new_zeros(classes, rows.shape[1], requires_grad=True)
    bias = rows.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(rows @ weight.T + bias, labels) + WEIGHT_DECAY / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return lambda others: ((others - mean) / scale) @ weight.detach().T + bias.detach()
