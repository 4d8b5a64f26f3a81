"""The operations that a training step dispatches, counted part by part: `python benchmarks/step.py --count`.

A GPU starts one kernel at least for each operation that is not a view, and the host takes some microseconds to
dispatch either. Network, objective, check and optimizer are counted on a few images on the CPU, because their number
does not depend on the batch. The augmentation is counted on a simulated GPU at the batch that is asked for, with the
bytes that its operations read and write: from the shapes, and for Triton's kernels from what `augment_kernels.py` says
that they do.
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

from pretrain.batches import augment
from pretrain.batches.draws import Param
from pretrain.batches.views import Batch
from pretrain.training.build import build_parts
from pretrain.training.dry_run import synthetic_batch
from pretrain.training.guard import Statistics, check_step
from pretrain.training.step import Trainer

IMAGES = 2  # pairs that the CPU computes with
AUGMENTATION = "augmentation of both views"
BuildTrainer = Callable[[CfgNode, dict[str, Any], torch.device, str], Trainer]


class Operations(TorchDispatchMode):
    """Counts what is dispatched while it is entered.

    Attributes:
        dispatched: all operations.
        computing: those that are neither views nor allocations.
        moved: bytes of the tensors that the latter read and write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dispatched = self.computing = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # a simulated tensor that is asked for its device
            return result
        self.dispatched += 1
        if not func.is_view and not func.__name__.startswith("empty"):
            self.computing += 1
            self.moved += sum(map(_bytes, tree_leaves((args, kwargs, result))))
        return result


def _bytes(value: object) -> int:
    """Of a tensor; one that is expanded from a smaller one is read from there."""
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
        mock.patch.dict(augment._kernels_work, {device: kernels}),
        mock.patch("torch.Tensor.pin_memory", lambda tensor: tensor),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield device


def count_augmentation(batch: Batch, kernels: bool) -> Operations:
    """Of both views on a GPU, with bfloat16 as the result."""
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


def count_step(config: CfgNode, size: int, build_trainer: BuildTrainer) -> list[list[str]]:
    """Rows of part, operations, of these computing, and GB moved where it is counted."""
    parts = build_parts(config, torch.device("cpu"))
    trainer = build_trainer(config, parts, torch.device("cpu"), "bfloat16")
    batch = synthetic_batch(config, IMAGES)
    views = [trainer._augment(batch, view) for view in range(2)]
    trainer.step(0, batch)  # the first one sets things up
    rows = count_parts(trainer, views)
    with mock.patch.object(trainer, "_augment", lambda batch, view: views[view]), Operations() as all_but_augmentation:
        trainer.step(1, batch)
    large = synthetic_batch(config, size)
    augmentation, without = (count_augmentation(large, kernels) for kernels in (True, False))
    rest, step = Operations(), Operations()
    for name in ("dispatched", "computing"):
        total = getattr(all_but_augmentation, name)
        setattr(rest, name, total - sum(getattr(part, name) for part in rows.values()))
        setattr(step, name, total + getattr(augmentation, name))
    rows |= {"the rest": rest, AUGMENTATION: augmentation, "the whole step": step}
    rows |= {f"{AUGMENTATION}, without Triton": without}
    return [
        [name, f"{counted.dispatched:,}", f"{counted.computing:,}", f"{counted.moved / 1e9:.2f}"]
        if name.startswith(AUGMENTATION)
        else [name, f"{counted.dispatched:,}", f"{counted.computing:,}", ""]
        for name, counted in rows.items()
    ]


def count_parts(trainer: Trainer, views: Sequence[Tensor]) -> dict[str, Operations]:
    """What `Trainer.step` does with augmented views, each part by itself."""
    rows: dict[str, Operations] = {}
    with Operations() as rows["encoder and projector, forward"], trainer._autocast():
        z = trainer.network(*views)
    slopes = [torch.ones_like(part) for part in z]
    trainer.optimizer.zero_grad(set_to_none=True)
    with Operations() as rows["encoder and projector, backward"]:
        torch.autograd.backward(z, slopes)
    leaves = [part.detach().requires_grad_() for part in z]
    with Operations() as rows["objective, forward and backward"]:
        total = trainer.criterion(*leaves).total
        total.backward()
    statistics = [Statistics([trainer.network]), Statistics([trainer.criterion])]
    gradients = [parameter.grad for parameter in trainer.network.parameters()]
    with Operations() as rows["check for non-finite values"]:
        before = [each.copy() for each in statistics]
        flags = check_step(total.detach(), gradients, stop=False)
        for each, earlier in zip(statistics, before, strict=True):
            each.restore(earlier, bad=flags[0])
    with Operations() as rows["optimizer"]:
        trainer._update(bad=flags[0])
    return rows
