"""What this project builds on has other signatures in Detectron2's main branch: stand-ins that have them."""

import importlib.util

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from detection.data.loading import ProcessBatch
from detection.training import accumulation

# isort: split
import detectron2.engine
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


def step(kind, *passes):
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = kind(model, Batches(*passes), optimizer, ProcessBatch(passes=len(passes)), seed=0)
    trainer.iter = 7
    with EventStorage(7) as storage:
        trainer.run_step()
    return model.weight.item(), storage.latest()["total_loss"]


@pytest.fixture(params=["installed", "main"])
def kind(request, monkeypatch):
    """The training step, with either `SimpleTrainer`: the module is executed anew with the one of main."""
    if request.param == "installed":
        return accumulation.AccumulatingTrainer
    monkeypatch.setattr(detectron2.engine, "SimpleTrainer", TrainerOfMain)
    spec = importlib.util.spec_from_file_location("accumulation_on_main", accumulation.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert issubclass(module.AccumulatingTrainer, TrainerOfMain)
    return module.AccumulatingTrainer


def test_a_step_in_two_passes_by_hand(kind):
    """The loss is 3 times the mean of means 2 and 6, 12; its gradient 4, and half of that the step."""
    assert step(kind, [1.0, 3.0], [6.0]) == (1.0, (12.0, 7))


def test_a_loss_that_is_not_finite_is_refused(kind):
    with pytest.raises(FloatingPointError, match="iteration=7"):
        step(kind, [float("nan")])
