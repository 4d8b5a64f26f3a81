"""Write a chosen encoder, with its sidecar, in one of the formats that other libraries load."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.architecture import TORCHVISION_NAMES
from convert.naming import to_detectron2
from convert.pixels import Pixels
from convert.reader import Source, read_values
from convert.selection import Selection
from convert.sidecar import encode
from convert.sidecar_files import sidecar_path
from convert.tensors import StoredTensor
from convert.writer import Digesting, write_detectron2, write_safetensors, write_together
from foundation.errors import UserError

SUFFIXES = {
    "d2": (".pkl",),  # Detectron2 goes by the suffix
    "torchvision": (".pth", ".pt", ".safetensors"),
    "timm": (".pth", ".pt", ".safetensors"),
    "safetensors": (".safetensors",),
}


class Float32Arrays(Mapping[str, np.ndarray]):
    """Tensors as finite float32 arrays, read on access, so that only one is in memory at a time."""

    def __init__(self, tensors: Mapping[str, StoredTensor], source: Source) -> None:
        self._tensors = tensors
        self._source = source

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> np.ndarray:
        array = read_values(self._source, self._tensors[name])
        where = f"{self._source.path}: {name}"
        if array.dtype.kind != "f":
            raise UserError(f"{where} holds {array.dtype} values; quantised networks cannot be converted")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
            array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise UserError(f"{where} holds NaN or infinite values; the training diverged, or the file is damaged")
        if name.endswith("running_var") and (array < 0).any():
            raise UserError(f"{where} holds negative variances; the file is damaged")
        return array


def export(
    source: Source,
    output: Path,
    target: str,
    selection: Selection,
    pixels: Pixels,
    sidecar: dict[str, Any],
    verify: bool = False,
) -> list[str]:
    """Write the weights and their sidecar, both or none.

    Args:
        source: the file that the selection is from.
        output: file of the weights; the sidecar is beside it.
        target: a key of `SUFFIXES`.
        selection: what to write.
        pixels: what it expects of its input.
        sidecar: from `convert.sidecar.describe`; gets the digest of what is written.
        verify: compare with Detectron2's network before the file takes its name.

    Returns:
        The lines that the verification printed.

    Raises:
        UserError: values that are not finite, a failed verification, or a file that cannot be written.
    """
    if target != "d2":
        refuse_other_networks(selection, pixels, target)
    arrays = Float32Arrays(selection.tensors, source)
    lines: list[str] = []

    def check(aside: Mapping[Path, Path]) -> None:
        if verify:
            from convert.verify import verify as compare

            lines.extend(compare(aside[output], arrays, selection.architecture, pixels))

    def write_weights(file: Digesting) -> None:
        if target == "d2":
            renamed = {to_detectron2(name): tensor for name, tensor in selection.tensors.items()}
            write_detectron2(file, Float32Arrays(renamed, source), f"corinfomax convert: {sidecar['family']}")
        elif output.suffix == ".safetensors":
            write_safetensors(file, arrays, _encoder_metadata(pixels, sidecar))
        else:
            _write_torch(file, arrays)

        sidecar["weights_sha256"] = file.digest()

    def write_sidecar(file: Digesting) -> None:
        file.write(encode(sidecar))

    write_together({output: write_weights, sidecar_path(output): write_sidecar}, check)
    return lines


def refuse_other_networks(selection: Selection, pixels: Pixels, target: str) -> None:
    """Refuse what only Detectron2's ResNet can be configured for; torchvision's and timm's are fixed.

    Raises:
        UserError: BGR images, strides in the 1x1 convolutions, a CIFAR stem, or a width without a name.
    """
    if pixels.stride_in_1x1 or pixels.format != "RGB":
        raise UserError(
            f"{target} has no such network: this encoder takes {pixels.format} images, with its strides in "
            f"the {'1x1' if pixels.stride_in_1x1 else '3x3'} convolutions ({pixels.origin}); if that is wrong, "
            "put the detector's config.yaml beside the file"
        )
    if target != "safetensors" and selection.architecture.kernel != 7:
        raise UserError(f"{target} has no network with a CIFAR stem; safetensors can hold it")
    if target != "safetensors" and selection.architecture.name not in TORCHVISION_NAMES:
        raise UserError(f"{target} has no network called {selection.architecture.name}; d2 and safetensors can hold it")


def _encoder_metadata(pixels: Pixels, sidecar: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of this project's `encoder.safetensors`; statistics are for images in [0, 1]."""
    return {
        "format": "corinfomax-encoder",
        "objective": sidecar["trained_by"],
        **({"begun_from": sidecar["begun_from"]} if sidecar["begun_from"] else {}),
        "architecture": sidecar["architecture"],
        "stem": sidecar["stem"],
        "mean": ",".join(f"{value / 255:.6g}" for value in pixels.mean),
        "std": ",".join(f"{value / 255:.6g}" for value in pixels.std),
    }


def _write_torch(file: Digesting, arrays: Mapping[str, np.ndarray]) -> None:
    """A flat state dict without classifier, for torchvision's and timm's networks."""
    import torch

    # Into memory first: PyTorch puts a file's name into its archive, and the bytes must not depend on that.
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(np.array(arrays[name])) for name in sorted(arrays)}, buffer)
    file.write(buffer.getbuffer())
