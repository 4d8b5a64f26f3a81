"""Translation of tensor names, from each of the conventions of public ResNets to torchvision's.

A scheme has an anchor: a tensor that every ResNet in this convention has. The part of a name before the anchor is the
prefix of an encoder. Canonical names are torchvision's (`layer1.0.conv1.weight`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from convert.tensors import StoredTensor

_NORM_PART = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


@dataclass(frozen=True)
class Scheme:
    """One convention of names.

    Attributes:
        name: for messages.
        anchors: the names that the anchor tensor may have.
        canonical: translates a name without prefix to torchvision's; None if the scheme has no such name.
        adapt: converts a tensor to PyTorch's layout, given its canonical name.
        part_prefixes: further prefixes under which parts of the encoder may be.
        separator: the last character of an encoder's prefix.
    """

    name: str
    anchors: tuple[str, ...]
    canonical: Callable[[str], str | None]
    adapt: Callable[[str, StoredTensor], StoredTensor] = lambda name, tensor: tensor
    part_prefixes: tuple[str, ...] = ()
    separator: str = "."

    def prefixes(self, names: Mapping[str, StoredTensor]) -> list[str]:
        """The prefixes under which there is an encoder."""
        found = [name.removesuffix(anchor) for name in names for anchor in self.anchors if name.endswith(anchor)]
        return [prefix for prefix in found if prefix == "" or prefix.endswith(self.separator)]

    def translate(self, name: str, prefix: str) -> str | None:
        """The canonical name of a tensor of the encoder under `prefix`; None if it is not part of it."""
        for root in (prefix, *self.part_prefixes):
            if name.startswith(root) and (found := self.canonical(name[len(root) :])):
                return found
        return None


def _substituted(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> Callable[[str], str | None]:
    """A translation by the first rule whose pattern matches the whole name; None if none does."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def translate(name: str) -> str | None:
        for pattern, replacement in compiled:
            if match := pattern.fullmatch(name):
                return match.expand(replacement) if isinstance(replacement, str) else replacement(match)
        return None

    return translate


def _stage(offset: int, text: str) -> Callable[[re.Match[str]], str]:
    """A replacement in which `{s}` is the first group plus `offset`, and \\2.. are the other groups."""
    return lambda match: match.expand(text.replace("{s}", str(int(match[1]) + offset)))


_TORCHVISION = _substituted(
    (r"conv1\.weight", r"conv1.weight"),
    (rf"bn1\.{_NORM_PART}", r"bn1.\1"),
    (r"layer([1-4])\.(\d+)\.conv([123])\.weight", r"layer\1.\2.conv\3.weight"),
    (rf"layer([1-4])\.(\d+)\.bn([123])\.{_NORM_PART}", r"layer\1.\2.bn\3.\4"),
    (r"layer([1-4])\.(\d+)\.downsample\.0\.weight", r"layer\1.\2.downsample.0.weight"),
    (rf"layer([1-4])\.(\d+)\.downsample\.1\.{_NORM_PART}", r"layer\1.\2.downsample.1.\3"),
)

_DETECTRON2 = _substituted(
    (r"stem\.conv1\.weight", r"conv1.weight"),
    (rf"stem\.conv1\.norm\.{_NORM_PART}", r"bn1.\1"),
    (r"res([2-5])\.(\d+)\.conv([123])\.weight", _stage(-1, r"layer{s}.\2.conv\3.weight")),
    (rf"res([2-5])\.(\d+)\.conv([123])\.norm\.{_NORM_PART}", _stage(-1, r"layer{s}.\2.bn\3.\4")),
    (r"res([2-5])\.(\d+)\.shortcut\.weight", _stage(-1, r"layer{s}.\2.downsample.0.weight")),
    (rf"res([2-5])\.(\d+)\.shortcut\.norm\.{_NORM_PART}", _stage(-1, r"layer{s}.\2.downsample.1.\3")),
)

_HF_LAYER = r"encoder\.stages\.(\d)\.layers\.(\d+)\."
_HUGGING_FACE = _substituted(
    (r"embedder\.embedder\.convolution\.weight", r"conv1.weight"),
    (rf"embedder\.embedder\.normalization\.{_NORM_PART}", r"bn1.\1"),
    (
        _HF_LAYER + r"layer\.(\d)\.convolution\.weight",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.conv{int(m[3]) + 1}.weight",
    ),
    (
        _HF_LAYER + rf"layer\.(\d)\.normalization\.{_NORM_PART}",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.bn{int(m[3]) + 1}.{m[4]}",
    ),
    (_HF_LAYER + r"shortcut\.convolution\.weight", _stage(1, r"layer{s}.\2.downsample.0.weight")),
    (_HF_LAYER + rf"shortcut\.normalization\.{_NORM_PART}", _stage(1, r"layer{s}.\2.downsample.1.\3")),
)

# nn.Sequential(*list(resnet.children())[:-1]): conv1, bn1, relu, maxpool, layer1..4 become 0, 1, 2, 3, 4..7.
_SEQUENTIAL = _substituted(
    (r"0\.weight", r"conv1.weight"),
    (rf"1\.{_NORM_PART}", r"bn1.\1"),
    (r"([4-7])\.(.+)", lambda m: _TORCHVISION(f"layer{int(m[1]) - 3}.{m[2]}") or ""),
)

# The same of a ResNet for CIFAR, which has no max-pooling: layer1 is at 2 or 3. It is recognised to be refused by name.
_SEQUENTIAL_CIFAR = _substituted(
    (r"0\.weight", r"conv1.weight"),
    (rf"1\.{_NORM_PART}", r"bn1.\1"),
    (r"([23])\.(.+)", lambda m: _TORCHVISION(f"layer1.{m[2]}") or ""),
)

_V2_BLOCK = r"net\.([1-4])\.blocks\.(\d+)\."
_SIMCLR_V2 = _substituted(
    (r"net\.0\.0\.weight", r"conv1.weight"),
    (rf"net\.0\.1\.0\.{_NORM_PART}", r"bn1.\1"),
    (_V2_BLOCK + r"net\.([024])\.weight", lambda m: f"layer{m[1]}.{m[2]}.conv{int(m[3]) // 2 + 1}.weight"),
    (
        _V2_BLOCK + rf"net\.([135])\.0\.{_NORM_PART}",
        lambda m: f"layer{m[1]}.{m[2]}.bn{int(m[3]) // 2 + 1}.{m[4]}",
    ),
    (_V2_BLOCK + r"net\.2\.(main_conv|mixing_conv)\..*", r"layer\1.\2.conv2.\3"),
    (_V2_BLOCK + r"projection\.shortcut\.weight", r"layer\1.\2.downsample.0.weight"),
    (_V2_BLOCK + rf"projection\.bn\.0\.{_NORM_PART}", r"layer\1.\2.downsample.1.\3"),
)

_HAIKU_PARTS = {
    "scale": "weight",
    "offset": "bias",
    "~/mean_ema/average": "running_mean",
    "~/var_ema/average": "running_var",
    "~/mean_ema/counter": "num_batches_tracked",
}
_HAIKU_PART = r"(scale|offset|~/mean_ema/average|~/var_ema/average)"
_HAIKU_BLOCK = r"block_group_([0-3])/~/block_(\d+)/~/"
_HAIKU = _substituted(
    (r"initial_conv(?:_1)?/w", r"conv1.weight"),
    (rf"initial_batchnorm(?:_1)?/{_HAIKU_PART}", lambda m: f"bn1.{_HAIKU_PARTS[m[1]]}"),
    (_HAIKU_BLOCK + r"conv_([0-2])/w", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.conv{int(m[3]) + 1}.weight"),
    (
        _HAIKU_BLOCK + rf"batchnorm_([0-2])/{_HAIKU_PART}",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.bn{int(m[3]) + 1}.{_HAIKU_PARTS[m[4]]}",
    ),
    (_HAIKU_BLOCK + r"shortcut_conv/w", _stage(1, r"layer{s}.\2.downsample.0.weight")),
    (
        _HAIKU_BLOCK + rf"shortcut_batchnorm/{_HAIKU_PART}",
        lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.1.{_HAIKU_PARTS[m[3]]}",
    ),
    (
        r".*(mean_ema|var_ema)/(hidden|counter|average)",
        lambda m: "counter.num_batches_tracked",  # the running estimate before bias correction, and its step count
    ),
)

_C2_BRANCH = {"2a": "conv1", "2b": "conv2", "2c": "conv3", "1": "downsample.0"}
_C2_NORM = {"2a": "bn1", "2b": "bn2", "2c": "bn3", "1": "downsample.1"}
_C2_PART = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
_CAFFE2 = _substituted(
    (r"conv1_w", r"conv1.weight"),
    (r"res_conv1_bn_(s|b|rm|riv)", lambda m: f"bn1.{_C2_PART[m[1]]}"),
    (
        r"res([2-5])_(\d+)_branch(2[abc]|1)_w",
        lambda m: f"layer{int(m[1]) - 1}.{m[2]}.{_C2_BRANCH[m[3]]}.weight",
    ),
    (
        r"res([2-5])_(\d+)_branch(2[abc]|1)_bn_(s|b|rm|riv)",
        lambda m: f"layer{int(m[1]) - 1}.{m[2]}.{_C2_NORM[m[3]]}.{_C2_PART[m[4]]}",
    ),
)


def _from_haiku(name: str, tensor: StoredTensor) -> StoredTensor:
    """Convolutions from (height, width, in, out); normalisation from (1, 1, 1, channels)."""
    if len(tensor.shape) != 4:
        return tensor
    return tensor.permuted(3, 2, 0, 1) if tensor.shape[:3] != (1, 1, 1) else tensor.reshaped(tensor.shape[3])


TORCHVISION = Scheme("torchvision", ("layer1.0.conv1.weight",), _TORCHVISION)
DETECTRON2 = Scheme(
    "Detectron2",
    ("res2.0.conv1.weight",),
    _DETECTRON2,
    part_prefixes=("roi_heads.", "roi_heads.box_head."),  # a C4 detector keeps res5 in its head
)
HUGGING_FACE = Scheme("Hugging Face", ("encoder.stages.0.layers.0.layer.0.convolution.weight",), _HUGGING_FACE)
SEQUENTIAL = Scheme("nn.Sequential", ("4.0.conv1.weight",), _SEQUENTIAL)
SEQUENTIAL_CIFAR = Scheme("nn.Sequential for CIFAR", ("2.0.conv1.weight", "3.0.conv1.weight"), _SEQUENTIAL_CIFAR)
SIMCLR_V2 = Scheme("SimCLRv2", ("net.1.blocks.0.net.0.weight",), _SIMCLR_V2)
HAIKU = Scheme("haiku", ("block_group_0/~/block_0/~/conv_0/w",), _HAIKU, _from_haiku, separator="/")
CAFFE2 = Scheme("Caffe2", ("res2_0_branch2a_w",), _CAFFE2, separator="/")

SCHEMES = (TORCHVISION, DETECTRON2, HUGGING_FACE, SEQUENTIAL, SEQUENTIAL_CIFAR, SIMCLR_V2, HAIKU, CAFFE2)


def to_detectron2(name: str) -> str:
    """Translate a canonical name to that of Detectron2's backbone, without the prefix that a detector adds."""
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"^conv1\.", "stem.conv1.", name)
    name = re.sub(r"^bn1\.", "stem.conv1.norm.", name)
    name = re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)
    return name.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")
