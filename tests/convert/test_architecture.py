"""Every ResNet that torchvision and Detectron2 share is recognised; the others are refused by name."""

import pytest
import timm
import torch
import torchvision

from convert.architecture import TORCHVISION_NAMES, infer_architecture, mismatches
from foundation.errors import UserError
from tests.convert.conftest import encoder_of, tiny_resnet

COUNTS = {"resnet18": 100, "resnet34": 180, "resnet50": 265, "resnet101": 520, "resnet152": 775}


def shapes_of(network):
    return {name: tuple(tensor.shape) for name, tensor in encoder_of(network).items() if "num_batches" not in name}


@pytest.mark.parametrize("name", sorted(TORCHVISION_NAMES))
def test_every_torchvision_network(name):
    with torch.device("meta"):
        shapes = shapes_of(getattr(torchvision.models, name)())
    architecture = infer_architecture(shapes)
    assert architecture.name == name
    assert mismatches(architecture, shapes) == []
    assert architecture.tensors() == shapes
    assert len(shapes) == COUNTS.get(name, len(shapes))


def test_wide_networks_of_simclr_and_vicreg():
    shapes = shapes_of(tiny_resnet(0, width=128))
    architecture = infer_architecture(shapes)
    assert architecture.name == "resnet50_x2"
    assert architecture.tensors() == shapes
    assert architecture.detectron2 == {
        "DEPTH": 50,
        "STEM_OUT_CHANNELS": 128,
        "RES2_OUT_CHANNELS": 512,
        "NUM_GROUPS": 1,
        "WIDTH_PER_GROUP": 128,
    }


OTHERS = {
    "resnet50d": "deep stem",
    "seresnet50": "squeeze-and-excitation",
    "resnest50d": "deep stem",
    "skresnet50": "selective kernels",
    "ecaresnet50t": "a ResNet with",
    "resnet26": "ResNet-26",
    "resnet200": "ResNet-200",
    "resnet10t": "deep stem",
    "resnet50_gn": "without BatchNorm statistics",
    "resnetv2_50": "pre-activation",
    "vit_tiny_patch16_224": "vision transformer",
    "swin_tiny_patch4_window7_224": "vision transformer",
    "convnext_atto": "ConvNeXt",
    "regnety_002": "RegNet",
    "densenet121": "DenseNet",
    "efficientnet_b0": "EfficientNet or a MobileNet",
    "vgg11": "VGG",
    "mobilenetv3_small_050": "EfficientNet or a MobileNet",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_refused_by_name(name, convert):
    with torch.device("meta"):
        network = timm.create_model(name, pretrained=False)
    tensors = network.state_dict().items()
    state = {key: torch.empty((), dtype=tensor.dtype).expand(tensor.shape) for key, tensor in tensors}
    with pytest.raises(UserError, match=OTHERS[name]):
        convert(state)


def test_cifar_stems_and_other_inputs(query, convert):
    for shape, message in (((8, 3, 3, 3), "CIFAR stem"), ((8, 1, 7, 7), "1 channels"), ((8, 3, 5, 5), "5x5")):
        state = {**encoder_of(query), "conv1.weight": torch.zeros(shape)}
        with pytest.raises(UserError, match=message):
            convert(state)
    sequential = {"0.weight": torch.zeros(64, 3, 3, 3), "1.weight": torch.ones(64), "1.running_mean": torch.ones(64)}
    with pytest.raises(UserError, match="CIFAR stem"):
        convert(sequential | {"2.0.conv1.weight": torch.zeros(64, 64, 3, 3)})


def test_clip_is_refused(query, convert):
    state = encoder_of(query) | {"conv2.weight": torch.ones(8, 8, 3, 3), "attnpool.positional_embedding": torch.ones(3)}
    with pytest.raises(UserError, match="deep stem"):
        convert({f"visual.{name}": value for name, value in state.items()})


def test_missing_wrong_and_surplus_tensors(query, convert):
    state = encoder_of(query)
    for name in ("conv1.weight", "layer1.0.conv2.weight"):
        with pytest.raises(UserError, match=f"without {name}"):
            convert({other: value for other, value in state.items() if other != name})
        with pytest.raises(UserError, match=rf"{name} is of shape \(5,\)"):
            convert(state | {name: torch.ones(5)})
    with pytest.raises(UserError, match=r"layer3\.2\.bn1\.running_var is missing"):
        convert({name: value for name, value in state.items() if name != "layer3.2.bn1.running_var"})
    with pytest.raises(UserError, match=r"layer2\.0\.conv1\.weight is of shape \(5, 5, 1, 1\)"):
        convert(state | {"layer2.0.conv1.weight": torch.ones(5, 5, 1, 1)})
    with pytest.raises(UserError, match=r"layer1\.0\.extra\.weight"):
        convert(state | {"layer1.0.extra.weight": torch.ones(3)})
