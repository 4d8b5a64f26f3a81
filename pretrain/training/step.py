"""The training step of pretraining: the gradient of the whole batch's loss, and an update that skips bad batches."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pretrain.batches.augment import augment
from pretrain.batches.views import Batch
from pretrain.corinfomax import Terms
from pretrain.objectives import Objective
from pretrain.training.guard import Statistics, check_step


@dataclass
class Trainer:
    """Takes training steps: augmentation, forward and backward pass, update.

    Args:
        network: `SiameseNetwork`, wrapped if there are several processes.
        criterion: embeddings of both views -> `Terms`.
        optimizer: of the network's parameters. A fused one skips a bad batch without making the host wait.
        learning_rate: step -> learning rate.
        mean, std: (3,) of the images, on the device.
        device: where the training happens.
        precision: `float32` or `bfloat16`.
        micro_batch: most images at a time; 0: all.

    Attributes:
        flags: (2,) on the device, of the last step: whether it was skipped, whether a process wants to stop
            (`guard.check_step`).
    """

    network: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    mean: Tensor
    std: Tensor
    device: torch.device
    precision: str
    micro_batch: int = 0
    flags: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._network_statistics, self._estimates = Statistics([self.network]), Statistics([self.criterion])
        self._fused = bool(self.optimizer.defaults.get("fused"))
        for group in self.optimizer.param_groups if self._fused else ():
            for parameter in group["params"] if group["momentum"] else ():
                # The fused update leaves a new buffer uninitialised if the very first step is skipped.
                self.optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def step(self, step: int, batch: Batch, stop: bool = False, measure: bool = False) -> Terms:
        """One update of the weights. Returns the loss before it.

        If the loss or a gradient of any process is not finite, weights, momentum, BatchNorm's statistics and the
        running covariance of all processes stay as they were, and `flags` says so.

        Args:
            step: counted over all epochs from 0.
            batch: the images of this process.
            stop: whether this process wants all of them to stop.
            measure: have an objective other than CorInfoMax measure CorInfoMax's terms too; else they are NaN.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        views = [self._augment(batch, view) for view in range(2)]
        self.optimizer.zero_grad(set_to_none=True)
        # Other objectives than CorInfoMax change their estimates, P x P numbers, only in steps that measure them.
        estimating = measure or not isinstance(self.criterion, Objective)
        guarded = [self._network_statistics, *([self._estimates] if estimating else [])]
        before = [statistics.copy() for statistics in guarded]
        backward = self._backward_in_parts if 0 < self.micro_batch < len(batch.indices) else self._backward
        terms = backward(views[0], views[1], measure)
        gradients = (parameter.grad for group in self.optimizer.param_groups for parameter in group["params"])
        self.flags = check_step(terms.total.detach(), gradients, stop)
        for statistics, earlier in zip(guarded, before, strict=True):
            statistics.restore(earlier, bad=self.flags[0])
        self._update(bad=self.flags[0])
        return Terms(*(term.detach() for term in terms))

    def _update(self, bad: Tensor) -> None:
        if self._fused:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # as torch's gradient scaler does
            self.optimizer.step()
        elif not bad.item():
            self.optimizer.step()

    def _augment(self, batch: Batch, view: int) -> Tensor:
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32  # what the first layer takes
        images = batch.images[view].to(self.device, non_blocking=True)
        return augment(images, batch.params[view], self.mean, self.std, dtype)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def _evaluate(self, z1: Tensor, z2: Tensor, measure: bool) -> Terms:
        terms = self.criterion(z1, z2)
        if measure and isinstance(self.criterion, Objective):
            return Terms(terms.total, *self.criterion.measure(z1.detach(), z2.detach()))
        return terms

    def _backward(self, view1: Tensor, view2: Tensor, measure: bool) -> Terms:
        with self._autocast():
            z1, z2 = self.network(view1, view2)
        terms = self._evaluate(z1, z2, measure)
        terms.total.backward()
        return terms

    def _backward_in_parts(self, view1: Tensor, view2: Tensor, measure: bool) -> Terms:
        """The exact gradient of the whole batch's loss, with the activations of one micro-batch in memory.

        First the embeddings of all images are computed without gradient, then the loss and its gradient with respect
        to them; then each micro-batch passes the network again, and its part of that gradient is propagated back.
        BatchNorm normalises micro-batches. Their sizes differ by one image at most, so that none is very small.
        """
        count = -(-len(view1) // self.micro_batch)
        parts = list(zip(view1.tensor_split(count), view2.tensor_split(count), strict=True))
        with torch.no_grad(), running_statistics_kept(self.network), self._autocast():
            embedded = [self.network(*part) for part in parts]
        z = [torch.cat(side).requires_grad_() for side in zip(*embedded, strict=True)]
        terms = self._evaluate(z[0], z[1], measure)
        gradients = [g.tensor_split(count) for g in torch.autograd.grad(terms.total, z)]
        for i, part in enumerate(parts):
            # Gradients are averaged over the processes once, with the last part.
            last = i == len(parts) - 1 or not isinstance(self.network, DistributedDataParallel)
            with contextlib.nullcontext() if last else self.network.no_sync():  # type: ignore[operator]
                with self._autocast():
                    z1, z2 = self.network(*part)
                torch.autograd.backward([z1, z2], [gradients[0][i], gradients[1][i]])
        return terms


@contextlib.contextmanager
def running_statistics_kept(network: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch as in training, but leaves its running statistics and their count alone."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    kept = [count.clone() for count in counts]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, before in zip(counts, kept, strict=True):
            count.copy_(before)
