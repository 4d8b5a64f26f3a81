"""Convolutions on small maps as matrix products, against PyTorch's."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from pretrain import convolution
from pretrain.convolution import SmallMapConv2d
from pretrain.encoder import build_encoder


def gradients(network: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a function that weighs each feature differently, for images and parameters; the output too."""
    images = images.clone().requires_grad_()
    output = network(images)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return {"output": output, "images": images.grad, **{name: p.grad for name, p in network.named_parameters()}}


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (1, 2), (5, 2), (5, 6)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_output_and_gradients_are_those_of_the_convolution(size, kernel, stride, monkeypatch):
    layer = nn.Conv2d(4, 5, kernel, stride, kernel // 2, bias=False).double()
    images = torch.randn(3, 4, *size, dtype=torch.float64)
    expected = gradients(layer, images)
    small = SmallMapConv2d(layer)
    small.weight.grad = None
    monkeypatch.setattr(F, "conv2d", None)  # PyTorch's convolution is not called
    monkeypatch.setattr(convolution, "MAX_PIXELS", 30)
    for name, tensor in gradients(small, images).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-13, rtol=1e-13, msg=name)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 48), pytest.param("resnet50", 33, marks=pytest.mark.slow)])
def test_the_encoder_is_torchvisions(name, size):
    encoder = build_encoder(name, "imagenet").double()
    reference = getattr(torchvision.models, name)().double()
    reference.fc = nn.Identity()
    reference.load_state_dict(encoder.state_dict())
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    expected = gradients(reference, images)
    for key, tensor in gradients(encoder, images).items():
        scale = expected[key].abs().max()
        torch.testing.assert_close(tensor / scale, expected[key] / scale, atol=1e-10, rtol=0, msg=key)


def test_maps_of_ten_pixels_are_left_to_pytorch(monkeypatch):
    layer = SmallMapConv2d(nn.Conv2d(4, 5, 3, 1, 1, bias=False))
    monkeypatch.setattr(convolution, "_convolve", None)
    assert layer(torch.zeros(1, 4, 2, 5)).shape == (1, 5, 2, 5)
    with pytest.raises(TypeError):
        layer(torch.zeros(1, 4, 3, 3))


def test_no_images_have_no_maps():
    layer = SmallMapConv2d(nn.Conv2d(4, 5, 3, 1, 1, bias=False))
    assert layer(torch.zeros(0, 4, 2, 2)).shape == (0, 5, 2, 2)


def test_autocast_computes_in_bfloat16():
    layer = SmallMapConv2d(nn.Conv2d(64, 8, 3, 1, 1, bias=False))
    images = torch.randn(2, 64, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(images)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), F.conv2d(images, layer.weight, padding=1), atol=0.03, rtol=0.03)
    output.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.slow
def test_the_operators_describe_their_outputs_to_the_compiler():
    images, weight = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(5, 4, 3, 3, requires_grad=True)
    torch.library.opcheck(convolution._convolve, (images, weight, 2, 1))
