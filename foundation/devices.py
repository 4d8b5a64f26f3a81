"""GPUs, seen from the host: copies that wait for nothing, one that cannot be used, and memory that runs out."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from foundation.errors import UserError

if TYPE_CHECKING:
    import torch

DEVICES = Path("/dev")
# What the libraries below PyTorch say where memory runs out in them; its own allocator has an exception for it.
MEMORY_SIGNS = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


def send(values: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Host memory on the device, without waiting for the work that is queued there.

    From memory that is not pinned CUDA may wait until the copy's turn has come, so that the queue runs dry.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def is_usable() -> bool:
    """Whether PyTorch can compute on a GPU. Where there is one that it cannot use, a warning says why."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if usable or hidden or not any(DEVICES.glob("nvidia[0-9]*")):
        return usable
    if torch.version.cuda is None:
        reason = f"PyTorch {torch.__version__} is built without CUDA; install a build that has it"
    else:
        said = " ".join(str(caught[0].message).split()) if caught else "the driver does not answer; see nvidia-smi"
        reason = f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}, but: {said}"
    print(f"warning: the GPU of this machine cannot be used, the CPU computes. {reason}", file=sys.stderr)
    return False


@contextlib.contextmanager
def memory_named(advice: str) -> Iterator[None]:
    """Have a GPU's memory that runs out reported with what to do about it.

    Raises:
        UserError: in place of what PyTorch and CUDA's libraries raise.
    """
    import torch

    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in text for sign in MEMORY_SIGNS):
            raise
        said = text.splitlines()[0].partition(" Including")[0]  # the rest is about the allocator
        raise UserError(f"the GPU's memory does not suffice: {advice} ({said})") from error
