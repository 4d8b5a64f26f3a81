"""A simulated GPU: tensors with device, shape and type but no content, on which the real code runs.

PyTorch's fake tensors find what a machine without a GPU does not: operands on different devices, and the host asking
for a number that is on the GPU (`.item()` raises, because there is no number). What they lack is added here:
gradients, without the backward pass itself; a fused optimizer; pinned memory; and a record of what is copied between
host and device.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.batches.views import Batch
from pretrain.encoder import SiameseNetwork, build_projector

CUDA = torch.device("cuda", 0)


@dataclass
class Recorded(TorchDispatchMode):
    """What happened while it was entered.

    Attributes:
        sent: of each copy to the GPU, whether the host goes on at once: asynchronous, and from pinned memory.
        fetched: names of the operations that brought something from the GPU to the host.
        largest: elements of the largest result, other than memory that was only allocated.
    """

    pinned: set[int]
    sent: list[tuple[tuple[int, ...], bool]] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    largest: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        sources, results = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), result)
        )
        before, after = ({leaf.device.type for leaf in leaves} for leaves in (sources, results))
        if not func.is_view and not func.__name__.startswith("empty"):
            self.largest = max([self.largest, *(leaf.numel() for leaf in results)])
        if before == {"cpu"} and after == {"cuda"}:
            at_once = bool(kwargs.get("non_blocking")) and id(sources[0]) in self.pinned
            self.sent.append((tuple(sources[0].shape), at_once))
        if before == {"cuda"} and "cpu" in after:
            self.fetched.append(func.__name__)
        return result


@contextlib.contextmanager
def fake_cuda() -> Iterator[Callable[[], Recorded]]:
    """While entered, device `cuda` can be used; tensors on it have no content.

    The network that is built is a small one, because fake operations take longer than small real ones. Yields a
    function that makes a recorder, to be entered for the part of interest.
    """
    pinned: set[int] = set()
    alive = []  # so that no other tensor gets the id of a pinned one

    def pin(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        pinned.add(id(tensor))
        return tensor

    def build_network(config: Any) -> SiameseNetwork:
        with unset_fake_temporarily():  # fake parameters cannot be moved
            return small_network(config)

    replaced = {
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.cuda.get_device_capability": lambda device=None: (9, 0),
        "torch.Tensor.pin_memory": pin,
        "torch.Tensor.backward": lambda loss: backward([loss], [None]),
        "torch.autograd.backward": backward,
        "torch.autograd.grad": gradients,
        "torch._fused_sgd_": fused_sgd,
        "pretrain.training.build.build_network": build_network,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in replaced.items():
            stack.enter_context(mock.patch(name, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield lambda: Recorded(pinned)


def small_network(config: Any) -> SiameseNetwork:
    """One convolution with BatchNorm, and the projector."""
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return SiameseNetwork(encoder, build_projector(8, list(config.PROJECTOR.DIMS)))


class Table:
    """Parameters of the augmentation, which keep their content, because the host computes with it."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def numpy(self) -> np.ndarray:
        """The values."""
        return self._values


def pinned_batch(batch: Batch) -> Batch:
    """A real batch as the loader makes it for a GPU. To be called within `fake_cuda`."""
    with unset_fake_temporarily():
        images, params = list(batch.images), [Table(table.numpy().copy()) for table in batch.params]
    return Batch([part.pin_memory() for part in images], params, batch.labels, batch.indices, [])  # type: ignore[arg-type]


def fused_sgd(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], momenta: Sequence[Tensor], **options: Any
) -> None:
    """In place of the kernel: checks of its operands."""
    for group in zip(parameters, gradients, momenta, strict=True):
        assert len({(tensor.device, tensor.dtype, tensor.shape) for tensor in group}) == 1
    found_inf = options["found_inf"]
    assert (found_inf.device, found_inf.dtype, found_inf.numel()) == (parameters[0].device, torch.float32, 1)


def backward(outputs: Sequence[Tensor], grad_tensors: Sequence[Tensor | None]) -> None:
    """In place of the backward pass, whose engine needs a GPU: a gradient without content for each leaf."""
    pending = [output.grad_fn for output in outputs]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if hasattr(node, "variable"):
            node.variable.grad = torch.empty_like(node.variable)
        following = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= following
        pending += following


def gradients(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """In place of `torch.autograd.grad`."""
    return [torch.empty_like(tensor) for tensor in inputs]
