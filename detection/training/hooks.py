"""What a training does besides its steps: batch-norm statistics, records, evaluations, the best checkpoint, stopping.

The order of the hooks decides what a killed run can repeat. An iteration's records are written before its checkpoint,
and its checkpoint before its evaluation. A resumed run removes the records of the iterations that it repeats, and
evaluates its checkpoint if the evaluation was due and has no record.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter
from fvcore.nn.precise_bn import update_bn_stats

from detection.data.seeding import Stream, seed_libraries
from detection.training import checkpoints, run_folder
from foundation.errors import UserError
from foundation.signals import STOPPED, StopRequest

PERIOD = 20  # iterations between records; each is the median of as many values, as in Detectron2
logger = logging.getLogger(__name__)


class RepeatablePreciseBN(hooks.PreciseBN):
    """Detectron2's estimate of the batch norms' statistics, from the same images each time: a resumed run would
    otherwise use other images than an undisturbed one. `data_loader` are the `TrainingBatches`.
    """

    def update_stats(self) -> None:
        """Estimate and set the statistics."""
        if self._disabled:
            return
        logger.info("Estimating the statistics of the batch norms over %d batches", self._num_iter)
        seed_libraries(self.trainer.cfg.SEED, Stream.PRECISE_BN, comm.get_rank())
        with EventStorage():  # what the model records is dropped
            update_bn_stats(self._model, iter(self._data_loader), self._num_iter)


class HighestRate(hooks.LRScheduler):
    """Detectron2's scheduler, which records the highest rate instead of that of the group with most parameters."""

    def before_train(self) -> None:
        """Choose the group whose rate is recorded."""
        super().before_train()
        rates = [group["lr"] for group in self._optimizer.param_groups]
        self._best_param_group_id = rates.index(max(rates))


class WeightAverage(hooks.HookBase):
    """An exponential moving average of the weights and of the batch norms' statistics; part of the checkpoints.

    Args:
        model: whose weights are averaged, on its device.
        decay: of the average so far, at each iteration.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def before_train(self) -> None:
        """Begin with the initial weights, which have been loaded since."""
        if self.trainer.start_iter == 0:
            self.load_state_dict(self._model.state_dict())

    def after_step(self) -> None:
        """Take the weights of this iteration in."""
        with torch.no_grad():
            for name, value in self._model.state_dict().items():
                average = self._average[name]
                if average.is_floating_point():
                    average.lerp_(value, 1 - self._decay)
                else:
                    average.copy_(value)  # a counter

    def state_dict(self) -> dict[str, Any]:
        """The average, by the model's names."""
        return self._average

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the average."""
        for name, value in state_dict.items():
            self._average[name].copy_(value)


class Records(hooks.PeriodicWriter):
    """Detectron2's periodic writer, with another order at evaluations: those write the records themselves, with their
    results. It leaves closing the files to the evaluation at the end of the run.

    Args:
        writers: of the records.
        evaluation_period: iterations between evaluations; 0: only at the end.
    """

    def __init__(self, writers: Sequence[EventWriter], evaluation_period: int) -> None:
        super().__init__(writers, PERIOD)
        self._evaluation_period = evaluation_period

    def after_step(self) -> None:
        """Write, if it is time to and no evaluation follows."""
        if not is_due(self._evaluation_period, self.trainer.iter + 1, self.trainer.max_iter):
            super().after_step()

    def after_train(self) -> None:
        """Nothing: the last evaluation is still to come."""


class StopOnRequest(hooks.HookBase):
    """Ends the process after an iteration if any process has been asked to stop. It comes after the periodic checkpoint
    and before the evaluation, which a resumed run makes.

    Args:
        request: of the signals that stop a run.
        writers: of the records; none in all processes but the first.
    """

    def __init__(self, request: StopRequest, writers: Sequence[EventWriter]) -> None:
        self._request, self._writers = request, writers

    def after_step(self) -> None:
        """Save and leave, if that was asked for.

        Raises:
            SystemExit: with `STOPPED`, in every process, when the checkpoint is complete.
        """
        if not self._any_process_is_asked():
            return
        self.trainer.checkpointer.save_iteration(self.trainer.iter)
        for writer in self._writers:
            writer.close()
        comm.synchronize()  # the first process saves, and all are ended when one leaves
        self._request.finish()
        logger.info("stopped as requested; the same command with --resume continues")
        raise SystemExit(STOPPED)

    def _any_process_is_asked(self) -> bool:
        """The same in all processes. By a sum on the device, which has just been waited for: the losses are read."""
        asked = self._request.requested is not None
        if comm.get_world_size() == 1:
            return asked
        count = torch.tensor(float(asked), device=self.trainer.cfg.MODEL.DEVICE)
        torch.distributed.all_reduce(count)
        return bool(count.item())


class Evaluation(hooks.EvalHook):
    """Evaluates every `period` iterations and at the end, keeps the best weights, and may stop the training.

    `model_best.pth` is written only if there are evaluations besides the last one.

    Args:
        period: iterations between evaluations; 0: only at the end.
        evaluate: gives results by task and metric; empty in all processes but the first.
        metric: what makes weights the best, such as `bbox/AP`; higher is better.
        dataset: on which it is measured.
        patience: training ends when this many evaluations in a row have not been better than the best; 0: never.
        writers: of the records; none in all processes but the first.

    Attributes:
        metric: as given.
        best: iteration and value of the best evaluation; None where there is but one.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], Mapping[str, Any]],
        metric: str,
        dataset: str,
        patience: int,
        writers: Sequence[EventWriter],
    ) -> None:
        super().__init__(period, evaluate)
        self.metric, self._dataset, self._patience, self._writers = metric, dataset, patience, writers
        self._evaluated = -1  # the iteration after which this process has evaluated last
        self.best: tuple[int, float] | None = None

    def before_train(self) -> None:
        """Evaluate the checkpoint that the run is resumed from, if that was due and is not on record."""
        if not self._period or not self.trainer.start_iter:
            return
        folder, last = Path(self.trainer.cfg.OUTPUT_DIR), self.trainer.start_iter - 1
        found = (checkpoints.read_best(folder, self.metric, self._dataset), run_folder.is_evaluated(folder, last))
        self.best, on_record = comm.all_gather(found)[0]  # the first process has looked, for all
        if not is_due(self._period, self.trainer.start_iter, self.trainer.max_iter):
            return
        if on_record:
            self._stop_if_no_better(last)
            return
        logger.info("The evaluation after iteration %d is not on record: evaluating now", last)
        self.trainer.storage.iter = last
        self._evaluate(last)
        self.trainer.storage.iter = self.trainer.start_iter

    def after_step(self) -> None:
        """Evaluate if it is time to; the last evaluation is left to `after_train`."""
        if is_due(self._period, self.trainer.iter + 1, self.trainer.max_iter):
            self._evaluate(self.trainer.iter)

    def after_train(self) -> None:
        """Evaluate the final weights, unless that has just been done."""
        if self._evaluated != self.trainer.iter - 1:
            self._evaluate(self.trainer.iter - 1)
        for writer in self._writers:
            writer.close()
        del self._func  # it refers to the trainer

    def _evaluate(self, iteration: int) -> None:
        results = flatten_results_dict(self._func() or {})
        finite = {name: float(value) for name, value in results.items() if math.isfinite(value)}
        self._evaluated = iteration
        if results and self.metric not in results:
            logger.warning("%s, the metric of the best checkpoint, is not among the results", self.metric)
        self._keep_best(iteration, finite.get(self.metric))  # before the record: if killed here, evaluate again
        self.trainer.storage.put_scalars(**finite, smoothing_hint=False)
        for writer in self._writers:
            writer.write()
        comm.synchronize()  # evaluations may take different times
        self._stop_if_no_better(iteration)

    def _keep_best(self, iteration: int, value: float | None) -> None:
        if self._period and value is not None and (self.best is None or value > self.best[1]):
            self.best = (iteration, value)
            self.trainer.checkpointer.save_best(iteration, self.metric, value, self._dataset)
        self.best = comm.all_gather(self.best)[0]

    def _stop_if_no_better(self, iteration: int) -> None:
        if not self._patience or self.best is None or iteration + 1 >= self.trainer.max_iter:
            return
        if iteration - self.best[0] >= self._patience * self._period:
            logger.info(
                "Training ends at iteration %d: in %d evaluations %s was not above its best, %.2f after iteration %d",
                *(iteration, self._patience, self.metric, self.best[1], self.best[0]),
            )
            self.trainer.max_iter = iteration + 1


def is_due(period: int, done: int, total: int) -> bool:
    """Whether an evaluation follows when `done` of `total` iterations are complete, besides the one at the end."""
    return period > 0 and done % period == 0 and done < total


def check_expected(results: Mapping[str, Mapping[str, float]], expected: Sequence[Sequence[Any]]) -> None:
    """Compare results with `TEST.EXPECTED_RESULTS`: entries of task, metric, value and tolerance.

    Raises:
        UserError: a metric is missing, not finite, or further from its value than the tolerance.
    """
    wrong = []
    for task, metric, value, tolerance in expected:
        actual = results.get(task, {}).get(metric, math.nan)
        if not abs(actual - value) <= tolerance:
            wrong.append(f"{task}/{metric} is {actual:.4f} instead of {value} ± {tolerance}")
    if wrong:
        raise UserError(f"the results are not those of TEST.EXPECTED_RESULTS: {'; '.join(wrong)}")
