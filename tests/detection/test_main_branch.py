"""What this project builds on has other signatures in Detectron2's main branch: stand-ins that have them."""

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from detection.data.loading import Share
from detection.training.accumulation import AccumulatingTrainer

# isort: split
from detectron2.engine import TrainerBase
from detectron2.utils.events import EventStorage, get_event_storage


class TrainerOfMain(TrainerBase):
    """`SimpleTrainer` as main has it: no iterator at the start, three more arguments, metrics of a given iteration."""

    def __init__(
        self, model, data_loader, optimizer, gather_metric_period=1, zero_grad_before_forward=False,
        async_write_metrics=False,
    ):  # fmt: skip
        super().__init__()
        model.train()
        self.model, self.data_loader, self.optimizer = model, data_loader, optimizer
        self._data_loader_iter_obj = None
        self.gather_metric_period = gather_metric_period

    def _write_metrics(self, loss_dict, data_time, prefix="", iter=None):
        iteration = self.iter if iter is None else iter
        if (iteration + 1) % self.gather_metric_period == 0:
            total = sum(loss.item() for loss in loss_dict.values())
            if total != total:
                raise FloatingPointError(f"Loss became infinite or NaN at iteration={iteration}!")
            get_event_storage().put_scalar(f"{prefix}total_loss", total)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, values):
        return {"loss": (self.weight * torch.tensor(values)).mean()}


class Batches:
    def __init__(self, *passes):
        self.passes = passes

    def __iter__(self):
        raise AssertionError("where to begin is not known yet")
        yield

    def starting(self, iteration):
        yield from self.passes


def step(*passes):
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = AccumulatingTrainer(model, Batches(*passes), optimizer, Share(passes=len(passes)), seed=0)
    trainer.iter = 7
    with EventStorage(7) as storage:
        trainer.run_step()
    return model.weight.item(), storage.latest()["total_loss"]


@pytest.fixture(params=["installed", "main"])
def base(request):
    """The training step, derived from either `SimpleTrainer`."""
    installed = AccumulatingTrainer.__bases__
    if request.param == "main":
        AccumulatingTrainer.__bases__ = (TrainerOfMain,)
    yield
    AccumulatingTrainer.__bases__ = installed


@pytest.mark.usefixtures("base")
def test_a_step_in_two_passes_by_hand():
    """The loss is 3 times the mean of means 2 and 6, 12; its gradient 4, and half of that the step."""
    assert step([1.0, 3.0], [6.0]) == (1.0, (12.0, 7))


@pytest.mark.usefixtures("base")
def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(FloatingPointError, match="iteration=7"):
        step([float("nan")])
