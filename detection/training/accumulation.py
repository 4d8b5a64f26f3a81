"""One step of the optimizer from several passes of the model, where the whole batch does not fit a GPU at once.

The gradient is the mean of the passes' gradients: that of the whole batch, as several processes compute it, for each of
which the losses are means over its own images. Batch norm is the exception: in training it normalises with the
statistics of the images that pass together, which are 2 for 16 images in 8 passes on one GPU, and all 16 for SyncBN
over 8 GPUs. So take no more passes than memory demands.
"""

import contextlib
import time
from typing import Any

import torch
from detectron2.engine import SimpleTrainer

from detection.data.loading import Share, TrainingBatches
from detection.data.seeding import Stream, seed_libraries


class AccumulatingTrainer(SimpleTrainer):
    """Detectron2's training step, in as many passes as the share of the data says.

    Each pass draws its random numbers (regions that losses are taken of) from a seed of its own, so that they are the
    same after a restart, and the same for 8 processes as for 8 passes of one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batches: TrainingBatches,
        optimizer: torch.optim.Optimizer,
        share: Share,
        seed: int,
    ) -> None:
        super().__init__(model, batches, optimizer)
        self._batches: Any = None
        self._share, self._seed = share, seed

    def run_step(self) -> None:
        """The passes of iteration `iter`, and one step of the optimizer.

        Raises:
            FloatingPointError: the loss is not finite; the step was not taken.
        """
        if self._batches is None:  # only now is it known where a resumed run goes on
            self._batches = self.data_loader.starting(self.iter)
        passes, waited = self._share.passes, 0.0
        totals: dict[str, Any] = {}
        self.optimizer.zero_grad()
        for number in range(passes):
            start = time.perf_counter()
            batch = next(self._batches)
            waited += time.perf_counter() - start
            seed_libraries(self._seed, Stream.PASS, self.iter, number * self._share.processes + self._share.rank)
            with self._gradients_stay_here(number < passes - 1):
                losses: dict[str, Any] = {name: loss / passes for name, loss in self.model(batch).items()}
                sum(losses.values()).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach()
        self._write_metrics(totals, waited)
        self.optimizer.step()

    def _gradients_stay_here(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Processes add up their gradients once, after the last pass."""
        if wanted and isinstance(self.model, torch.nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()
