"""A network small enough for whole runs in tests, in place of the encoders."""

import pytest
from torch import nn

from pretrain.runs import weights
from pretrain.training import build


def use_tiny_encoder(patch: pytest.MonkeyPatch) -> None:
    """Have `pretrain` build a network with 8 features, whatever encoder is asked for: in pretraining and of weights."""

    def tiny(name: str, stem: str, zero_init_residual: bool) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    patch.setattr(build, "build_encoder", tiny)
    patch.setattr(weights, "build_encoder", tiny)
    patch.setattr(build, "feature_dim", lambda name: 8)
