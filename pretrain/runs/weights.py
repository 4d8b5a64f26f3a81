"""The encoder under evaluation: its weights from whatever file holds them, and what the file says about them."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from foundation.errors import UserError
from pretrain.encoder import build_encoder
from pretrain.runs import checkpoint

logger = logging.getLogger("pretrain")
RANDOM = "random"
UNKNOWN = "unknown"  # what trained it, where a file does not say
IMAGENET_MEAN = [0.485, 0.456, 0.406]  # RGB, of values in [0, 1]
IMAGENET_STD = [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class EncoderWeights:
    """An encoder's tensors in torchvision's naming, and what is known of it; empty where it is not."""

    source: str  # file, folder, or `random`
    init: str  # what trained it (`corinfomax`; `corinfomax, fine-tuned`; `supervised`; `torchvision`), or `random`
    tensors: dict[str, Tensor] = field(default_factory=dict)
    name: str = ""  # of `pretrain.encoder.ENCODERS`
    stem: str = ""
    mean: list[float] = field(default_factory=list)  # pixel statistics it was trained with
    std: list[float] = field(default_factory=list)


def read_weights(source: str) -> EncoderWeights:
    """Read an encoder's weights.

    Args:
        source: a checkpoint of this project, an `encoder.safetensors`, a run directory, torchvision's own weights
            (`*.pth`), or `random` for none.

    Raises:
        UserError: not there, damaged, or without an encoder.
    """
    if source == RANDOM:
        return EncoderWeights(source, RANDOM)
    path = Path(source)
    if path.is_dir():
        candidates = [path / "encoder.safetensors", path / "checkpoints" / "last.pt"]
        present = [candidate for candidate in candidates if candidate.is_file()]
        if not present:
            raise UserError(f"{path} holds no encoder.safetensors and no checkpoints/last.pt; check --weights")
        path = present[0]
    if not path.is_file():
        raise UserError(f"the weights {path} do not exist; check --weights (or use `--weights random`)")
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    return _from_torchvision(path) if path.suffix == ".pth" else _from_checkpoint(path)


def _from_safetensors(path: Path) -> EncoderWeights:
    tensors = checkpoint.load_encoder(path)
    with safetensors.safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
    statistics = {key: [float(value) for value in about[key].split(",")] for key in ("mean", "std") if about.get(key)}
    return EncoderWeights(
        source=str(path),
        init=about.get("objective", UNKNOWN),
        tensors=tensors,
        name=about.get("architecture", ""),
        stem=about.get("stem", ""),
        **statistics,
    )


def _from_checkpoint(path: Path) -> EncoderWeights:
    state = checkpoint.load(path)
    prefix = "encoder."
    tensors = {name.removeprefix(prefix): t for name, t in state["model"].items() if name.startswith(prefix)}
    if not tensors:
        raise UserError(f"{path} holds no encoder, only heads for one; check --weights")
    config = state["config"]
    return EncoderWeights(
        source=str(path),
        init=config["OBJECTIVE"]["NAME"] if "OBJECTIVE" in config else state.get("trained_by", UNKNOWN),
        tensors=tensors,
        name=config["ENCODER"]["NAME"],
        stem=config["ENCODER"]["STEM"],
        mean=list(config["DATA"]["MEAN"]),
        std=list(config["DATA"]["STD"]),
    )


def _from_torchvision(path: Path) -> EncoderWeights:
    """A plain state dict in torchvision's naming, with or without its classifier: a supervised encoder, say."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for files that are no checkpoints
        raise UserError(f"{path} is not a file of weights: {(str(error) or repr(error)).splitlines()[0]}") from error
    if not isinstance(tensors, dict) or "conv1.weight" not in tensors:
        raise UserError(f"{path} does not hold torchvision's names (conv1.weight, ...) at its top level")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    return EncoderWeights(str(path), "torchvision", kept, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def settle(config: CfgNode, weights: EncoderWeights) -> CfgNode:
    """The configuration with its open values (architecture, pixel statistics) taken from the weights.

    Raises:
        UserError: configuration and weights disagree, or neither says.
    """
    settled = config.clone()
    for group, key, own, fallback in (
        ("ENCODER", "NAME", weights.name, ""),
        ("ENCODER", "STEM", weights.stem, "imagenet"),
        ("DATA", "MEAN", weights.mean, IMAGENET_MEAN),
        ("DATA", "STD", weights.std, IMAGENET_STD),
    ):
        asked = config[group][key]
        if asked and own and asked != own:
            raise UserError(
                f"{weights.source} was trained with {group}.{key} {own!r}, but the config says {asked!r}; "
                "choose the config that fits the weights, or change the key"
            )
        settled[group][key] = asked or own or fallback
    if not settled.ENCODER.NAME:
        raise UserError(f"{weights.source} does not say which encoder it holds; set ENCODER.NAME")
    return settled


def build_from(weights: EncoderWeights, name: str, stem: str, zero_init_residual: bool = False) -> nn.Module:
    """The encoder with its weights, or as `build_encoder` initialises it. Raises UserError where they do not fit."""
    encoder = build_encoder(name, stem, zero_init_residual)
    if weights.tensors:
        checkpoint.fill(encoder, weights.tensors, Path(weights.source))
    return encoder


def write_encoder(
    run: Path,
    encoder: nn.Module,
    *,
    objective: str,
    name: str,
    stem: str,
    mean: Sequence[float],
    std: Sequence[float],
    begun_from: str = "",
) -> None:
    """Write a finished encoder for everyone: `encoder.safetensors` in the run directory, in torchvision's naming.

    Args:
        objective: that trained it.
        name, stem: its architecture.
        mean, std: pixel statistics it was trained with.
        begun_from: the weights that its training began from; empty: it began from random weights.
    """
    metadata = {
        "objective": objective,
        "architecture": name,
        "stem": stem,
        "mean": ",".join(map(str, mean)),
        "std": ",".join(map(str, std)),
        **({"begun_from": begun_from} if begun_from else {}),
    }
    checkpoint.export_encoder(run / "encoder.safetensors", encoder, metadata)
    logger.info("the encoder is in %s", run / "encoder.safetensors")


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names and contents of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
