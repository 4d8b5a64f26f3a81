"""The article's six recipes: layers, biases, first values and views, as thesis Appendix B and the authors' code say."""

import dataclasses
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from foundation.config import load_config
from pretrain.batches.views import center_crop, resized_side
from pretrain.config import build_augmentations, get_defaults, learning_rate, validate
from pretrain.encoder import build_encoder
from pretrain.evaluation.config import get_finetune_defaults, get_linear_defaults, validate_linear
from pretrain.evaluation.features import build_pipeline, extract
from pretrain.images.sources import ArraySource
from pretrain.training.build import build_network


class Expected(NamedTuple):
    """One row of article 5.1.2 and thesis B.1 and B.2."""

    encoder: str
    stem: str
    dims: list[int]
    norm: bool
    size: int  # pixels of the views
    resized: int  # shorter side before the central crop


RECIPES = {
    "cifar10_R18": Expected("resnet18", "cifar", [2048, 2048, 64], False, 32, 36),
    "cifar100_R18": Expected("resnet18", "cifar", [4096, 4096, 128], False, 32, 36),
    "tiny_imagenet_R50": Expected("resnet50", "imagenet", [4096, 4096, 128], False, 64, 73),
    "imagenet100_R18": Expected("resnet18", "imagenet", [4096, 4096, 128], False, 224, 256),
    "imagenet100_R50": Expected("resnet50", "imagenet", [4096, 4096, 128], False, 224, 256),
    "imagenet1k_R50": Expected("resnet50", "imagenet", [8192, 8192, 512], True, 224, 256),
}
recipes = pytest.mark.parametrize(("name", "expected"), RECIPES.items())


def read(name: str):
    config = load_config(get_defaults(), name, "pretrain", [])
    validate(config)
    return config


@recipes
def test_projector_has_the_layers_of_the_article(name: str, expected: Expected) -> None:
    with torch.device("meta"):
        projector = build_network(read(name)).projector
    features = {"resnet18": 512, "resnet50": 2048}[expected.encoder]
    layers = []
    for in_dim, out_dim in zip([features, *expected.dims[:-2]], expected.dims[:-1], strict=True):
        layers += [(nn.Linear, in_dim, out_dim, not expected.norm)]
        layers += [(nn.BatchNorm1d, out_dim)] if expected.norm else []
        layers += [(nn.ReLU,)]
    layers += [(nn.Linear, expected.dims[-2], expected.dims[-1], False)]
    assert [describe(layer) for layer in projector] == layers


def describe(layer: nn.Module) -> tuple:
    if isinstance(layer, nn.Linear):
        return nn.Linear, layer.in_features, layer.out_features, layer.bias is not None
    return (type(layer), layer.num_features) if isinstance(layer, nn.BatchNorm1d) else (type(layer),)


@recipes
def test_encoder_begins_with_residual_branches_at_zero(name: str, expected: Expected) -> None:
    config = read(name)
    assert (expected.encoder, expected.stem) == (config.ENCODER.NAME, config.ENCODER.STEM)
    encoder = encoder_of(config.ENCODER.NAME, config.ENCODER.STEM, config.ENCODER.ZERO_INIT_RESIDUAL)
    blocks = [block for block in encoder.modules() if isinstance(block, (BasicBlock, Bottleneck))]
    last_norms = [block.bn3 if isinstance(block, Bottleneck) else block.bn2 for block in blocks]
    assert len(last_norms) == {"resnet18": 8, "resnet50": 16}[expected.encoder]
    assert all(float(norm.weight.detach().abs().max()) == 0 for norm in last_norms)
    others = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d) and all(m is not n for n in last_norms)]
    assert all(set(norm.weight.tolist()) == {1.0} for norm in others)
    kernel, stride, pool = {"cifar": (3, 1, nn.Identity), "imagenet": (7, 2, nn.MaxPool2d)}[expected.stem]
    assert (encoder.conv1.kernel_size, encoder.conv1.stride) == ((kernel, kernel), (stride, stride))
    assert isinstance(encoder.maxpool, pool)


encoder_of = cache(build_encoder)  # a ResNet-50 takes half a second


@recipes
def test_views_have_the_sizes_of_the_article(name: str, expected: Expected) -> None:
    config = read(name)
    linear = load_config(get_linear_defaults(), name, "linear", [])
    validate_linear(linear)
    assert config.DATA.IMAGE_SIZE == linear.DATA.IMAGE_SIZE == expected.size
    assert resized_side(linear.DATA.IMAGE_SIZE) == expected.resized
    assert linear.DATA.INTERPOLATION == "bicubic"  # B.1.3
    assert (linear.LINEAR.INIT, linear.TRAIN.DROP_LAST) == ("uniform", False)  # authors' code
    assert (config.DATA.MEAN, config.DATA.STD) == (linear.DATA.MEAN, linear.DATA.STD)


@recipes
def test_augmentations_are_those_of_table_b1(name: str, expected: Expected) -> None:
    first, second = build_augmentations(read(name))
    table = {"crop_scale": (0.08, 1.0), "flip": 0.5, "jitter": 0.8, "brightness": 0.4, "contrast": 0.4}
    table |= {"saturation": 0.2, "hue": 0.1, "gray": 0.2}
    for view, blur, solarize in ((first, 1.0, 0.0), (second, 0.1, 0.2)):
        values = dataclasses.asdict(view)
        assert {key: values[key] for key in table} == table
        assert (view.blur, view.solarize) == (blur, solarize)


@pytest.mark.parametrize("protocol", ["moco", "simsiam", "vicreg"])
def test_protocols_of_other_repositories_resize_as_they_do(protocol: str) -> None:
    linear = load_config(get_linear_defaults(), f"imagenet1k_R50_{protocol}", "linear", [])
    assert (linear.DATA.INTERPOLATION, linear.LINEAR.INIT, linear.TRAIN.DROP_LAST) == ("bilinear", "normal", False)


@pytest.mark.parametrize("fraction", ["1percent", "10percent"])
def test_fine_tuning_resizes_as_its_source_does(fraction: str) -> None:
    for suffix, interpolation in (("", "bicubic"), ("_vicreg", "bilinear")):
        config = load_config(get_finetune_defaults(), f"imagenet1k_{fraction}{suffix}", "finetune", [])
        assert interpolation == config.DATA.INTERPOLATION


def test_views_are_resized_with_the_interpolation_of_the_config() -> None:
    """The pipeline of an evaluation passes it on, to random views and to central crops."""
    config = load_config(
        get_linear_defaults(), "imagenet1k_R50_moco", "linear", ["DATA.IMAGE_SIZE", "8", "DATA.WORKERS", "0"]
    )
    pixels = np.random.default_rng(0).integers(0, 256, (1, 30, 20, 3), dtype=np.uint8)
    source = ArraySource(pixels, [0], ["a"])
    pipeline = build_pipeline(config, torch.device("cpu"))
    flat = nn.Flatten()
    features, _ = extract(flat, source, pipeline, precision="float32")
    crop = center_crop(torch.from_numpy(pixels[0]).permute(2, 0, 1), 8, "bilinear")
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.DATA.MEAN, config.DATA.STD))
    assert torch.allclose(features, flat((crop / 255 - mean) / std)[None].flatten(1), atol=1e-5)


def test_vicreg_of_table_5_2_trains_as_its_code_does() -> None:
    config = read("imagenet1k_R50_vicreg")
    assert learning_rate(config) == pytest.approx(2.4)  # 0.3 x 2048 / 256
    assert pytest.approx(learning_rate(config) / 1000) == config.TRAIN.MIN_LR
    with torch.device("meta"):
        network = build_network(config)
    assert not network.unit_length
    linear = [layer for layer in network.projector if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == [8192, 8192, 8192]
    assert linear[-1].bias is None
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in network.projector) == 2
