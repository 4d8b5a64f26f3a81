"""BatchNorm over processes equals that of one process with the whole batch."""

import copy
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from foundation.errors import UserError
from pretrain.distributed import group
from pretrain.distributed.batch_norm import GlobalBatchNorm, convert


def in_processes(count: int, work: Callable[[int], Any], tmp_path: Path) -> list[Any]:
    """The results of `work(rank)`, in forked processes of one process group. An error in one of them is raised here."""

    def run(rank: int) -> None:
        store = dist.FileStore(str(tmp_path / "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
        try:
            torch.save(work(rank), tmp_path / f"{rank}.pt")
        finally:
            dist.destroy_process_group()

    torch.multiprocessing.start_processes(run, nprocs=count, start_method="fork")
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(count)]


def network() -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    return nn.Sequential(convolution, nn.Linear(64, 5), nn.BatchNorm1d(5, momentum=None, affine=False)).double()


def images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64) * 3 + 100


def two_steps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and buffers. The loss depends on each output in another way."""
    weights = torch.linspace(-1, 2, 5, dtype=torch.float64)
    for _ in range(2):
        model.zero_grad()
        x = x.detach().requires_grad_()
        y = model(x)
        (y.sin() * weights).sum().backward()
    found = {"output": y.detach(), "input": x.grad}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | dict(model.named_buffers())


@pytest.mark.parametrize("shares", [(3, 3), (1, 4, 2)])
def test_processes_compute_what_one_computes(shares: Sequence[int], tmp_path: Path) -> None:
    expected = two_steps(network(), images(sum(shares)))

    def work(rank: int) -> dict[str, Any]:
        x = images(sum(shares)).split(list(shares))[rank]
        return {name: tensor.tolist() for name, tensor in two_steps(convert(network()), x).items()}

    found = in_processes(len(shares), work, tmp_path)
    for name, tensor in expected.items():
        parts = [torch.tensor(each[name], dtype=tensor.dtype) for each in found]
        if name in ("output", "input"):
            torch.testing.assert_close(torch.cat(parts), tensor, rtol=1e-10, atol=1e-10)
        elif name.partition(".")[2] in dict(network().named_parameters()) or name in dict(network().named_parameters()):
            # Each process has the gradient of its own images' terms, which DistributedDataParallel adds.
            torch.testing.assert_close(torch.stack(parts).sum(0), tensor, rtol=1e-10, atol=1e-10)
        else:
            for part in parts:
                torch.testing.assert_close(part, tensor, rtol=1e-12, atol=1e-12)


def test_two_views_share_the_collectives(tmp_path: Path) -> None:
    """Two processes with both views in one pass equal one process with two passes; one all-reduce forth, one back."""
    halves = images(8).split(4)
    halves = halves[0], halves[1] * 2 + 1
    model = nn.Sequential(*network()[0][:3]).double()
    weights = torch.linspace(-1, 2, 4, dtype=torch.float64)[:, None, None]
    sum((model(half).sin() * weights).sum() for half in halves).backward()
    expected = [model[0].weight.grad, model[1].weight.grad, model[1].bias.grad, *model.buffers()]

    def work(rank: int) -> tuple[list[Any], int]:
        own = convert(nn.Sequential(*network()[0][:3]).double(), views=2)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            (own(torch.cat([half.chunk(2)[rank] for half in halves])).sin() * weights).sum().backward()
        found = [own[0].weight.grad, own[1].weight.grad, own[1].bias.grad, *own.buffers()]
        return [tensor.tolist() for tensor in found], reduced.call_count

    (first, calls), (second, _) = in_processes(2, work, tmp_path)
    assert calls == 2
    for place, tensor in enumerate(expected):
        parts = [torch.tensor(each[place], dtype=tensor.dtype) for each in (first, second)]
        for found in [parts[0] + parts[1]] if place < 3 else parts:
            torch.testing.assert_close(found, tensor, rtol=1e-10, atol=1e-10)


def test_half_precision_and_large_means(tmp_path: Path) -> None:
    """In bfloat16 as PyTorch's own; in float32 with a mean of 1000 deviations."""

    def work(rank: int) -> list[float]:
        errors = []
        for dtype, offset in ((torch.bfloat16, 0), (torch.float32, 1000)):
            x = (images(4)[:, :, :3, :3] - 100 + offset).to(dtype)
            own, reference = GlobalBatchNorm(3), nn.BatchNorm2d(3)
            y = own(x.chunk(2)[rank])
            assert y.dtype == dtype
            errors.append((y - reference(x).chunk(2)[rank]).abs().max().item())
            errors.append((own.running_var - reference.running_var).abs().max().item())
        return errors

    for bfloat_y, bfloat_var, y, variance in in_processes(2, work, tmp_path):
        assert bfloat_y < 2**-6  # a unit in the last place of 2
        assert bfloat_var < 1e-4
        assert y < 1e-3
        assert variance < 1e-3


def test_conversion_keeps_parameters_buffers_and_eval() -> None:
    model = network().eval()
    own = list(model.parameters()), list(model.buffers())
    before, keys = model(images(4)), list(model.state_dict())
    converted = convert(model)
    assert [type(module) for module in converted.modules()].count(GlobalBatchNorm) == 2
    assert list(converted.state_dict()) == keys
    assert all(a is b for a, b in zip(own[0], converted.parameters(), strict=True))
    assert all(a is b for a, b in zip(own[1], converted.buffers(), strict=True))
    assert torch.equal(converted(images(4)), before)
    assert convert(copy.deepcopy(nn.Sequential(nn.Linear(2, 2))))[0].weight.shape == (2, 2)


def test_a_result_or_an_error_is_made_once_on_each_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def work(rank: int) -> tuple[Any, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCAL_RANK", str(rank))

            def fail() -> None:
                raise UserError(f"process {rank} finds no image")

            result = group.once_on_each_machine(lambda: [rank, "listed"])
            with pytest.raises(UserError) as caught:
                group.once_on_each_machine(fail)
            return result, str(caught.value)

    assert in_processes(2, work, tmp_path) == [([0, "listed"], "process 0 finds no image")] * 2


def test_machines_with_unequal_numbers_of_processes(tmp_path: Path) -> None:
    """One with two processes, and one with a single process, which does not leave the others waiting."""
    places = [("a", "2", "0"), ("a", "2", "1"), ("b", "1", "0")]

    def work(rank: int) -> list[Any]:
        machine, size, place = places[rank]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("platform.node", lambda: machine)
            patch.setenv("LOCAL_WORLD_SIZE", size)
            patch.setenv("LOCAL_RANK", place)
            return group.once_on_each_machine(lambda: [machine, rank])

    assert in_processes(3, work, tmp_path) == [["a", 0], ["a", 0], ["b", 2]]
