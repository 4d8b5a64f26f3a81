"""The input that an encoder expects: channel order, mean and standard deviation, and the place of the strides.

They are taken from the file if it says them, else from its family, else measured: BatchNorm's running mean after the
first convolution is that convolution applied to the mean training image, up to the padded border. The three channel
means that best explain the 64 running means (least squares) tell whether the images were normalised.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.architecture import Architecture
from convert.families import NO_NORMALISATION
from convert.reader import Source, read_values
from convert.selection import Selection
from convert.sidecar_files import read_sidecar, sidecar_path
from foundation.yaml_files import read_yaml

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LEVELS = 255.0
ASSUMED = "those of Detectron2's model zoo, as the file does not say"  # `origin` of a detector of unknown origin


@dataclass(frozen=True)
class Pixels:
    """The input of an encoder, in Detectron2's terms.

    Attributes:
        mean: of each channel in the order of `format`, in levels 0..255.
        std: likewise.
        format: `RGB` or `BGR`.
        stride_in_1x1: blocks that halve the resolution do so in their first 1x1 convolution, not in the 3x3 one.
        origin: how this is known.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    format: str = "RGB"
    stride_in_1x1: bool = False
    origin: str = "the family's statistics"


def _from_unit(mean: Any, std: Any, origin: str) -> Pixels:
    """From statistics of RGB images in [0, 1]."""
    return Pixels(
        tuple(round(float(value) * _LEVELS, 4) for value in mean),
        tuple(round(float(value) * _LEVELS, 4) for value in std),
        origin=origin,
    )


IMAGENET = _from_unit(IMAGENET_MEAN, IMAGENET_STD, "ImageNet's statistics, as the family uses them")
UNIT = _from_unit((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), NO_NORMALISATION)
CAFFE2 = Pixels((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "BGR", True, "the statistics of Caffe2's models")
# The ResNeXts of Detectron2's model zoo are not MSRA's: they have strides in the 3x3 convolutions and, in the case of
# X-101-32x8d, standard deviations (configs/*/*_X_101_32x8d_*.yaml, Misc/*_X_152_32x8d_*.yaml).
CAFFE2_RESNEXT = replace(CAFFE2, stride_in_1x1=False, origin="the statistics of Caffe2's ResNeXts")
CAFFE2_X101 = replace(CAFFE2_RESNEXT, std=(57.375, 57.12, 58.395))


def find_pixels(source: Source, selection: Selection) -> Pixels:
    """The input that the chosen encoder expects."""
    kind = selection.candidate.family.pixels
    if kind == "own":
        return _own(source)
    if (said := _of_sidecar(source)) is not None:
        return said
    if kind == "detectron2":
        return _of_run(source) or _detectron2(source, selection.architecture)
    if kind == "caffe2":
        return _caffe2(selection.architecture)
    if kind == "unit":
        return UNIT
    names = ("conv1.weight", "bn1.running_mean")
    means = estimate_input_means(*(read_values(source, selection.tensors[name]) for name in names))
    # Photographs in [0, 1] have means near 0.45, normalised ones near 0.
    if means is None or not all(0.2 < mean < 0.8 for mean in means):
        return IMAGENET
    measured = f"its first layer has seen input means of {', '.join(f'{mean:.2f}' for mean in means)}"
    if kind == "measured":
        return replace(UNIT, origin=f"{NO_NORMALISATION}: {measured}")
    # The family normalises; images brighter than ImageNet's give such means as well.
    return replace(IMAGENET, origin=f"{IMAGENET.origin}; but {measured}: check whether they were normalised")


def estimate_input_means(kernel: np.ndarray, running: np.ndarray) -> tuple[float, float, float] | None:
    """The mean of each input channel in training, from the first convolution and the BatchNorm after it.

    Args:
        kernel: weights of the convolution, (channels, 3, height, width).
        running: running means of the BatchNorm, (channels,).

    Returns:
        None if no three means explain the running means, as in a network whose statistics are not from images.
    """
    response = kernel.astype(np.float64).sum(axis=(2, 3))  # (channels, 3): what an evenly coloured image gives
    target = running.astype(np.float64)
    scale = float(np.square(target).sum())
    if scale == 0.0 or not np.isfinite(scale) or not np.isfinite(response).all():
        return None
    means = np.linalg.lstsq(response, target, rcond=None)[0]
    unexplained = float(np.square(response @ means - target).sum()) / scale
    return (float(means[0]), float(means[1]), float(means[2])) if unexplained < 0.2 else None


def _own(source: Source) -> Pixels:
    """The statistics in a file of this project."""
    config = source.content.get("config") if isinstance(source.content, dict) else None
    data = config.get("DATA") if isinstance(config, dict) else None
    mean, std = (data.get("MEAN"), data.get("STD")) if isinstance(data, dict) else ((), ())
    if source.metadata:
        mean, std = source.metadata.get("mean", "").split(","), source.metadata.get("std", "").split(",")
    found = _three(mean), _three(std)
    return _from_unit(*found, "the checkpoint's own statistics") if all(found) else IMAGENET  # an older file has none


def _three(values: Any) -> tuple[float, ...]:
    """Three finite numbers from a file, or none."""
    try:
        numbers = tuple(float(value) for value in values) if isinstance(values, (list, tuple)) else ()
    except (TypeError, ValueError):
        return ()
    return numbers if len(numbers) == 3 and all(map(math.isfinite, numbers)) else ()


def _of_sidecar(source: Source) -> Pixels | None:
    """What the converter has written beside its output."""
    sidecar = read_sidecar(source.path)
    fields = [sidecar.get(field) for field in ("pixel_mean", "pixel_std", "format", "stride_in_1x1")]
    return _checked(fields, sidecar_path(source.path))


def _of_run(source: Source) -> Pixels | None:
    """What the configuration of a detector's run says, beside its file or one folder above."""
    for folder in (source.path.parent, source.path.parent.parent):
        path = folder / "config.yaml"
        config = read_yaml(path) if path.is_file() else None
        keys = ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT", "MODEL.RESNETS.STRIDE_IN_1X1")
        for fields in ([_value_at(config, key) for key in keys], _of_lazy_config(config)):
            if (found := _checked(fields, path)) is not None:
                return found
    return None


def _of_lazy_config(config: Any) -> list[Any]:
    """The same fields of a `LazyConfig`. In C4 the ResNet is the backbone; basic blocks have no key for the strides."""
    model, backbone = _value_at(config, "model"), _value_at(config, "model.backbone")
    stages = _value_at(backbone, "bottom_up.stages") or _value_at(backbone, "stages")
    strides = stages.get("stride_in_1x1", False) if isinstance(stages, dict) else None
    return [*(_value_at(model, key) for key in ("pixel_mean", "pixel_std", "input_format")), strides]


def _value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _checked(fields: Sequence[Any], path: Path) -> Pixels | None:
    """Mean, deviation, format and place of the strides from a file, if it says all of them."""
    mean, std = map(_three, fields[:2])
    order, stride_in_1x1 = fields[2:]
    if not mean or not std or min(std) <= 0 or order not in ("RGB", "BGR") or not isinstance(stride_in_1x1, bool):
        return None
    return Pixels(mean, std, order, stride_in_1x1, f"{path.name} beside it")


def _detectron2(source: Source, architecture: Architecture) -> Pixels:
    """The statistics of a file without sidecar and config: converters of self-supervised weights ask Detectron2 to
    match names by their endings, its own files do not.
    """
    content = source.content
    if isinstance(content, Mapping) and content.get("matching_heuristics"):
        return replace(IMAGENET, origin="ImageNet's statistics, as converters to Detectron2 assume")
    return replace(_caffe2(architecture), origin=ASSUMED)


def _caffe2(architecture: Architecture) -> Pixels:
    """The statistics of Caffe2's networks, from which the detectors of Detectron2's model zoo began."""
    if architecture.groups == 1:
        return CAFFE2
    return CAFFE2_X101 if architecture.name == "resnext101_32x8d" else CAFFE2_RESNEXT
