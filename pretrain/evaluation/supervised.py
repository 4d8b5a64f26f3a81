"""Training with labels: what the linear evaluation (frozen encoder) and fine-tuning (trained encoder) share.

Learning rates change from epoch to epoch, as in the protocols that are followed here.
"""

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import UserError
from foundation.signals import STOPPED, StopRequest
from pretrain.batches.sampler import ShuffledBatches
from pretrain.distributed import group as distributed
from pretrain.runs import checkpoint
from pretrain.runs.folder import withdraw_outcome
from pretrain.runs.metrics import Meter, Metrics, Progress, read_metrics
from pretrain.training.lars import LARS
from pretrain.training.schedule import StepRange, multi_step

logger = logging.getLogger("pretrain")


def learning_rate_at(
    epoch: int,
    *,
    base: float,
    schedule: str,
    epochs: int,
    final: float,
    milestones: Sequence[int],
    gamma: float,
) -> float:
    """The learning rate of an epoch, counted from 0.

    Args:
        base: of the first epoch.
        schedule: `cosine`, which would reach `final` x base after the last of `epochs`; or `step`: multiplied by
            `gamma` at each of `milestones` (epochs).
    """
    if schedule == "step":
        return multi_step(epoch, base=base, milestones=milestones, gamma=gamma)
    return base * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * epoch / epochs)))


def build_head(features: int, classes: int, init: str) -> nn.Linear:
    """A linear classifier.

    Args:
        features, classes: its dimensions.
        init: one of `config.HEAD_INITS`: `uniform` as PyTorch initialises a linear layer, or `normal`, weights from
            N(0, 0.01²) and biases 0, as in the code of MoCo, SimSiam and VICReg.
    """
    head = nn.Linear(features, classes)
    if init == "normal":
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    return head


class LinearHeads(nn.ModuleList):
    """Linear classifiers side by side on the same features, initialised alike: (N, F) -> (H, N, C)."""

    def __init__(self, count: int, features: int, classes: int, init: str) -> None:
        head = build_head(features, classes, init)
        super().__init__([copy.deepcopy(head) for _ in range(count)])

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, F) -> logits of each head, (H, N, C)."""
        return torch.stack([head(features) for head in self])


class Classifier(nn.Module):
    """Encoder and head, images (N, 3, H, W) -> logits (N, C), float32.

    Args:
        precision: of the encoder, `float32` or `bfloat16`; the head is in float32.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, precision: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.precision = precision

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, C), float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            features = self.encoder(images)
        return self.head(features.float())


def build_optimizer(
    name: str, groups: Sequence[Sequence[nn.Parameter]], *, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD, or LARS as SimSiam's linear evaluation has it. One parameter group for each learning rate schedule."""
    kind = {"sgd": torch.optim.SGD, "lars": LARS}[name]
    parameters = [{"params": list(group)} for group in groups]
    return kind(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay)


def build_schedule(config: CfgNode, base: float, gamma: float) -> Callable[[int], float]:
    """Epoch -> learning rate, for parameters that begin with `base` and decay by `gamma` in the step schedule."""
    return partial(
        learning_rate_at,
        base=base,
        schedule=config.TRAIN.SCHEDULE,
        epochs=config.TRAIN.EPOCHS,
        final=config.TRAIN.FINAL,
        milestones=config.TRAIN.MILESTONES,
        gamma=gamma,
    )


def training_batches(
    count: int, steps: StepRange, batch_size: int, seed: int, drop_last: bool = True
) -> ShuffledBatches:
    """The part of this process in the batches of `count` images, as lists of (epoch, index)."""
    return ShuffledBatches(
        count,
        batch_size=batch_size,
        seed=seed,
        first_step=steps.first,
        last_step=steps.last,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        drop_last=drop_last,
    )


def head_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each head. logits (H, N, C), or (N, C) of one head; labels (N,); -> (H,)."""
    logits = logits.view(-1, *logits.shape[-2:])
    return torch.stack([F.cross_entropy(of_head, labels) for of_head in logits])


@dataclass
class SupervisedTrainer:
    """A model with its optimizer and learning rates.

    Args:
        model: inputs -> logits, of one head or several.
        optimizer: with a parameter group for each of `schedules`.
        schedules: epoch -> learning rate.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedules: Sequence[Callable[[int], float]]

    def step(self, epoch: int, inputs: Tensor, labels: Tensor) -> Tensor:
        """One update of the weights. Returns the loss of each head before it, (H,).

        The gradient of the sum of the losses is for each head that of its own loss, so one pass trains all heads.
        """
        for group, schedule in zip(self.optimizer.param_groups, self.schedules, strict=True):
            group["lr"] = schedule(epoch)
        losses = head_losses(self.model(inputs), labels)
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()


def train(
    trainer: SupervisedTrainer,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: StepRange,
    *,
    log_period: int,
    names: Sequence[str],
    metrics: Metrics | None,
    request: StopRequest,
    end_epoch: Callable[[int, int], None],
    save: Callable[[int, int], None],
) -> bool:
    """Take the given steps.

    Args:
        trainer: takes them.
        batches: inputs (N, ...) and labels (N,), from the first step on.
        steps: which.
        log_period: steps between lines of metrics.json.
        names: of the heads' losses, in metrics.json.
        metrics: where to record; None on all processes but the main one.
        request: of a signal to stop.
        end_epoch: called with (epochs complete, steps complete) after each epoch, and at the end.
        save: called with the same where a signal stops the run within an epoch.

    Returns:
        Whether all steps were taken; if not, a signal asked to stop.

    Raises:
        UserError: no head's loss is finite any more.
    """
    progress = Progress(steps.last, steps.first, shown=metrics is not None)
    meter, waited_from = Meter(), time.monotonic()
    shown = ""
    for step, (inputs, labels) in zip(range(steps.first, steps.last), batches, strict=True):
        epoch = step // steps.per_epoch
        meter.waiting += time.monotonic() - waited_from
        meter.images += len(labels)
        losses = trainer.step(epoch, inputs, labels)
        complete = (step + 1) % steps.per_epoch == 0 or step + 1 == steps.last
        logs = (step + 1) % log_period == 0 or complete
        if logs:
            numbers = zip(names, check_finite(losses, step).tolist(), strict=True)
            values = {name: number for name, number in numbers if math.isfinite(number)}  # JSON has no NaN
            least = min(values.values())
            values |= {"learning_rate": trainer.schedules[0](epoch), "epoch": (step + 1) / steps.per_epoch}
            values |= meter.read()
            meter = Meter()
            if metrics:
                metrics.write(step, values)
            shown = f"loss {least:.3f}{' (best head)' if len(names) > 1 else ''} data {values['data_share']:.0%} "
            shown += f"{values['images_per_second']:.0f} img/s lr {values['learning_rate']:.4g}"
        progress.advance(f"epoch {epoch + 1} {shown}")
        if complete:
            end_epoch((step + 1) // steps.per_epoch, step + 1)
        if step + 1 < steps.last and is_asked_to_stop(request, losses.device, logs):
            if not complete:
                check_finite(losses, step)
                save((step + 1) // steps.per_epoch, step + 1)
            progress.close()
            return False
        waited_from = time.monotonic()
    progress.close()
    return True


def is_asked_to_stop(request: StopRequest, device: torch.device, logs: bool) -> bool:
    """Whether a process has got a signal to stop; the same on all of them. Several agree at the log lines only, where
    they wait for each other anyway.
    """
    asked = request.requested is not None
    if distributed.world_size() == 1:
        return asked
    return logs and bool(distributed.reduce_mean(torch.tensor(float(asked), device=device)).item())


def fit(
    trainer: SupervisedTrainer,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: StepRange,
    *,
    output: Path,
    log_period: int,
    names: Sequence[str],
    request: StopRequest,
    measure: Callable[[], Mapping[str, float]],
    state: Callable[[], Mapping[str, Any]],
) -> Mapping[str, float]:
    """Train as `train` does; after each epoch measure and save a checkpoint. Returns what was measured last.

    Args:
        output: the run folder.
        request: of a signal to stop.
        measure: values for metrics.json; called by every process.
        state: what the checkpoint holds besides optimizer and position.

    Raises:
        SystemExit: with `STOPPED`, on every process, where a signal asked to stop and the steps taken are saved.
    """
    if distributed.is_main() and 0 < steps.first < steps.last:
        withdraw_outcome(output)
    values: Mapping[str, float] = {}

    def save(epoch: int, step: int) -> None:
        if distributed.is_main():
            position = {"epoch": epoch, "step": step}
            checkpoint.save(output, {**state(), "optimizer": trainer.optimizer.state_dict(), "position": position})

    def end_epoch(epoch: int, step: int) -> None:
        nonlocal values
        with request.evaluating():
            values = measure()
        if metrics:
            metrics.write(step - 1, values)
        save(epoch, step)

    recording = contextlib.closing(Metrics(output, steps.first)) if distributed.is_main() else contextlib.nullcontext()
    with recording as metrics, request.deferred():
        complete = train(
            trainer,
            batches,
            steps,
            log_period=log_period,
            names=names,
            metrics=metrics,
            request=request,
            end_epoch=end_epoch,
            save=save,
        )
        if not complete:
            distributed.barrier()  # torchrun ends all processes when one leaves, perhaps while the main one saves
            request.finish()
            logger.info("stopped as requested; the same command with --resume continues")
            raise SystemExit(STOPPED)
    return values or measure()  # a run that was complete before has taken no step


def best_epoch(output: Path, key: str, steps_per_epoch: int) -> tuple[float, int] | None:
    """The highest value of a key that `fit` has measured, and its epoch, counted from 1. None: never measured.

    VICReg's evaluation reports this value. It is optimistic, because the epoch is chosen on the validation images.
    """
    log = output / "metrics.json"
    epochs = {}
    for line in read_metrics(log) if log.is_file() else ():
        epoch, rest = divmod(line["iteration"] + 1, steps_per_epoch)
        if key in line and rest == 0:  # a run that was stopped within an epoch has measured there too
            epochs[epoch] = line[key]
    if not epochs:
        return None
    best = max(epochs, key=lambda epoch: epochs[epoch])
    return epochs[best], best


def check_finite(losses: Tensor, step: int) -> Tensor:
    """The heads' losses (H,), averaged over the processes. Raises UserError, on all of them, if none is finite."""
    losses = distributed.reduce_mean(losses)
    if not losses.isfinite().any():
        raise UserError(
            f"the loss is {losses[0].item()} at step {step}: lower the learning rate; the checkpoint of the previous "
            "epoch is intact"
        )
    return losses
