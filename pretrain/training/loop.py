"""The training loop of pretraining: all the steps, what is recorded and saved between them, and when they end early."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable

import torch
from torch.utils.data import DataLoader

from pretrain.batches.loader import ShuffledBatches, read_batches, report_unreadable
from pretrain.corinfomax import Terms
from pretrain.distributed import group
from pretrain.distributed.signals import StopRequest
from pretrain.runs.metrics import Meter, Progress
from pretrain.training.guard import NonFiniteLoss, Verdict, Votes
from pretrain.training.recorder import Recorder
from pretrain.training.saving import Saver
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
    saver: Saver,
    end_epoch: Callable[[int, int], None],
) -> bool:
    """Take the steps from `first_step` to `last_step`, counted over all epochs from 0.

    `max_unreadable` is the share of damaged images above which the run stops, `recorder` is None on all processes but
    the main one, `end_epoch` is called with (epochs complete, steps complete) before an epoch's checkpoint.

    Returns:
        Whether all steps were taken; else a signal asked to stop, and a checkpoint of the steps taken is there.

    Raises:
        UserError: too many images or batches are no use, a worker failed, or the disk is full. The loss of another
            process is for the caller to name (`distributed.losses_named`).
    """
    progress = Progress(last_step, first_step, shown=recorder is not None)
    meter, votes, shown, unreadable = Meter(), Votes(trainer.device), "", set[str]()
    with StopRequest() as request, contextlib.closing(read_batches(loader)) as batches:
        for step in range(first_step, last_step):
            batch = meter.wait_for(batches)
            report_unreadable(batch, unreadable, max_unreadable * len(loader.dataset))  # type: ignore[arg-type]
            complete, epochs = step + 1, (step + 1) // steps_per_epoch
            ends_epoch = complete % steps_per_epoch == 0
            ends = ends_epoch or complete == last_step
            logs = ends or complete % log_period == 0
            terms = trainer.step(step, batch, stop=request.requested is not None, measure=logs)
            votes.add(step, trainer.votes)
            stop = skipped.count(votes.read(everything=logs or saver.due_by_steps(complete)), loader)
            if stop:  # the checkpoint counts the batches of the last steps too
                skipped.count(votes.read(everything=True), loader)
            if logs:
                values = gather(terms, trainer.learning_rate(step), complete / steps_per_epoch, skipped.total, meter)
                shown, meter = describe(values), Meter()
            if logs and recorder:
                recorder.record(step, values, ends_epoch)
            progress.advance(f"epoch {step // steps_per_epoch + 1}  {shown}")
            if ends_epoch:
                end_epoch(epochs, complete)
            if ends or stop or saver.due_by_steps(complete) or (logs and saver.due_by_time()):
                saver.save(epochs, complete, skipped.total)
            if stop and complete < last_step:
                group.barrier()  # a process that leaves first has torchrun end the others, in their save perhaps
                progress.close()
                return False
    progress.close()
    return True


def gather(terms: Terms, rate: float, epoch: float, skipped: int, meter: Meter) -> dict[str, float]:
    """The values of a log line. The loss of a batch that was skipped is left out: JSON has no NaN."""
    numbers = dict(zip(Terms._fields, torch.stack(terms).tolist(), strict=True))
    finite = {name: number for name, number in numbers.items() if math.isfinite(number)}
    return {**finite, "learning_rate": rate, "epoch": epoch, "skipped": skipped, **meter.read()}


def describe(values: dict[str, float]) -> str:
    """A log line's values for the progress display."""
    text = "loss {total:.3f}  big-bang {big_bang:.3f}  attraction {attraction:.2e}  lr {learning_rate:.4f}  "
    text += "{images_per_second:.0f} img/s  data {data_share:.0%}"
    return text.format(**dict.fromkeys(Terms._fields, math.nan) | values)


class Skipped:
    """The batches that were skipped for a loss or gradient that is no number.

    Args:
        total: so far.
        allowed: how many a run may have in all.
    """

    def __init__(self, total: int, allowed: int) -> None:
        self.total, self._allowed = total, allowed

    def count(self, verdicts: Iterable[Verdict], loader: DataLoader) -> bool:
        """Count and report those among the verdicts. Returns whether a process has asked to stop.

        Raises:
            NonFiniteLoss: there are more than allowed. On every process.
        """
        stop = False
        for verdict in verdicts:
            stop |= verdict.stop
            if not verdict.skipped:
                continue
            self.total += 1
            assert isinstance(loader.batch_sampler, ShuffledBatches)
            images = loader.batch_sampler.images_of(verdict.step).tolist()
            if group.is_main():
                logger.warning("step %d skipped: its loss or gradient is no number; images %s", verdict.step, images)
            if self.total > self._allowed:
                raise NonFiniteLoss(
                    f"{self.total} batches gave a loss or gradient that is no number, more than TRAIN.MAX_SKIPPED "
                    f"({self._allowed}) allows, the last at step {verdict.step}; none of them has touched the weights "
                    "and the last checkpoint is intact: lower TRAIN.LR or lengthen TRAIN.WARMUP_EPOCHS"
                )
        return stop
