"""The operations that a training step dispatches, counted part by part: `python benchmarks/step.py --count`.

A GPU starts one kernel at least for each operation that is not a view, and the host takes some microseconds to
dispatch either. Network, objective, check and optimizer are counted on a few images on the CPU, with the views passing
the network as they do on a GPU, because the number of operations depends on the batch only in one way: which layers
have maps that are large enough for the kernels of `gpu_kernels.py`. The augmentation is
counted on a simulated GPU at the requested batch size, with the bytes that its operations read and write: from the
shapes of the tensors, and for Triton's kernels from their description in `augment_kernels.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain import gpu_kernels
from pretrain.batches import augment
from pretrain.batches.draws import Param
from pretrain.batches.views import Batch
from pretrain.training.build import build_parts
from pretrain.training.dry_run import synthetic_batch
from pretrain.training.guard import Statistics, check_step
from pretrain.training.step import Trainer
from pretrain.training.two_views import TwoViewNetwork

IMAGES = 2  # pairs that the CPU computes with
AUGMENTATION = "augmentation of both views"
STEP = "the whole step"
BuildTrainer = Callable[[CfgNode, dict[str, Any], torch.device, str], Trainer]


class Operations(TorchDispatchMode):
    """Counts what is dispatched while it is entered.

    Attributes:
        dispatched: all operations but `detach`, which autograd dispatches for the tensors that it saves only where a
            mode like this one watches. `Detaches` counts those of a step that nothing watches.
        computing: those that are neither views nor allocations.
        moved: bytes of the tensors that the latter read and write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dispatched = self.computing = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # `prim`: a simulated tensor that is asked for its device
        if func.namespace == "prim" or func is torch.ops.aten.detach.default:
            return result
        self.dispatched += 1
        if not func.is_view and not func.__name__.startswith("empty"):
            self.computing += 1
            self.moved += sum(map(_bytes, tree_leaves((args, kwargs, result))))
        return result


class Detaches(torch.autograd.profiler.profile):
    """Counts the `detach` operations that are dispatched while it is entered, such as those of gradients."""

    def __init__(self) -> None:
        super().__init__(use_kineto=False)

    @property
    def dispatched(self) -> int:
        """How many."""
        return sum(event.name == "aten::detach" for event in self.function_events)


def _bytes(value: object) -> int:
    """Bytes that reading a tensor moves: of an expanded tensor, those of its storage. 0 for other values."""
    if not isinstance(value, Tensor):
        return 0
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


class HostTable:
    """Parameters that keep their content beside simulated tensors, because the host computes with them."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def numpy(self) -> np.ndarray:
        """The values."""
        return self._values


@contextmanager
def simulated_gpu(kernels: bool) -> Iterator[torch.device]:
    """While entered, tensors on the device `cuda` have shapes but no content. `kernels`: whether Triton works there."""
    device = torch.device("cuda", 0)
    with (
        mock.patch.object(gpu_kernels, "can_build", return_value=kernels),
        mock.patch("torch.Tensor.pin_memory", lambda tensor: tensor),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield device


def count_augmentation(batch: Batch, kernels: bool) -> Operations:
    """Operations of the augmentation of both views on a GPU, to bfloat16."""
    tables = [HostTable(params.numpy().copy()) for params in batch.params]
    with simulated_gpu(kernels) as device:
        images = torch.empty(batch.images.shape, dtype=torch.uint8, device=device)
        statistics = torch.zeros(2, 3, device=device)
        with Operations() as counted:
            for view, table in enumerate(tables):
                augment.augment(images[view], table, *statistics, torch.bfloat16)  # type: ignore[arg-type]
    if kernels:
        counted.moved = sum(_moved_by_kernels(images[0].numel(), table.numpy()) for table in tables)
    return counted


def _moved_by_kernels(values: int, params: np.ndarray) -> int:
    """Bytes that the four kernels read and write for a view of so many values."""
    blurred = float((params[:, Param.BLUR_SIGMA] > 0).mean())
    sum_grey, colour, blur_down, finish = 1, 1 + 4, (4 + 4) * blurred, 4 + 2
    return round(values * (sum_grey + colour + blur_down + finish))


@contextmanager
def counted_kernels(size: int) -> Iterator[None]:
    """While entered, the kernels of the encoder are operations on the CPU without a result.

    Args:
        size: images of the batch, which decides what maps are large enough.
    """
    with (
        torch.library._scoped_library("corinfomax", "IMPL") as library,
        mock.patch.object(gpu_kernels, "should_use", lambda x: x[0].numel() * size >= gpu_kernels.LEAST_ELEMENTS),
    ):
        for name, simulate in gpu_kernels.SIMULATIONS.items():
            library.impl(name, simulate, "CPU")
        yield


def count_step(config: CfgNode, size: int, build_trainer: BuildTrainer) -> list[list[str]]:
    """Rows of the table: part, operations, those that compute, and GB moved where they are counted."""
    parts = build_parts(config, torch.device("cpu"))
    parts["network"] = TwoViewNetwork(parts["network"], together=False)  # as on a GPU
    trainer = build_trainer(config, parts, torch.device("cpu"), "bfloat16")
    batch = synthetic_batch(config, IMAGES)
    views = [trainer._augment(batch, view) for view in range(2)]
    with counted_kernels(size):
        trainer.step(0, batch)  # the first one sets things up
        rows = count_parts(trainer, batch, views, Operations)
        for name, detaches in count_parts(trainer, batch, views, Detaches).items():
            rows[name].dispatched += detaches.dispatched
    all_but_augmentation = rows.pop(STEP)
    large = synthetic_batch(config, size)
    augmentation, without = (count_augmentation(large, kernels) for kernels in (True, False))
    rest, step = Operations(), Operations()
    for name in ("dispatched", "computing"):
        total = getattr(all_but_augmentation, name)
        setattr(rest, name, total - sum(getattr(part, name) for part in rows.values()))
        setattr(step, name, total + getattr(augmentation, name))
    rows |= {"the rest": rest, AUGMENTATION: augmentation, STEP: step}
    rows |= {f"{AUGMENTATION}, without Triton": without}
    return [
        [name, f"{counted.dispatched:,}", f"{counted.computing:,}", f"{counted.moved / 1e9:.2f}"]
        if name.startswith(AUGMENTATION)
        else [name, f"{counted.dispatched:,}", f"{counted.computing:,}", ""]
        for name, counted in rows.items()
    ]


def count_parts(trainer: Trainer, batch: Batch, views: Sequence[Tensor], count: type) -> dict[str, Any]:
    """Counts for each part of `Trainer.step` on augmented views, and for the whole step last."""
    rows: dict[str, Any] = {}
    with count() as rows["encoder and projector, forward"], trainer._autocast():
        z = trainer.network(*views)
    slopes = [torch.ones_like(part) for part in z]
    trainer.optimizer.zero_grad(set_to_none=True)
    with count() as rows["encoder and projector, backward"]:
        torch.autograd.backward(z, slopes)
    leaves = [part.detach().requires_grad_() for part in z]
    with count() as rows["objective, forward and backward"]:
        total = trainer.criterion(*leaves).total
        total.backward()
    statistics = [Statistics([trainer.network]), Statistics([trainer.criterion])]
    gradients = [parameter.grad for parameter in trainer.network.parameters()]
    with count() as rows["check for non-finite values"]:
        before = [each.copy() for each in statistics]
        flags = check_step(total.detach(), gradients, stop=False)
        for each, earlier in zip(statistics, before, strict=True):
            each.restore(earlier, bad=flags[0])
    with count() as rows["optimizer"]:
        trainer._update(bad=flags[0])
    with mock.patch.object(trainer, "_augment", lambda batch, view: views[view]), count() as rows[STEP]:
        trainer.step(1, batch)
    return rows
