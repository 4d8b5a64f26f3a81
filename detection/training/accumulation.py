"""One step of the optimizer from several passes of the model, for a batch that does not fit on a GPU at once.

The gradient is the mean of the passes' gradients. That is the gradient of the whole batch as several processes compute
it, each of which averages the losses over its own images. Batch norm is the exception: in training it normalises with
the statistics of the images of one pass, which are 2 for 16 images in 8 passes on one GPU, and all 16 for SyncBN over 8
GPUs. So use no more passes than memory requires.
"""

import contextlib
import time
from typing import Any

import torch
from detectron2.engine import SimpleTrainer

from detection.data.loading import ProcessBatch, TrainingBatches
from detection.data.seeding import Stream, seed_libraries


class AccumulatingTrainer(SimpleTrainer):
    """Detectron2's training step, in as many passes as the batch of this process has.

    Each pass draws its random numbers (regions that losses are taken of) from a seed of its own, so that they are the
    same after a restart, and the same for 8 processes as for 8 passes of one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batches: TrainingBatches,
        optimizer: torch.optim.Optimizer,
        process_batch: ProcessBatch,
        seed: int,
    ) -> None:
        super().__init__(model, batches, optimizer)
        self._batches: Any = None
        self._process_batch, self._seed = process_batch, seed

    def run_step(self) -> None:
        """The passes of iteration `iter`, and one step of the optimizer.

        Raises:
            FloatingPointError: the loss was not finite. It is read after the step, so that a GPU does not wait for the
                host in between; the weights in memory are of no use then.
        """
        if self._batches is None:  # only now is it known where a resumed run continues
            self._batches = self.data_loader.starting(self.iter)
        passes, waited = self._process_batch.passes, 0.0
        totals: dict[str, Any] = {}
        self.optimizer.zero_grad()
        for number in range(passes):
            start = time.perf_counter()
            batch = next(self._batches)
            waited += time.perf_counter() - start
            group = number * self._process_batch.processes + self._process_batch.rank
            seed_libraries(self._seed, Stream.PASS, self.iter, group)
            with self._without_synchronisation(number < passes - 1):
                losses: dict[str, Any] = {name: loss / passes for name, loss in self.model(batch).items()}
                sum(losses.values()).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach()
        self.optimizer.step()
        self._write_metrics(totals, waited)

    def _without_synchronisation(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Without synchronisation: processes average their gradients once, in the last pass."""
        if wanted and isinstance(self.model, torch.nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()
