"""The encoder under evaluation: its weights from whatever file holds them, and what the file says about them."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from convert.architecture import TORCHVISION_NAMES
from convert.encoders import read_encoder
from convert.reader import Source, checkpoint_in, load_tensors, read_checkpoint
from convert.sidecar import unfinished
from foundation.config import RUN_CONFIG
from foundation.errors import UserError
from foundation.run_kinds import flatten, read_config
from pretrain.encoder import build_encoder
from pretrain.runs import checkpoint

logger = logging.getLogger("pretrain")
RANDOM = "random"
UNKNOWN = "unknown"  # what trained it, where a file does not say
USUAL_SIDE = 224  # pixels of the views of public encoders
IMAGENET_MEAN = [0.485, 0.456, 0.406]  # RGB, of values in [0, 1]
IMAGENET_STD = [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class EncoderWeights:
    """An encoder's tensors in torchvision's naming, and its properties; those that are not known are empty."""

    source: str  # file, folder, or `random`
    init: str  # what trained it (`corinfomax`; `corinfomax, fine-tuned`; `supervised`; `torchvision`), or `random`
    tensors: dict[str, Tensor] = field(default_factory=dict)
    name: str = ""  # of `pretrain.encoder.ENCODERS`
    stem: str = ""
    mean: list[float] = field(default_factory=list)  # pixel statistics it was trained with
    std: list[float] = field(default_factory=list)

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the pixels; ImageNet's where those of its training are not known."""
        return self.mean or IMAGENET_MEAN, self.std or IMAGENET_STD


def read_weights(source: str) -> EncoderWeights:
    """Read an encoder's weights.

    Args:
        source: a checkpoint of this project, an `encoder.safetensors`, a run folder, any other file that
            `convert/to_d2.py` takes, or `random` for none.

    Raises:
        UserError: not there, damaged, or without an encoder.
    """
    if source == RANDOM:
        return EncoderWeights(source, RANDOM)
    if not Path(source).exists():
        raise UserError(f"the weights {source} do not exist; check --weights")
    file = read_checkpoint(checkpoint_in(Path(source)))
    if file.metadata.get("format") == "corinfomax-encoder":
        return _from_encoder_file(file)
    if isinstance(file.content, dict) and file.content.get("format") in checkpoint.FORMATS:
        if warning := unfinished(file):
            logger.warning("%s: %s", file.path, warning)
        return _from_checkpoint(file.path)
    return _from_other_projects(file.path)


def _from_encoder_file(file: Source) -> EncoderWeights:
    about = file.metadata
    try:
        statistics = {
            key: [float(value) for value in about[key].split(",")] for key in ("mean", "std") if about.get(key)
        }
    except ValueError as error:
        raise UserError(f"{file.path} holds damaged pixel statistics: {error}") from error
    return EncoderWeights(
        source=str(file.path),
        init=about.get("objective", UNKNOWN),
        tensors=load_tensors(file, file.content),
        name=about.get("architecture", ""),
        stem=about.get("stem", ""),
        **statistics,
    )


def _from_checkpoint(path: Path) -> EncoderWeights:
    state = checkpoint.load(path)
    try:
        return _from_state(path, state)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is an incomplete checkpoint ({error}); check --weights") from error


def _from_state(path: Path, state: dict[str, Any]) -> EncoderWeights:
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


def _from_other_projects(path: Path) -> EncoderWeights:
    """Weights of torchvision or another project, by the converter and with its checks."""
    encoder = read_encoder(path)
    about = encoder.sidecar
    return EncoderWeights(
        source=str(path),
        init="torchvision" if about["trained_by"] == "torchvision names, flat" else about["trained_by"],
        tensors=encoder.tensors,
        name=about["architecture"],
        stem=about["stem"],
        mean=[round(value / 255, 6) for value in about["pixel_mean"]],
        std=[round(value / 255, 6) for value in about["pixel_std"]],
    )


def trained_side(source: str) -> int:
    """The DATA.IMAGE_SIZE of the run that weights lie in, `USUAL_SIDE` where they lie in none. See `read_weights`."""
    path = Path(source)
    for folder in (path, path.parent, path.parent.parent):
        if path.exists() and (folder / RUN_CONFIG).is_file():
            side = flatten(read_config(folder)).get("DATA.IMAGE_SIZE")
            return side if isinstance(side, int) else USUAL_SIDE
    return USUAL_SIDE


def resolve(config: CfgNode, weights: EncoderWeights) -> CfgNode:
    """The configuration with its open values (architecture, pixel statistics) taken from the weights.

    Raises:
        UserError: configuration and weights disagree, or neither says.
    """
    resolved = config.clone()
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
        resolved[group][key] = asked or own or fallback
    if not resolved.ENCODER.NAME:
        raise UserError(f"{weights.source} does not say which encoder it holds; set ENCODER.NAME")
    return resolved


def build_from(weights: EncoderWeights, name: str, stem: str, zero_init_residual: bool = False) -> nn.Module:
    """The encoder with its weights, or as `build_encoder` initialises it.

    Raises:
        UserError: torchvision has no such network, or the weights do not fit.
    """
    if name not in TORCHVISION_NAMES:
        raise UserError(
            f"{weights.source} holds a {name}, which is none of torchvision's networks: it can be converted for "
            "Detectron2 by convert/to_d2.py, but not evaluated or trained here"
        )
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
) -> Path:
    """Write a finished encoder to `encoder.safetensors` in the run folder, in torchvision's naming. Returns the file.

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
    path = run / "encoder.safetensors"
    checkpoint.export_encoder(path, encoder, metadata)
    return path


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names and contents of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
