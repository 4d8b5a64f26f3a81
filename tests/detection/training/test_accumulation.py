"""Several passes for each step of the optimizer."""

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from detection.data.loading import ProcessBatch
from detection.training.accumulation import AccumulatingTrainer

# isort: split
from detectron2.utils.events import EventStorage


class Regression(nn.Module):
    """Two losses, both means over the images of a pass, as a detector's are; and a random number for each pass."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, -1.0]))
        self.drawn = []

    def forward(self, images):
        self.drawn.append(torch.rand(()).item())
        values = torch.stack(images) @ self.weight  # (N, 2) @ (2,) -> (N,)
        return {"square": (values**2).mean(), "linear": 3 * values.mean()}


class Given:
    """Batches as they come: one for each pass."""

    def __init__(self, *passes):
        self.passes = passes

    def __iter__(self):
        raise AssertionError("the first iteration is not known yet")
        yield

    def starting(self, iteration):
        self.asked = iteration
        yield from self.passes


IMAGES = [torch.tensor(pair) for pair in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0])]


def step(batches, share, model=None, iteration=4):
    model = model or Regression()
    trainer = AccumulatingTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), share, seed=1)
    trainer.iter = iteration
    with EventStorage(iteration) as storage:
        trainer.run_step()
    return model, storage


def test_the_gradient_is_the_mean_of_the_passes_gradients_by_hand():
    """w = (2, -1) gives values 2, -1, 1, 4. d(mean v^2)/dw = mean 2 v x; d(3 mean v)/dw = 3 mean x.

    Pass 1, images 1 and 2: ((4, 0) + (0, -2)) / 2 + 3 (0.5, 0.5) = (3.5, 0.5)
    Pass 2, images 3 and 4: ((2, 2) + (16, 0)) / 2 + 3 (1.5, 0.5) = (13.5, 2.5)
    """
    batches = Given(IMAGES[:2], IMAGES[2:])
    model, storage = step(batches, ProcessBatch(passes=2))
    assert batches.asked == 4
    assert model.weight.grad.tolist() == [8.5, 1.5]
    assert torch.allclose(model.weight, torch.tensor([2.0 - 0.85, -1.0 - 0.15]))
    # The losses: squares 2.5 and 8.5, linear 1.5 and 7.5; their means.
    latest = {name: value for name, (value, _) in storage.latest().items()}
    assert (latest["square"], latest["linear"], latest["total_loss"]) == (5.5, 4.5, 10.0)


def test_losses_are_read_after_the_step(monkeypatch):
    """Reading them makes the host wait for a GPU, which would then wait for the host's next command, the step."""
    done = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: done.append("step"))
    monkeypatch.setattr(AccumulatingTrainer, "_write_metrics", lambda *_: done.append("read"))
    step(Given(IMAGES), ProcessBatch())
    assert done == ["step", "read"]


def test_passes_give_the_step_of_the_whole_batch():
    once, _ = step(Given(IMAGES), ProcessBatch())
    twice, _ = step(Given(IMAGES[:2], IMAGES[2:]), ProcessBatch(passes=2))
    assert torch.equal(once.weight, twice.weight)


def test_passes_draw_what_processes_draw():
    two_passes, _ = step(Given(IMAGES[:2], IMAGES[2:]), ProcessBatch(passes=2))
    torch.manual_seed(123)
    processes = [step(Given(IMAGES), ProcessBatch(processes=2, rank=rank))[0] for rank in range(2)]
    assert two_passes.drawn == [model.drawn[0] for model in processes]
    assert len(set(two_passes.drawn)) == 2
    other, _ = step(Given(IMAGES), ProcessBatch(), iteration=5)
    assert other.drawn[0] not in two_passes.drawn


def test_processes_add_up_their_gradients_once_a_step(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Regression())
        sums = []

        def count(_, bucket):
            sums.append(bucket.buffer().clone())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        model.register_comm_hook(None, count)
        step(Given(IMAGES[:2], IMAGES[2:3], IMAGES[3:]), ProcessBatch(passes=3), model)
    finally:
        torch.distributed.destroy_process_group()
    assert len(sums) == 1
