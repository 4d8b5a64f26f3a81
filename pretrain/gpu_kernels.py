"""Registers Triton kernels as operations of PyTorch, and finds out whether a machine can build them.

Simulated GPUs know registered operations too, which is how the tests run without a GPU.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Elements of a map from which on computing takes longer than launching. PyTorch launches its own kernels in less time.
LEAST_ELEMENTS = 1 << 23

logger = logging.getLogger("pretrain")

# Fewer calls of Python's on the way to a kernel than `torch.library.custom_op` makes.
LIBRARY = torch.library.Library("corinfomax", "FRAGMENT")
SIMULATIONS: dict[str, Callable[..., Any]] = {}  # by name: results without content, of the right shapes


def register(schema: str, module: str, function: str, simulate: Callable[..., Any]) -> None:
    """Register an operation for GPUs.

    Args:
        schema: its name and arguments, as `torch.library.Library.define` has them; the first is a tensor.
        module: with the kernels; imported at the first call, because PyTorch has Triton on Linux only.
        function: of the module; launches the kernels.
        simulate: gives results of the same shapes.
    """

    def launch(x: Tensor, *arguments: Any) -> Any:
        with torch.cuda.device(x.device):
            return getattr(importlib.import_module(module), function)(x, *arguments)

    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, launch, "CUDA")
    torch.library.register_fake(f"corinfomax::{name}", simulate, lib=LIBRARY)
    SIMULATIONS[name] = simulate


def should_use(x: Tensor) -> bool:
    """Whether kernels for channels-last memory can compute with maps (N, C, H, W), faster than PyTorch's."""
    return (
        x.is_cuda
        and x.dim() == 4
        and x.numel() >= LEAST_ELEMENTS
        and x.dtype in DTYPES
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and can_build(x.device)
    )


@functools.cache
def can_build(device: torch.device) -> bool:
    """Whether Triton can build kernels for this GPU. It needs a C compiler. If it cannot, the log says so once."""
    try:
        torch.ops.corinfomax.try_kernel(torch.empty(1, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not isinstance(error, ImportError):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            logger.warning("Triton cannot build kernels here, so training will be slower: %s", reason)
        return False
    return True


def launch_nothing(x: Tensor) -> None:
    """Build and launch a kernel that does nothing."""
    import triton

    @triton.jit
    def nothing(pointer):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        pass

    nothing[(1,)](x)


register("try_kernel(Tensor x) -> ()", __name__, launch_nothing.__name__, lambda x: None)
