"""Devices: copies that do not block, GPUs that cannot be used, and GPU memory that runs out."""

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
# Messages of the libraries below PyTorch when their memory runs out; PyTorch's own allocator raises OutOfMemoryError.
MEMORY_SIGNS = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


def send(values: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Copy a tensor of the host to the device without blocking on the work that is queued there.

    The copy is made from pinned memory: from pageable memory CUDA may block until the queue has drained.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def is_usable() -> bool:
    """Whether PyTorch can compute on a GPU. If the machine has one that PyTorch cannot use, a warning says why."""
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
    print(f"warning: the GPU of this machine cannot be used; computing on the CPU. {reason}", file=sys.stderr)
    return False


@contextlib.contextmanager
def report_out_of_memory(advice: str) -> Iterator[None]:
    """Report GPU memory that runs out within the block as one line that ends with advice.

    Args:
        advice: which key to change.

    Raises:
        UserError: in place of the errors of PyTorch and of CUDA's libraries.
    """
    import torch

    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in text for sign in MEMORY_SIGNS):
            raise
        said = text.splitlines()[0].partition(" Including")[0]  # the rest is about the allocator
        raise UserError(f"the GPU is out of memory: {advice} ({said})") from error
