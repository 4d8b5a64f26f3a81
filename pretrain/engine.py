"""The training loop of pretraining: one step, and all of them."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from cli.errors import UserError
from pretrain import distributed
from pretrain.augment import augment
from pretrain.corinfomax import Terms
from pretrain.images import UnreadableImage
from pretrain.metrics import Metrics, Progress
from pretrain.views import Batch

logger = logging.getLogger("pretrain")


class NonFiniteLoss(UserError):
    """The loss is no longer a number."""


@dataclass
class Trainer:
    """What a training step needs.

    Args:
        network: `SiameseNetwork`, perhaps wrapped for several processes.
        criterion: embeddings of both views -> `Terms`.
        optimizer: of the network's parameters.
        learning_rate: step -> learning rate.
        mean, std: (3,) of the images, on the device.
        device: where the training happens.
        precision: `float32` or `bfloat16`.
        micro_batch: images at a time, 0 for all.
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

    def step(self, step: int, batch: Batch) -> Terms:
        """One update of the weights. Returns the loss before it.

        Raises:
            NonFiniteLoss: on every process, and before the weights are touched.
        """
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        views = [self._augment(batch, view) for view in range(2)]
        self.optimizer.zero_grad(set_to_none=True)
        share = len(batch.indices)
        backward = self._backward_in_parts if 0 < self.micro_batch < share else self._backward
        terms = backward(views[0], views[1], step, rate)
        self.optimizer.step()
        return Terms(*(term.detach() for term in terms))

    def _augment(self, batch: Batch, view: int) -> Tensor:
        return augment(batch.images[view].to(self.device, non_blocking=True), batch.params[view], self.mean, self.std)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def _backward(self, view1: Tensor, view2: Tensor, step: int, rate: float) -> Terms:
        with self._autocast():
            z1, z2 = self.network(view1, view2)
        terms = self.criterion(z1, z2)
        check_finite(terms, step, rate)
        terms.total.backward()
        return terms

    def _backward_in_parts(self, view1: Tensor, view2: Tensor, step: int, rate: float) -> Terms:
        """The exact gradient of the whole batch's loss, with the activations of a micro-batch in memory.

        First the embeddings of all without gradient, then the loss and its gradient with respect to them, then each
        micro-batch once more, with its part of that gradient fed in. BatchNorm sees micro-batches.
        """
        parts = list(zip(view1.split(self.micro_batch), view2.split(self.micro_batch), strict=True))
        with torch.no_grad(), running_statistics_kept(self.network), self._autocast():
            embedded = [self.network(*part) for part in parts]
        z = [torch.cat(side).requires_grad_() for side in zip(*embedded, strict=True)]
        terms = self.criterion(*z)
        check_finite(terms, step, rate)
        gradients = [g.split(self.micro_batch) for g in torch.autograd.grad(terms.total, z)]
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
    """BatchNorm normalises by the batch as in training, but leaves its running statistics as they are."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def check_finite(terms: Terms, step: int, rate: float) -> None:
    """Raises `NonFiniteLoss`. The loss is the same number on every process, so all of them stop."""
    if not math.isfinite(terms.total.item()):
        raise NonFiniteLoss(
            f"the loss is {terms.total.item()} at step {step} (learning rate {rate:g}, big-bang "
            f"{terms.big_bang.item():g}, attraction {terms.attraction.item():g}); the last checkpoint is intact: lower "
            "TRAIN.LR or lengthen TRAIN.WARMUP_EPOCHS"
        )


@dataclass
class Meter:
    """Sums between two log lines."""

    images: int = 0
    waiting: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def read(self) -> dict[str, float]:
        """Images a second over all processes, and the share of the time spent waiting for data."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        return {
            "images_per_second": self.images * distributed.world_size() / elapsed,
            "data_share": self.waiting / elapsed,
        }


def train(
    trainer: Trainer,
    loader: DataLoader,
    *,
    first_step: int,
    last_step: int,
    steps_per_epoch: int,
    log_period: int,
    max_unreadable: float,
    metrics: Metrics | None,
    end_epoch: Callable[[int, int], None],
) -> None:
    """Take the steps from `first_step` to `last_step`, counted over all epochs from 0.

    Args:
        metrics: where to record; None on all processes but the main one.
        max_unreadable: share of damaged images above which the run stops.
        end_epoch: called with (epochs complete, steps complete) after each epoch, and at the end.

    Raises:
        NonFiniteLoss: the loss is no longer a number.
        UserError: too many images cannot be read.
    """
    progress = Progress(last_step, first_step, shown=metrics is not None)
    unreadable: set[str] = set()
    meter, waited_from = Meter(), time.monotonic()
    iterator = read_batches(loader)
    for step in range(first_step, last_step):
        batch = next(iterator)
        meter.waiting += time.monotonic() - waited_from
        meter.images += len(batch.indices)
        report_unreadable(batch, unreadable, max_unreadable * len(loader.dataset))  # type: ignore[arg-type]
        terms = trainer.step(step, batch)
        if (step + 1) % log_period == 0 or step + 1 == last_step:
            values = {name: term.item() for name, term in zip(Terms._fields, terms, strict=True)}
            values |= {
                "learning_rate": trainer.learning_rate(step),
                "epoch": (step + 1) / steps_per_epoch,
                **meter.read(),
            }
            meter = Meter()
            if metrics:
                metrics.write(step, values)
            text = "loss {total:.3f}  big-bang {big_bang:.3f}  attraction {attraction:.2e}  lr {learning_rate:.4f}  "
            text += "{images_per_second:.0f} img/s  data {data_share:.0%}"
            shown = text.format(**values)
        elif step == first_step:
            shown = ""
        progress.advance(f"epoch {step // steps_per_epoch + 1}  {shown}")
        if (step + 1) % steps_per_epoch == 0 or step + 1 == last_step:
            end_epoch((step + 1) // steps_per_epoch, step + 1)
        waited_from = time.monotonic()
    progress.close()


def read_batches(loader: DataLoader) -> Iterator[Batch]:
    """The loader's batches. Raises UserError where no image in reach can be read."""
    try:
        yield from loader
    except UnreadableImage as error:
        raise UserError(f"{error}; check the dataset") from error


def report_unreadable(batch: Batch, known: set[str], allowed: float) -> None:
    """Warn once of each damaged image. Raises UserError where there are more than `allowed` (a number of images)."""
    for message in batch.unreadable:
        if message not in known:
            known.add(message)
            logger.warning("unreadable, replaced by the next image: %s", message)
    if len(known) > max(allowed, 1):
        raise UserError(
            f"{len(known)} images cannot be read, more than DATA.MAX_UNREADABLE allows; the last: "
            f"{batch.unreadable[-1]}"
        )
