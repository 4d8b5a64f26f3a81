"""Weights into a detector, all of them or none.

Detectron2's own loader matches names by their endings and logs what it could not place; the detector then trains from
random weights, and the result looks a little low. Here every tensor of the backbone must come from the file, by its
exact name and in its exact shape, or nothing is loaded.

A file is what `convert/to_d2.py` writes (names like `stem.conv1.weight`, `res2.0.conv1.norm.running_mean`), or a
checkpoint of a whole detector (names like `backbone.res2...`), which the converter describes. Every other file that
`to_d2` takes, and the folder of a pretraining run, is converted on the way, with the same checks.
"""

import functools
import logging
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from fvcore.common.config import CfgNode
from torch import nn

from convert.encoders import read_encoder
from convert.pixels import ASSUMED
from convert.reader import load_tensors, read_checkpoint
from convert.sidecar_files import read_sidecar, sidecar_path
from detection.training import checkpoints
from foundation.config import value_of
from foundation.errors import UserError
from foundation.files import digest_file

# Where a detector keeps the stages of a converted ResNet: FPN, C4's trunk, C4's head.
PLACES = ("backbone.bottom_up.", "backbone.", "roi_heads.")
STAGES = ("stem.", "res2.", "res3.", "res4.", "res5.")
EXTRA_NORM = "roi_heads.res5.norm."  # see roi_heads.py; it starts at its initial values
# What the converter knows of an encoder, and the config keys that must agree with it: a network sees other images than
# it was trained on if colour order, pixel statistics or the place of the strides differ.
FIELDS = {
    "format": "INPUT.FORMAT",
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
    "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
    "depth": "MODEL.RESNETS.DEPTH",
}
RESNETS = "resnets"  # field with further keys of MODEL.RESNETS, by their names there
ADOPTED = (
    *FIELDS.values(),
    *(f"MODEL.RESNETS.{name}" for name in ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "NUM_GROUPS", "WIDTH_PER_GROUP")),
)
BESIDE = "put the config.yaml of its run beside the file"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InitialWeights:
    """Weights to start a training from.

    Attributes:
        tensors: by Detectron2's names.
        sidecar: what is known of them (`convert.sidecar`); empty where nothing is.
    """

    tensors: dict[str, torch.Tensor]
    sidecar: dict[str, Any]


def read_initial(path: Path) -> InitialWeights:
    """Read weights to start from: those of a detector, converted ones, or any that `to_d2` takes, converted on the way.

    Args:
        path: a file, or the folder of a run of pretraining or detection.

    Raises:
        UserError: it cannot be read, or cannot be converted; the message says how the converter is told more.
    """
    if path.is_dir() and checkpoints.exists(path):
        path = checkpoints.newest_intact(path) or path
    if not path.exists():
        raise UserError(f"{path}: there is no such file of weights")
    status = path.stat()
    return _read_initial(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)  # they are checked before a run, and loaded in it
def _read_initial(path: Path, modified: int, size: int) -> InitialWeights:
    if path.is_file():
        source = read_checkpoint(path)
        table = source.content.get("model", source.content) if isinstance(source.content, dict) else {}
        names = table if isinstance(table, Mapping) else {}
        if any(str(name).startswith("res2.") for name in names):
            return InitialWeights(read_weights(path), read_sidecar(path))
        if any(_short_names(names)):
            return InitialWeights(read_weights(path), read_sidecar(path) or _describe_detector(path))
    try:
        encoder = read_encoder(path, naming="detectron2")
    except UserError as error:
        raise UserError(
            f"{error}; if the converter needs to be told more, run python convert/to_d2.py {path} weights.pkl, with the"
            " options that --help lists, and start from weights.pkl"
        ) from error
    about = {key: encoder.sidecar.get(key) for key in ("family", "branch", "architecture", "source")}
    logger.info("%s is converted on the way: %s", path, ", ".join(f"{key} {value}" for key, value in about.items()))
    for warning in encoder.sidecar.get("warnings", ()):
        logger.warning("%s: %s", path, warning)
    return InitialWeights(encoder.tensors, encoder.sidecar)


def _describe_detector(path: Path) -> dict[str, Any]:
    """What the converter knows of the backbone of a detector: by the config.yaml of its run, else what it assumes.
    Empty, with a warning, where it cannot read the backbone, such as one with other norms.
    """
    try:
        sidecar = read_encoder(path, naming="detectron2").sidecar
    except UserError as error:
        logger.warning("colour order and pixel statistics of the weights are not known: %s", error)
        return {}
    del sidecar["trained_by"]  # it is "Detectron2"; results name these weights by their file
    return sidecar


def describe(path: Path) -> dict[str, Any]:
    """What is known of weights; empty where nothing is, or the file is gone.

    Raises:
        UserError: it cannot be read or converted.
    """
    if not path.exists():
        return {}
    return (read_sidecar(path) if path.is_file() else {}) or read_initial(path).sidecar


def adopt(config: CfgNode, sidecar: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """Set the keys of the config that follow from the weights, in place.

    Args:
        config: of the run.
        sidecar: of the weights.
        given: keys that the user has set: they stay, and are refused later if they disagree.

    Returns:
        A line for each key that has changed.
    """
    lines = []
    for key, value in _expected(sidecar).items():
        if key not in given and not _same(value, value_of(config, key)):
            lines.append(f"{key} {value}, which the weights were trained with, instead of {value_of(config, key)}")
            config.merge_from_list([key, value])
    if lines and sidecar.get("pixel_origin") == ASSUMED:
        lines.append(f"colour order, pixel statistics and strides are {ASSUMED}; if they are others, {BESIDE}")
    return lines


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pkl` in Detectron2's format, or of a checkpoint (`.pth`), by name. No code is run.

    Raises:
        UserError: there is no such file, it cannot be read, is not as it was saved, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of weights")
    if path.suffix == ".pth" and digest_file(path).is_file() and (problem := checkpoints.damage(path)):
        raise UserError(f"{path} cannot be read as weights: {problem}")
    source = read_checkpoint(path)
    if not isinstance(source.content, dict) or (path.suffix == ".pkl" and "model" not in source.content):
        raise UserError(f"{path} is not in Detectron2's format (no entry 'model'); make it with convert/to_d2.py")
    return load_tensors(source, source.content.get("model", source.content))


def load_backbone(model: nn.Module, path: Path) -> list[str]:
    """Fill every tensor of the backbone (and of res5, where that is the head) from a file or run folder.

    Returns the names in the file that this detector does not use, such as a classifier's.

    Raises:
        UserError: it cannot be read or converted; or a tensor is missing, has another shape or is not finite, or the
            file has more blocks than the model. The model is then unchanged.
    """
    tensors = read_initial(path).tensors
    if any(name.startswith(PLACES) for name in tensors):  # a whole detector; its heads do not count
        tensors = dict(_short_names(tensors))
    state = model.state_dict()
    wanted = dict(backbone_names(state))
    problems = _problems({short: state[key] for short, key in wanted.items()}, tensors)
    present = {short.partition(".")[0] for short in wanted}
    left = [name for name in tensors if name not in wanted and not name.endswith("num_batches_tracked")]
    problems += [f"{name} (no such layer in the model)" for name in left if name.partition(".")[0] in present]
    advice = "see that MODEL.RESNETS.DEPTH and the rest of the config are those of the file"
    _refuse(problems, path, f"{len(wanted)} tensors of the backbone", advice)
    with torch.no_grad():
        for short, key in wanted.items():
            state[key].copy_(tensors[short])
    return left


def backbone_names(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    """(name in a converted file, name in the detector) of each tensor that the file must hold."""
    for short, key in _short_names({name: name for name in names}):
        if not key.startswith(EXTRA_NORM) and not key.endswith("num_batches_tracked"):
            yield short, key


def load_detector(model: nn.Module, path: Path) -> None:
    """Fill every tensor of a whole detector from a checkpoint.

    Raises:
        UserError: a tensor is missing or has another shape; the model is then unchanged.
    """
    tensors = read_weights(path)
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    advice = "give the config.yaml of the run that the file is from: classes, architecture and depth must be the same"
    _refuse(_problems(state, tensors), path, f"{len(state)} tensors of the detector", advice)
    with torch.no_grad():
        for key, value in state.items():
            value.copy_(tensors[key])


def check_sidecar(path: Path, config: CfgNode, whole: bool = False) -> dict[str, Any]:
    """Compare what is known of weights with the config; returns it.

    Args:
        path: of the weights.
        config: of the run.
        whole: a detector is evaluated, whose config this is: what the converter only assumes of it does not count.

    Raises:
        UserError: they differ.
    """
    sidecar = describe(path)
    assumed = sidecar.get("pixel_origin") == ASSUMED
    if whole and assumed:
        return sidecar
    for key, value in _expected(sidecar).items():
        if not _same(value, value_of(config, key)):
            where = f"{sidecar_path(path)} says that {path.name}" if sidecar_path(path).is_file() else str(path)
            raise UserError(
                f"{where} needs {key} {value}, but the config has {value_of(config, key)}; "
                f"set {key} {shlex.quote(str(value))}" + (f" or, if that is wrong, {BESIDE}" if assumed else "")
            )
    return sidecar


def _expected(sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """By config key, the value that weights need."""
    further = {f"MODEL.RESNETS.{name}": value for name, value in (sidecar.get(RESNETS) or {}).items()}
    return {key: sidecar[field] for field, key in FIELDS.items() if field in sidecar} | further


def _same(noted: Any, configured: Any) -> bool:
    if isinstance(configured, list):
        return (
            isinstance(noted, list)
            and len(noted) == len(configured)
            and numpy.allclose(noted, configured, rtol=0.0, atol=0.01)  # 0.01 of 255 levels
        )
    return bool(noted == configured)


def _short_names(tensors: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in tensors.items():
        for place in PLACES:
            short = name.removeprefix(place)
            if short != name and short.startswith(STAGES):
                yield short, value
                break


def _problems(wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    problems = []
    for name, tensor in wanted.items():
        if name not in given:
            problems.append(f"{name} (missing)")
        elif given[name].shape != tensor.shape:
            problems.append(f"{name} ({tuple(given[name].shape)} instead of {tuple(tensor.shape)})")
        elif not torch.isfinite(given[name]).all():
            problems.append(f"{name} (not finite)")
    return problems


def _refuse(problems: list[str], path: Path, wanted: str, advice: str) -> None:
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path} does not fit the {wanted}: {', '.join(problems[:3])}{more}; {advice}")
