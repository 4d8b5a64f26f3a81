"""Features of a frozen encoder, and the online probe."""

import numpy as np
import torch
from torch import nn

from pretrain.evaluation.features import Pipeline, extract
from pretrain.evaluation.probe import fit_linear
from pretrain.images.sources import ArraySource

CPU = torch.device("cpu")


class Mean(nn.Module):
    """The mean of each channel, and whether it was in training mode."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mode = torch.full((len(images), 1), float(self.training))
        return torch.cat([images.mean(dim=(2, 3)), mode], dim=1)


def test_extraction_keeps_the_order_and_the_mode() -> None:
    grey = np.arange(0, 250, 10, dtype=np.uint8)
    images = np.broadcast_to(grey[:, None, None, None], (25, 8, 8, 3)).copy()
    source = ArraySource(images, list(range(25)), [str(i) for i in range(25)])
    pipeline = Pipeline(8, torch.zeros(3), torch.ones(3), 0, CPU)
    encoder = Mean().train()
    indices = np.array([3, 20, 1, 7, 8])
    found, labels = extract(encoder, source, pipeline, precision="float32", indices=indices, batch_size=2)
    assert encoder.training
    assert labels.tolist() == indices.tolist()
    assert torch.allclose(found[:, 0], torch.from_numpy(grey[indices]).float() / 255, atol=1e-6)
    assert found[:, 3].eq(0).all()  # in eval mode


def test_the_linear_probe_is_the_minimum_of_its_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(4, 6, generator=generator)
    labels = torch.arange(80) % 4
    features = centres[labels] + torch.randn(80, 6, generator=generator)
    predict = fit_linear(features, labels, 4)
    assert (predict(features).argmax(1) == labels).float().mean() > 0.95
    # Scale and offset of the features do not matter: they are standardised.
    other = fit_linear(100 * features + 7, labels, 4)
    assert torch.allclose(predict(features), other(100 * features + 7), atol=1e-2)
    # At the minimum the biases have no gradient: predicted and true frequencies of each class agree.
    frequencies = predict(features).softmax(1).mean(0)
    assert torch.allclose(frequencies, torch.full((4,), 0.25), atol=1e-3)
