"""Encoders for the other packages of this project, in memory: from any file that `to_d2` takes, with the same checks.

encoder = read_encoder(Path("moco_v2_800ep_pretrain.pth.tar"))
network.load_state_dict(encoder.tensors)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from convert.export import Float32Arrays, refuse_other_networks
from convert.naming import to_detectron2
from convert.pixels import find_pixels
from convert.reader import checkpoint_in, read_checkpoint
from convert.selection import select
from convert.sidecar import describe

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Encoder:
    """An encoder in memory.

    Attributes:
        tensors: float32, finite, exactly those of its architecture, by name.
        sidecar: what is known of it; `convert.sidecar` lists the fields.
    """

    tensors: "dict[str, torch.Tensor]"
    sidecar: dict[str, Any]


def read_encoder(
    path: Path, *, naming: Literal["torchvision", "detectron2"] = "torchvision", branch: str | None = None
) -> Encoder:
    """Read and convert an encoder.

    Args:
        path: any file that `convert/to_d2.py` takes, or the folder of a run.
        naming: `torchvision` gives the state dict of torchvision's network without `fc` (this project's CIFAR stem
            included); `detectron2` the short names that `to_d2` writes, such as `res2.0.conv1.weight`.
        branch: which encoder of the file, as `to_d2 --list` names it.

    Raises:
        UserError: what `to_d2` would say; or, for torchvision's names, a network that torchvision does not have.
    """
    import torch

    source = read_checkpoint(checkpoint_in(path))
    selection = select(source, branch, cifar_stem=naming == "torchvision")
    pixels = find_pixels(source, selection)
    if naming == "torchvision":
        refuse_other_networks(selection, pixels, "safetensors")
    arrays = Float32Arrays(selection.tensors, source)
    tensors = {}
    for name in arrays:
        tensor = torch.from_numpy(np.array(arrays[name]))
        if naming == "detectron2":
            tensors[to_detectron2(name)] = tensor
            continue
        tensors[name] = tensor
        if name.endswith("running_var"):
            tensors[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    return Encoder(tensors, describe(source, selection, pixels))
