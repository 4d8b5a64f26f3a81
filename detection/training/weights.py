"""Weights into a detector, all of them or none.

Detectron2's own loader matches names by their endings and logs what it could not place; the detector then
trains from random weights, and the result looks a little low. Here every tensor of the backbone must come
from the file, by its exact name and in its exact shape, or nothing is loaded.

A file is what `convert/to_d2.py` writes (names like `stem.conv1.weight`, `res2.0.conv1.norm.running_mean`),
or a checkpoint of a whole detector (names like `backbone.res2...`).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from fvcore.common.config import CfgNode
from torch import nn

from convert.reader import load_tensors, read_checkpoint
from convert.sidecar_files import read_sidecar, sidecar_path
from detection.training import checkpoints
from foundation.errors import UserError
from foundation.files import digest_file

# Where a detector keeps the stages of a converted ResNet: FPN, C4's trunk, C4's head.
PLACES = ("backbone.bottom_up.", "backbone.", "roi_heads.")
STAGES = ("stem.", "res2.", "res3.", "res4.", "res5.")
EXTRA_NORM = "roi_heads.res5.norm."  # see roi_heads.py; it starts at its initial values


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
    """Fill every tensor of the backbone (and of res5, where that is the head) from the file.

    Returns the names in the file that have no place in this detector, such as a classifier's.

    Raises:
        UserError: a tensor is missing, has another shape or is not finite, or the file has more blocks than
            the model; the model is then unchanged.
    """
    tensors = read_weights(path)
    if any(name.startswith(PLACES) for name in tensors):  # a whole detector; its heads do not count
        tensors = dict(_short_names(tensors))
    state = model.state_dict()
    wanted = dict(_wanted(state))
    problems = _problems({short: state[key] for short, key in wanted.items()}, tensors)
    present = {short.partition(".")[0] for short in wanted}
    left = [name for name in tensors if name not in wanted and not name.endswith("num_batches_tracked")]
    problems += [f"{name} (no such layer in the model)" for name in left if name.partition(".")[0] in present]
    _refuse(problems, path, len(wanted), "of the backbone")
    with torch.no_grad():
        for short, key in wanted.items():
            state[key].copy_(tensors[short])
    return left


def load_detector(model: nn.Module, path: Path) -> None:
    """Fill every tensor of a whole detector from a checkpoint.

    Raises:
        UserError: a tensor is missing or has another shape; the model is then unchanged.
    """
    tensors = read_weights(path)
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    _refuse(_problems(state, tensors), path, len(state), "of the detector")
    with torch.no_grad():
        for key, value in state.items():
            value.copy_(tensors[key])


def check_sidecar(path: Path, config: CfgNode) -> dict[str, Any]:
    """Compare the converter's sidecar with the config: a network sees other images than it was trained on if the
    colour order, the pixel statistics, the place of the strides or the depth differ. Returns the sidecar.

    Raises:
        UserError: they differ.
    """
    sidecar = read_sidecar(path)
    for field, key, value in (
        ("format", "INPUT.FORMAT", config.INPUT.FORMAT),
        ("pixel_mean", "MODEL.PIXEL_MEAN", config.MODEL.PIXEL_MEAN),
        ("pixel_std", "MODEL.PIXEL_STD", config.MODEL.PIXEL_STD),
        ("stride_in_1x1", "MODEL.RESNETS.STRIDE_IN_1X1", config.MODEL.RESNETS.STRIDE_IN_1X1),
        ("depth", "MODEL.RESNETS.DEPTH", config.MODEL.RESNETS.DEPTH),
    ):
        if field in sidecar and not _same(sidecar[field], value):
            raise UserError(
                f"{sidecar_path(path)} says that {path.name} needs {key} {sidecar[field]}, but the config"
                f" has {value}; set {key} accordingly"
            )
    return sidecar


def _same(noted: Any, configured: Any) -> bool:
    if isinstance(configured, list):
        return (
            isinstance(noted, list)
            and len(noted) == len(configured)
            and numpy.allclose(noted, configured, rtol=0.0, atol=0.01)  # 0.01 of 255 levels
        )
    return bool(noted == configured)


def _wanted(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    """(name in a converted file, name in the detector) of each tensor that the file must hold."""
    for short, key in _short_names({name: name for name in names}):
        if not key.startswith(EXTRA_NORM) and not key.endswith("num_batches_tracked"):
            yield short, key


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


def _refuse(problems: list[str], path: Path, total: int, whole: str) -> None:
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{path} does not fit the {total} tensors {whole}: {', '.join(problems[:3])}{more};"
            " see that MODEL.RESNETS.DEPTH and the rest of the config are those of the file"
        )
