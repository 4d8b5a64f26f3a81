"""The networks: torchvision's ResNets as encoders, the projector, and both together on two views."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet

from pretrain.convolution import use_matrix_products
from pretrain.distributed.batch_norm import ViewBatchNorm, add_and_activate
from pretrain.pooling import MaxPool2d

STEMS = ("imagenet", "cifar")


class BasicBlock(resnet.BasicBlock):
    """torchvision's, with each BatchNorm and what follows it as one call."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps -> maps."""
        out = self.conv2(_normalize_and_activate(self.bn1, self.conv1(x)))
        return _normalize_and_activate(self.bn2, out, x if self.downsample is None else self.downsample(x))


class Bottleneck(resnet.Bottleneck):
    """torchvision's, with each BatchNorm and what follows it as one call."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps -> maps."""
        out = self.conv2(_normalize_and_activate(self.bn1, self.conv1(x)))
        out = self.conv3(_normalize_and_activate(self.bn2, out))
        return _normalize_and_activate(self.bn3, out, x if self.downsample is None else self.downsample(x))


class ResNet(resnet.ResNet):
    """torchvision's, with the first BatchNorm and its ReLU as one call, and without a classifier."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(_normalize_and_activate(self.bn1, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)


def _normalize_and_activate(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """BatchNorm, the sum with the residual branch, ReLU."""
    if isinstance(norm, ViewBatchNorm):
        return norm(x, residual, relu=True)
    return add_and_activate(norm(x), residual, relu=True)


BLOCKS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}
ENCODERS = tuple(BLOCKS)


def build_encoder(name: str, stem: str, zero_init_residual: bool = False) -> nn.Module:
    """A torchvision ResNet without its classifier: images (N, 3, H, W) -> features (N, F), see `feature_dim`.

    Args:
        name: one of `ENCODERS`.
        stem: `imagenet`, torchvision's own (7x7 with stride 2, then max-pooling), or `cifar` for images of about
            32 pixels: a 3x3 convolution with stride 1 and no max-pooling (thesis B.2.1).
        zero_init_residual: initialise the last BatchNorm weight of each residual branch with 0 (Goyal et al. 2017,
            section 5.1), as the authors' code does, and that of SimSiam, Barlow Twins and VICReg.
    """
    block, blocks = BLOCKS[name]
    encoder = ResNet(block, list(blocks), zero_init_residual=zero_init_residual)
    encoder.fc = nn.Identity()
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    else:
        encoder.maxpool = MaxPool2d()
    use_matrix_products(encoder)
    return encoder


def feature_dim(name: str) -> int:
    """F, the dimension of an encoder's features."""
    return 512 if name in ("resnet18", "resnet34") else 2048


def build_projector(in_dim: int, dims: Sequence[int], norm: bool = True, last_bias: bool = True) -> nn.Sequential:
    """An MLP with layers of `dims`: ReLU after the hidden ones, the last one is linear (article 5.1.2).

    Args:
        in_dim: F, dimension of the features.
        dims: of the layers; the last is P, the dimension of the embedding.
        norm: put BatchNorm between each hidden layer and its ReLU (thesis B.2.5, for ImageNet-1K only).
        last_bias: give the last layer a bias. The authors' code gives it none.
    """
    layers: list[nn.Module] = []
    for hidden in dims[:-1]:
        # BatchNorm subtracts the mean, so a bias before it would do nothing.
        layers.append(nn.Linear(in_dim, hidden, bias=not norm))
        layers += [nn.BatchNorm1d(hidden)] if norm else []
        layers.append(nn.ReLU(inplace=True))
        in_dim = hidden
    return nn.Sequential(*layers, nn.Linear(in_dim, dims[-1], bias=last_bias))


class SiameseNetwork(nn.Module):
    """Encoder and projector, shared by both views (thesis A.1).

    Each view is a forward pass of its own, as in the article's pseudocode: BatchNorm sees one view at a time. Training
    computes the same with fewer passes (`pretrain/training/two_views.py`).

    Args:
        encoder, projector: images -> features -> embeddings.
        unit_length: scale the embeddings to length 1.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module, unit_length: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.unit_length = unit_length

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) of each view -> embeddings (N, P), float32."""
        return self.embed(view1), self.embed(view2)

    def embed(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> embeddings (N, P), float32."""
        return self.project(self.encoder(images))

    def project(self, features: Tensor) -> Tensor:
        """Features (N, F) -> embeddings (N, P), float32."""
        embeddings: Tensor = self.projector(features).float()
        return F.normalize(embeddings, dim=1) if self.unit_length else embeddings
