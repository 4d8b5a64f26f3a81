"""The training loop of pretraining: the steps, what is recorded and saved between them, and when it ends early."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable

import torch
from torch.utils.data import DataLoader

from foundation.names import counted
from foundation.signals import StopRequest
from pretrain.batches.copying import copy_ahead
from pretrain.batches.loader import read_batches, report_unreadable
from pretrain.batches.sampler import ShuffledBatches
from pretrain.corinfomax import Terms
from pretrain.distributed import group
from pretrain.runs.metrics import Meter, Progress
from pretrain.training.guard import NonFiniteLoss, PendingChecks, StepCheck
from pretrain.training.recorder import CheckpointPolicy, Recorder
from pretrain.training.step import Trainer

logger = logging.getLogger("pretrain")


def train(
    trainer: Trainer,
    loader: DataLoader,
    *,
    first_step: int,
    last_step: int,
    steps_per_epoch: int,
    log_period: int,
    max_unreadable: float,
    skipped: "Skipped",
    recorder: Recorder | None,
    request: StopRequest,
    checkpoints: CheckpointPolicy,
    end_epoch: Callable[[int, int], None],
) -> bool:
    """Take the steps from `first_step` to `last_step`, counted over all epochs from 0.

    Args:
        trainer: takes a step.
        loader: the batches of this process, from `first_step` on.
        first_step, last_step: the steps; the last is excluded.
        steps_per_epoch: complete batches in an epoch.
        log_period: steps between two log points.
        max_unreadable: the fraction of unreadable images above which the run stops.
        skipped: counts the batches that were skipped.
        recorder: writes the record; None on all processes but the main one.
        request: of a signal to stop.
        checkpoints: decides when to save, and saves.
        end_epoch: called with (complete epochs, complete steps) before the checkpoint of an epoch.

    Returns:
        Whether all steps were taken; if not, a signal asked to stop, and the steps taken are saved.

    Raises:
        UserError: too many images are unreadable, too many batches were skipped, a worker failed, or the disk is full.
            The caller reports the loss of another process (`group.report_lost_peers`).
    """
    progress = Progress(last_step, first_step, shown=recorder is not None)
    meter, checks, shown, unreadable = Meter(), PendingChecks(trainer.device), "", set[str]()
    with request.deferred(), contextlib.closing(copy_ahead(read_batches(loader), trainer.device)) as batches:
        for step in range(first_step, last_step):
            batch = meter.wait_for(batches)
            report_unreadable(batch, unreadable, max_unreadable * len(loader.dataset))  # type: ignore[arg-type]
            complete, epochs = step + 1, (step + 1) // steps_per_epoch
            ends_epoch = complete % steps_per_epoch == 0
            ends = ends_epoch or complete == last_step
            logs = ends or complete % log_period == 0
            terms = trainer.step(step, batch, stop=request.requested is not None, measure=logs)
            checks.add(step, trainer.flags)
            stop = skipped.count(checks.read(everything=logs or checkpoints.due_by_steps(complete)), loader)
            stop |= group.world_size() == 1 and request.requested is not None  # several processes agree a step later
            if stop:  # the checkpoint counts the skipped batches of the last steps too
                skipped.count(checks.read(everything=True), loader)
            if logs:
                values = gather(terms, trainer.learning_rate(step), complete / steps_per_epoch, skipped.total, meter)
                shown, meter = describe(values), Meter()
            if logs and recorder:
                recorder.record(step, values, ends_epoch)
            progress.advance(f"epoch {step // steps_per_epoch + 1} {shown}")
            if ends_epoch:
                end_epoch(epochs, complete)
            if ends or stop or checkpoints.due_by_steps(complete) or (logs and checkpoints.due_by_time()):
                checkpoints.save(epochs, complete, skipped.total)
            if stop and complete < last_step:
                group.barrier()  # torchrun ends all processes when one leaves, perhaps while the main one saves
                request.finish()
                progress.close()
                return False
    progress.close()
    return True


def gather(terms: Terms, learning_rate: float, epoch: float, skipped: int, meter: Meter) -> dict[str, float]:
    """The values of a log line. The loss of a skipped batch is left out: JSON has no NaN."""
    numbers = dict(zip(Terms._fields, torch.stack(terms).tolist(), strict=True))
    finite = {name: number for name, number in numbers.items() if math.isfinite(number)}
    return {**finite, "learning_rate": learning_rate, "epoch": epoch, "skipped": skipped, **meter.read()}


def describe(values: dict[str, float]) -> str:
    """A log line's values for the progress display, the most important first."""
    text = "loss {total:.3f} data {data_share:.0%} {images_per_second:.0f} img/s lr {learning_rate:.4f} "
    text += "big-bang {big_bang:.3f} attraction {attraction:.2e}"
    return text.format(**dict.fromkeys(Terms._fields, math.nan) | values)


class Skipped:
    """The batches that were skipped because their loss or gradient is not finite.

    Args:
        total: so far.
        allowed: most that a run may have in all.
    """

    def __init__(self, total: int, allowed: int) -> None:
        self.total, self._allowed = total, allowed

    def count(self, checks: Iterable[StepCheck], loader: DataLoader) -> bool:
        """Count and report the skipped ones. Returns whether a process has asked to stop.

        Raises:
            NonFiniteLoss: there are more than allowed; on every process.
        """
        stop = False
        for check in checks:
            stop |= check.stop
            if not check.skipped:
                continue
            self.total += 1
            assert isinstance(loader.batch_sampler, ShuffledBatches)
            images = loader.batch_sampler.images_of(check.step).tolist()
            if group.is_main():
                logger.warning("step %d skipped: its loss or gradient is not finite; images %s", check.step, images)
            if self.total > self._allowed:
                raise NonFiniteLoss(
                    f"{counted(self.total, 'batch')} gave a loss or gradient that is not finite, more than "
                    f"TRAIN.MAX_SKIPPED ({self._allowed}) allows, the last at step {check.step}; none of them has "
                    "changed the weights, and the last checkpoint is intact: lower TRAIN.LR or increase "
                    "TRAIN.WARMUP_EPOCHS"
                )
        return stop
