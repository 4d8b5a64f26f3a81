"""Both views in one pass compute what two passes compute."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pretrain.encoder import SiameseNetwork, build_projector
from pretrain.training.two_views import TwoViewNetwork

TOGETHER = pytest.mark.parametrize("together", [True, False])


def siamese() -> SiameseNetwork:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    rest = [nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, momentum=0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return SiameseNetwork(nn.Sequential(block, *rest), build_projector(5, [8, 4]))


def views(dtype: torch.dtype) -> list[Tensor]:
    """Of different statistics, so that it matters which come first and which are mixed."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 12, 12, generator=generator, dtype=dtype) * scale + scale for scale in (1, 3)]


def train_twice(network: nn.Module, pairs: list[Tensor]) -> dict[str, Tensor]:
    """Embeddings, gradients and buffers after two steps' forward and backward passes."""
    weights = torch.linspace(-1, 2, 4, dtype=pairs[0].dtype)
    for _ in range(2):
        network.zero_grad()
        z1, z2 = network(*pairs)
        ((z1 * z2.roll(1, 0)).sin() * weights).sum().backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in network.named_parameters()}
    return {"z1": z1.detach(), "z2": z2.detach(), **gradients, **dict(network.named_buffers())}


@TOGETHER
@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_equal_to_two_passes_in_float64(
    memory: torch.memory_format, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # of the embeddings, which the network returns in float32
    expected_of = siamese().double().to(memory_format=memory)  # type: ignore[call-overload]
    found_of = TwoViewNetwork(copy.deepcopy(expected_of), together)
    pairs = [view.contiguous(memory_format=memory) for view in views(torch.float64)]
    expected, found = train_twice(expected_of, pairs), train_twice(found_of, pairs)
    assert found.keys() == expected.keys()
    assert found["encoder.0.1.num_batches_tracked"] == 4
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-11, atol=1e-11, msg=name)
    odd = [view[:3] for view in pairs]  # in evaluation a batch may have any number of images
    for z, reference in zip(found_of.eval()(*odd), expected_of.eval()(*odd), strict=True):
        torch.testing.assert_close(z, reference, rtol=1e-11, atol=1e-11)


@TOGETHER
def test_equal_to_two_passes_in_bfloat16(together: bool) -> None:
    """Embeddings and statistics exactly; gradients differ in the order of rounding."""
    expected_of = siamese()
    found_of = TwoViewNetwork(copy.deepcopy(expected_of), together)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (train_twice(network, views(torch.float32)) for network in (expected_of, found_of))
    for name, tensor in expected.items():
        close = 2**-5 * float(tensor.abs().max()) if name.startswith("gradient") else 0.0
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=close, msg=name)


@pytest.mark.parametrize(("together", "sizes"), [(True, [8]), (False, [4, 4])])
def test_the_views_pass_the_encoder_at_once_or_one_by_one(together: bool, sizes: list[int]) -> None:
    network = TwoViewNetwork(siamese(), together)
    seen: list[int] = []
    network.encoder.register_forward_hook(lambda module, images, features: seen.append(len(features)))
    network(*views(torch.float32))
    assert seen == sizes


def test_an_image_without_its_pair_is_refused() -> None:
    network = TwoViewNetwork(siamese(), together=True)
    with pytest.raises(ValueError, match="2 views in N"):
        network.encoder(torch.zeros(3, 3, 12, 12))
