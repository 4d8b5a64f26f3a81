"""The process group: start and stop, rank and size, sums with gradient.

Every function also works with one process and no process group.
"""

import contextlib
import inspect
import os
import pickle
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from foundation.errors import UserError
from foundation.names import counted
from pretrain.distributed import batch_norm, slurm

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)
GLOO_SIGNS = ("gloo", "Connection closed by peer", "Timed out waiting", "Connection reset by peer")
MISTAKES = {  # in how the processes were started, by what the communication library says
    "Duplicate GPU detected": "two processes have the same GPU; start at most as many on a machine as it has GPUs",
    "EADDRINUSE": "the port at which the processes are to meet, {}, is in use; set MASTER_PORT to another one",
}


def rank() -> int:
    """Index of this process; 0 if there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the main process, which writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has called this."""
    if dist.is_initialized():
        dist.barrier()


def announced() -> tuple[int, int]:
    """Index of this process and number of processes, as started by `torchrun` or `srun`, without joining them.

    Raises:
        UserError: some of srun's variables are missing.
    """
    environment = {**os.environ, **slurm.torchrun_variables(os.environ)}
    return int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))


def announced_here(processes: int) -> int:
    """How many of the processes that were started share this machine; all of them where nothing else is known."""
    environment = {**os.environ, **slurm.torchrun_variables(os.environ)}
    return min(processes, int(environment.get("LOCAL_WORLD_SIZE", processes)))


def start(use_cuda: bool, timeout: timedelta = TIMEOUT) -> torch.device:
    """Join the processes that `torchrun` or `srun` has started with this one, if any, and choose the device.

    Args:
        use_cuda: whether there are GPUs.
        timeout: how long a process waits for the others.

    Raises:
        UserError: fewer GPUs than processes on this machine, or the others cannot be reached.
    """
    by_srun = slurm.torchrun_variables(os.environ)
    os.environ.update(by_srun)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = torch.cuda.device_count()
    if by_srun and count == 1:  # with --gpus-per-task or --gpu-bind each process sees its own
        local_rank = 0
    elif use_cuda and local_size > count:
        raise UserError(
            f"{local_size} processes were asked for on this machine, but it has {counted(count, 'GPU')}; start "
            "torchrun with --nproc_per_node, or srun with --ntasks-per-node, at most that"
        )
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with report_lost_peers():
            _join(device, timeout)
    return device


def _join(device: torch.device, timeout: timedelta) -> None:
    """Join the process group of the environment.

    After a restart torchrun may reuse its store (with --master_port it does), which holds the addresses of processes
    that have ended. So each start prefixes its names.
    """
    store, own, count = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend, own_device = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    # Without the device NCCL guesses it from the rank at a barrier, and may hang if the guess is wrong.
    dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=timeout, device_id=own_device)


@contextlib.contextmanager
def report_lost_peers() -> Iterator[None]:
    """Report the loss of another process, which has died or not answered within the timeout, as one line.

    Raises:
        UserError: in place of the communication library's error.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        text = str(error)
        for sign, meaning in MISTAKES.items():
            if sign in text:
                raise UserError(meaning.format(os.environ.get("MASTER_PORT"))) from error
        if not isinstance(error, dist.DistError) and not any(sign in text for sign in GLOO_SIGNS):
            raise
        own = os.environ.get("RANK", "0")
        raise UserError(
            f"process {own} has lost another process, which has died or hangs ({text.splitlines()[0]}); see the "
            "messages of the others; --resume continues from the last checkpoint"
        ) from error


def stop() -> None:
    """Leave the process group. To be called in a `finally`.

    After an error the other processes do not call this, and NCCL's orderly end would wait for them. So the group is
    left to the end of the process, which aborts its communication.
    """
    if dist.is_initialized() and (sys.exc_info()[0] is None or dist.get_backend() != "nccl"):
        dist.destroy_process_group()


def wrap(model: nn.Module) -> nn.Module:
    """The model for several processes, if there are several: gradients are averaged, BatchNorm spans all processes.

    Buffers are not broadcast in each step, because BatchNorm over all processes keeps them equal. The gradients are
    views of what is reduced, so that they are neither held nor copied a second time.
    """
    if world_size() == 1:
        return model
    model = batch_norm.convert(model)
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # until torch 2.12
    option: dict[str, Any] = {name: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(model, **option)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        # The loss of each process depends on the sum, so each contributes to the gradient of every summand.
        return all_reduce_sum(gradient)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over processes of a tensor that has the same shape on each.

    Its gradient is that of the sum of all processes' losses with respect to this process's values.

    DistributedDataParallel averages the parameters' gradients over the W processes. A loss that is computed from such
    sums, and so is the same number on each process, gets its exact gradient: W equal losses are summed, divided by W.
    """
    return _AllReduceSum.apply(values) if world_size() > 1 else values


def reduce_mean(values: Tensor) -> Tensor:
    """Mean over processes of a tensor that has the same shape on each, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def once_on_each_machine(make: Callable[[], T]) -> T:
    """Call `make` in one process of each machine, and return its result in all of them. Called by every process.

    Raises:
        UserError: as `make` raises it, in each process of that machine.
    """
    if world_size() == 1:
        return make()
    # A process that is alone on its machine takes part, too: the others wait for it.
    machine, first = platform.node(), int(os.environ.get("LOCAL_RANK", "0")) == 0
    with tempfile.TemporaryDirectory(prefix="corinfomax-") as folder:  # of this user alone, so it can be unpickled
        path, failure = os.path.join(folder, "result"), ""
        if first:
            try:
                with open(path, "wb") as file:
                    pickle.dump(make(), file)
            except UserError as error:
                failure = str(error)
        told: list[Any] = [None] * world_size()
        dist.all_gather_object(told, (machine, first, path, failure))
        if not first:
            path, failure = next(each[2:] for each in told if each[:2] == (machine, True))
        if failure:
            raise UserError(failure)
        with open(path, "rb") as file:
            result = pickle.load(file)
        barrier()  # before the folder is removed
    return result


def check_same(value: int, name: str, device: torch.device) -> None:
    """Raises UserError, on every process, where a value is not the same on all; `name` describes it."""
    if world_size() == 1:
        return
    bounds = torch.tensor([value, -value], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    high, low = bounds[0].item(), -bounds[1].item()
    if high != low:
        raise UserError(f"the processes differ in {name} ({low} to {high}); all of them must see the same run folder")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a function returned, or the message of its UserError."""

    value: T | None = None
    error: str | None = None

    def get(self) -> T:
        """The value. Raises UserError with the message where there is one."""
        if self.error is not None:
            raise UserError(self.error)
        return self.value  # type: ignore[return-value]


def attempt(make: Callable[[], T]) -> Outcome[T]:
    """Call a function whose UserError is to be raised later, on every process."""
    try:
        return Outcome(value=make())
    except UserError as error:
        return Outcome(error=str(error))


def from_main(outcome: Outcome[T] | None) -> T:
    """The main process's outcome, on every process: its value is returned, or its UserError raised, on all of them.

    Args:
        outcome: that of the main process; ignored on others.
    """
    message = [outcome]
    if world_size() > 1:
        dist.broadcast_object_list(message)
    assert message[0] is not None
    return message[0].get()
