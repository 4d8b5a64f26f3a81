"""How encoders begin."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from pretrain.config import get_defaults
from pretrain.encoder import build_encoder
from pretrain.evaluation.config import get_finetune_defaults, get_linear_defaults
from pretrain.runs.weights import build_from, read_weights
from pretrain.training.build import build_network


def begins_as_shortcuts(encoder: nn.Module) -> set[bool]:
    """For all blocks: whether what they add to their shortcut is 0."""
    blocks = [block for block in encoder.modules() if isinstance(block, (BasicBlock, Bottleneck))]
    norms = [block.bn3 if isinstance(block, Bottleneck) else block.bn2 for block in blocks]
    return {bool((norm.weight == 0).all()) for norm in norms}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_residual_branches_begin_at_zero_where_asked_for(name: str, zero: bool) -> None:
    config = get_defaults()
    config.ENCODER.NAME, config.ENCODER.ZERO_INIT_RESIDUAL, config.PROJECTOR.DIMS = name, zero, [8, 4]
    assert begins_as_shortcuts(build_network(config).encoder) == {zero}
    assert begins_as_shortcuts(build_from(read_weights("random"), name, "imagenet", zero)) == {zero}


def test_every_other_tensor_begins_alike() -> None:
    encoders = []
    for zero in (False, True):
        torch.manual_seed(3)
        encoders.append(build_encoder("resnet18", "cifar", zero).state_dict())
    plain, zeroed = encoders
    differing = {name for name, tensor in plain.items() if not torch.equal(tensor, zeroed[name])}
    assert differing == {f"layer{stage}.{block}.bn2.weight" for stage in (1, 2, 3, 4) for block in (0, 1)}


def test_nobody_gets_it_unasked() -> None:
    for defaults in (get_defaults, get_linear_defaults, get_finetune_defaults):
        assert defaults().ENCODER.ZERO_INIT_RESIDUAL is False


def test_the_first_gradient_of_a_resnet50_survives_bfloat16() -> None:
    """Without zeroed branches each of the 16 blocks multiplies the gradient, and its rounding, on the way down."""
    generator = torch.Generator().manual_seed(1)
    images = F.interpolate(torch.randn(16, 3, 8, 8, generator=generator), size=40, mode="bilinear")
    target = torch.randn(16, 2048, generator=generator)

    def gradient(zero: bool, bfloat16: bool) -> torch.Tensor:
        torch.manual_seed(0)
        encoder = build_encoder("resnet50", "imagenet", zero)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            features = encoder(images)
        (F.normalize(features.float(), dim=1) * target).sum().backward()
        return encoder.conv1.weight.grad.flatten()

    plain, zeroed = (
        float(F.cosine_similarity(gradient(zero, bfloat16=False), gradient(zero, bfloat16=True), dim=0))
        for zero in (False, True)
    )
    assert plain < 0.6
    assert zeroed > 0.95
