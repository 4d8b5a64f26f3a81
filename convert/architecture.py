"""Which ResNet a set of tensors is, and the names and shapes that this ResNet must have, without building a network.

Shapes are in PyTorch's order: convolutions (out, in, height, width), normalisation (channels,). `canonical`
names are torchvision's, without `fc` and without `num_batches_tracked`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
TORCHVISION_NAMES = {
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *("wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
}
_DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
_OTHER_DEPTHS: dict[tuple[bool, tuple[int, ...]], str] = {
    (True, (2, 2, 2, 2)): "ResNet-26",
    (True, (3, 24, 36, 3)): "ResNet-200",
    (True, (3, 4, 36, 3)): "ResNet-134",
    (False, (1, 1, 1, 1)): "ResNet-10",
}
# Modules that Detectron2's ResNet does not have, by the names of their tensors.
_FOREIGN_PARTS = (
    (
        r"^conv1\.\d+\.|^stem\.\d|^conv2\.weight$",
        "a deep stem (resnet-C or -D, CLIP) instead of one 7x7 convolution",
    ),
    (r"\.downsample\.(2\.|1\.weight4d)", "average-pooled shortcuts (resnet50d)"),
    (r"\.(se|se_module)\.", "squeeze-and-excitation blocks (SE-ResNet)"),
    (
        r"\.conv2\.(conv|fc1|main_conv|mixing_conv)",
        "split-attention or selective-kernel blocks (ResNeSt, SK-ResNet)",
    ),
    (r"\.(eca|attn|cbam|gc)\.", "attention in its blocks"),
    (
        r"(conv\d|downsample\.0)\.(bias|weight_g|weight_v|weight_orig|parametrizations)",
        "biased or reparametrised convolutions",
    ),
)


class UnsupportedArchitecture(Exception):
    """The tensors are not a ResNet that Detectron2 can build; the message says which one, and why not."""


@dataclass(frozen=True)
class Architecture:
    """A ResNet that both torchvision and Detectron2 can build.

    Attributes:
        depth: 18, 34, 50, 101 or 152.
        blocks: number of blocks in each of the four stages.
        stem: channels of the first convolution.
        width: channels of the 3x3 convolutions in the first stage.
        out: output channels of the first stage.
        groups: groups of the 3x3 convolutions.
        kernel: of the first convolution: 7, or 3 in a CIFAR stem (stride 1, no max-pooling).
    """

    depth: int
    blocks: tuple[int, ...]
    stem: int
    width: int
    out: int
    groups: int
    kernel: int = 7

    @property
    def bottleneck(self) -> bool:
        """Whether a block has three convolutions (depth 50 and up) instead of two."""
        return self.depth >= 50

    @property
    def name(self) -> str:
        """The name in torchvision where it has one; `resnet50_x2` where every layer is twice as wide."""
        factor, rest = divmod(self.stem, 64)
        plain = self.groups == 1 and self.width == self.stem and self.out == self.stem * (1 + 3 * self.bottleneck)
        if plain and rest == 0:
            return f"resnet{self.depth}" if factor == 1 else f"resnet{self.depth}_x{factor}"
        if self.stem == 64 and self.groups == 1 and self.width == 128:
            return f"wide_resnet{self.depth}_2"
        if self.stem == 64 and self.groups > 1:
            return f"resnext{self.depth}_{self.groups}x{self.width // self.groups}d"
        return f"resnet{self.depth}_stem{self.stem}_width{self.width}_out{self.out}_groups{self.groups}"

    @property
    def stem_kind(self) -> str:
        """`imagenet`: 7x7 with stride 2, then max-pooling. `cifar`: 3x3 with stride 1."""
        return "imagenet" if self.kernel == 7 else "cifar"

    @property
    def detectron2(self) -> dict[str, int]:
        """The keys of `MODEL.RESNETS` that describe it."""
        return {
            "DEPTH": self.depth,
            "STEM_OUT_CHANNELS": self.stem,
            "RES2_OUT_CHANNELS": self.out,
            "NUM_GROUPS": self.groups,
            "WIDTH_PER_GROUP": self.width // self.groups,
        }

    def tensors(self) -> dict[str, Shape]:
        """Name and shape of every canonical tensor; 265 of them for a ResNet-50."""
        found: dict[str, Shape] = {"conv1.weight": (self.stem, 3, self.kernel, self.kernel)}
        found.update(_norm("bn1", self.stem))
        channels = self.stem
        for stage, count in enumerate(self.blocks):
            width, out = self.width << stage, self.out << stage
            for block in range(count):
                root = f"layer{stage + 1}.{block}"
                for index, (made, taken, kernel) in enumerate(self._convolutions(channels, width, out), start=1):
                    found[f"{root}.conv{index}.weight"] = (made, taken, kernel, kernel)
                    found.update(_norm(f"{root}.bn{index}", made))
                if block == 0 and (stage > 0 or channels != out):
                    found[f"{root}.downsample.0.weight"] = (out, channels, 1, 1)
                    found.update(_norm(f"{root}.downsample.1", out))
                channels = out
        return found

    def _convolutions(self, channels: int, width: int, out: int) -> list[tuple[int, int, int]]:
        """(out, in, kernel) of each convolution of a block that takes `channels`."""
        if self.bottleneck:
            return [(width, channels, 1), (width, width // self.groups, 3), (out, width, 1)]
        return [(out, channels, 3), (out, out, 3)]


def _norm(name: str, channels: int) -> dict[str, Shape]:
    return {f"{name}.{part}": (channels,) for part in NORM_PARTS}


def infer_architecture(shapes: Mapping[str, Shape], cifar_stem: bool = False) -> Architecture:
    """Recognise a ResNet by its tensors.

    Args:
        shapes: of its tensors, by canonical name; further names do not matter.
        cifar_stem: accept a 3x3 convolution in its stem, which Detectron2 does not have.

    Raises:
        UnsupportedArchitecture: it is another network, which the message names.
    """
    _refuse_foreign_parts(shapes)
    conv = _convolution(shapes, "conv1.weight")
    if not (cifar_stem and conv[1:] == (3, 3, 3)):
        _refuse_stem(conv)
    blocks = tuple(_count_blocks(shapes, stage) for stage in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in shapes
    depth = _DEPTHS.get((bottleneck, blocks))
    if depth is None:
        name = _OTHER_DEPTHS.get((bottleneck, blocks), "a ResNet")
        raise UnsupportedArchitecture(f"{name} with {blocks} blocks; Detectron2 builds depths 18, 34, 50, 101 and 152")
    stem = conv[0]
    middle = _convolution(shapes, "layer1.0.conv2.weight")
    out = _convolution(shapes, "layer1.0.conv3.weight")[0] if bottleneck else middle[0]
    groups = max(1, middle[0] // max(1, middle[1])) if bottleneck else 1
    if not bottleneck and (stem, out) != (64, 64):
        raise UnsupportedArchitecture(
            f"a ResNet-{depth} of width {out}; Detectron2 builds depths 18 and 34 at width 64 only"
        )
    return Architecture(depth, blocks, stem, middle[0], out, groups, conv[2])


def _convolution(shapes: Mapping[str, Shape], name: str) -> Shape:
    if name not in shapes:
        raise UnsupportedArchitecture(f"a ResNet without {name}")
    if len(shapes[name]) != 4 or 0 in shapes[name]:
        raise UnsupportedArchitecture(f"a ResNet whose {name} is of shape {shapes[name]}")
    return shapes[name]


def _count_blocks(shapes: Mapping[str, Shape], stage: int) -> int:
    numbers = {int(match[1]) for name in shapes if (match := re.match(rf"layer{stage}\.(\d+)\.conv1\.weight$", name))}
    return len(numbers)


def _refuse_foreign_parts(shapes: Mapping[str, Shape]) -> None:
    inside = re.compile(r"(layer\d|conv\d|bn\d|stem)\.")  # names of heads say nothing about the encoder
    # A shortcut whose second tensor is a convolution begins with a pooling layer.
    names = [
        f"{name}4d" if len(shape) == 4 and name.endswith("downsample.1.weight") else name
        for name, shape in shapes.items()
        if inside.match(name)
    ]
    for pattern, what in _FOREIGN_PARTS:
        if any(re.search(pattern, name) for name in names):
            raise UnsupportedArchitecture(f"a ResNet with {what}, which Detectron2's does not have")
    if "bn1.weight" in shapes and "bn1.running_mean" not in shapes:
        raise UnsupportedArchitecture("a ResNet without BatchNorm statistics (GroupNorm or LayerNorm)")


def _refuse_stem(conv: Shape) -> None:
    if conv[2:] == (3, 3):
        raise UnsupportedArchitecture(
            "a ResNet with a CIFAR stem (3x3 convolution, no max-pooling); Detectron2's stem is 7x7"
        )
    if conv[2:] != (7, 7):
        raise UnsupportedArchitecture(f"a ResNet whose first convolution is {conv[2]}x{conv[3]}; Detectron2's is 7x7")
    if conv[1] != 3:
        kind = {1: " (grey or Lab's L)", 2: " (Lab's ab)", 4: " (with depth or alpha)"}.get(conv[1], "")
        raise UnsupportedArchitecture(f"a ResNet for images of {conv[1]} channels{kind}; Detectron2's takes 3")


def mismatches(architecture: Architecture, shapes: Mapping[str, Shape]) -> list[str]:
    """How `shapes` differ from the tensors of `architecture`: missing, of another shape, or not part of it."""
    expected = architecture.tensors()
    missing = [f"{name} is missing" for name in expected if name not in shapes]
    wrong = [
        f"{name} is of shape {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    extra = [f"{name} is not part of a {architecture.name}" for name in shapes if name not in expected]
    return missing + wrong + extra
