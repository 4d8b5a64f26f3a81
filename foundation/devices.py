"""Devices: copies that do not block, GPUs that cannot be used, and memory that runs out."""

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
GPU, HOST = "the GPU", "this machine"
# Messages of the libraries below PyTorch when their memory runs out; PyTorch's own allocator raises OutOfMemoryError.
GPU_SIGNS = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
HOST_SIGN = "DefaultCPUAllocator: "  # in a message of PyTorch whenever the host has no memory for a tensor


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the GPU or of the host has run out."""
    return bool(_who_is_out_of_memory(error))


@contextlib.contextmanager
def report_out_of_memory(advice: str, on_host: str = "") -> Iterator[None]:
    """Report memory that runs out within the block as one line that ends with advice.

    Args:
        advice: which key to change.
        on_host: the same where it is the host's memory; empty: as for the GPU's.

    Raises:
        UserError: in place of the errors of PyTorch, of CUDA's libraries and of NumPy.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        who = _who_is_out_of_memory(error)
        if not who:
            raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        said = said.partition(" Including")[0]  # the rest is about the allocator
        said = said[max(0, said.find(HOST_SIGN)) :]  # what comes before it is a place in PyTorch's source
        change = on_host if on_host and who == HOST else advice
        raise UserError(f"{who} is out of memory: {change} ({said})") from error


def _who_is_out_of_memory(error: BaseException) -> str:
    """Whose memory an error says has run out; empty where it says something else."""
    import torch

    text = str(error) if isinstance(error, RuntimeError) else ""
    if isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in GPU_SIGNS):
        return GPU
    return HOST if isinstance(error, MemoryError) or HOST_SIGN in text else ""
