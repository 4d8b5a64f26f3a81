"""Features of a frozen encoder, and the online probe."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from pretrain.batches.views import ViewDataset, center_crop
from pretrain.config import get_defaults
from pretrain.evaluation.config import get_finetune_defaults, get_linear_defaults
from pretrain.evaluation.features import Pipeline, build_pipeline, extract
from pretrain.evaluation.probe import fit_linear
from pretrain.images.files import FileSource
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


class Pixels(nn.Module):
    """The views themselves."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def test_scaled_decoding_of_the_central_crop(tmp_path: Path) -> None:
    """The crop of 28 pixels is of an image with a shorter side of 32, so a JPEG of 200 pixels is decoded at 1/4."""
    blobs = np.random.default_rng(0).integers(90, 160, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(blobs).resize((267, 200), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.jpg", quality=92)
    image.save(tmp_path / "b.png")
    image.resize((84, 63)).save(tmp_path / "c.jpg")  # less than twice the 32 pixels
    files = FileSource([tmp_path / name for name in ("a.jpg", "b.png", "c.jpg")], [0] * 3, ["any"])
    exact, scaled = (
        255 * extract(Pixels(), files, Pipeline(28, torch.zeros(3), torch.ones(3), 0, CPU, scaled=scaled),
                      precision="float32")[0]
        for scaled in (False, True)
    )  # fmt: skip
    assert torch.equal(exact[1:], scaled[1:])
    assert 0 < (exact[0] - scaled[0]).abs().mean() < 2
    dataset = ViewDataset(files, 28, [])
    assert torch.equal(exact[0].view(3, 28, 28).round().byte(), dataset.read([(0, 0)]).images[0, 0])
    decoded = torch.from_numpy(files.open(0).decode(4).copy()).permute(2, 0, 1)
    assert torch.equal(scaled[0].view(3, 28, 28).round().byte(), center_crop(decoded, 28))


def test_the_configuration_decides_on_scaled_decoding() -> None:
    for defaults in (get_defaults(), get_linear_defaults(), get_finetune_defaults()):
        defaults.DATA.MEAN = defaults.DATA.STD = [0.5] * 3
        assert not build_pipeline(defaults, CPU).scaled
        defaults.DATA.DECODE = "scaled"
        assert build_pipeline(defaults, CPU).scaled


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
