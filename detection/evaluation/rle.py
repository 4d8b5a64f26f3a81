"""Masks as COCO's compressed run-length codes: the bytes that pycocotools' `encode` makes, for all of an image at once.

A code lists how long the mask stays at 0 and at 1 in turns, column by column. So the places where a mask changes from
a pixel to the one below are all that is needed. They are few, and found where the masks lie: of masks on a GPU only
these are fetched.
"""

from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_masks


def encode(masks: torch.Tensor) -> list[dict[str, Any]]:
    """A code for each mask: `size`, height and width, and `counts`, text.

    Args:
        masks: (N, H, W) bool, on any device.
    """
    count, height, width = masks.shape
    if count == 0:
        return []
    pixels = height * width
    places = _changes(masks).numpy()
    starts = np.searchsorted(places, np.arange(count + 1) * pixels)
    runs = [
        {"size": [height, width], "counts": np.diff(places[a:b] - first, prepend=0, append=pixels).tolist()}
        for first, a, b in zip(np.arange(count) * pixels, starts[:-1], starts[1:], strict=True)
    ]
    codes = coco_masks.frPyObjects(runs, height, width)
    return [{"size": code["size"], "counts": code["counts"].decode()} for code in codes]


def _changes(masks: torch.Tensor) -> torch.Tensor:
    """Where a pixel differs from the one before it, in ascending order, on the CPU.

    Pixels are numbered down the columns, from column to column and from mask to mask. Before the first of a mask there
    is a 0.
    """
    _, height, width = masks.shape
    changes = torch.empty_like(masks, memory_format=torch.contiguous_format)
    torch.bitwise_xor(masks[:, 1:], masks[:, :-1], out=changes[:, 1:])
    torch.bitwise_xor(masks[:, 0, 1:], masks[:, -1, :-1], out=changes[:, 0, 1:])
    changes[:, 0, 0] = masks[:, 0, 0]
    if changes.device.type == "cpu":  # where NumPy is four times as fast
        places = torch.from_numpy(np.flatnonzero(changes.numpy()))
    else:
        places = changes.flatten().nonzero().flatten().cpu()
    row, column = places // width % height, places % width
    columns = places // (height * width) * width + column
    return (columns * height + row).sort().values
