"""A process finds its device and the other processes, or reports why not."""

import os
import socket
from collections.abc import Mapping

import pytest
import torch

from foundation.errors import UserError
from pretrain.distributed import group

BY_SRUN = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
BY_TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def start(patch: pytest.MonkeyPatch, environment: Mapping[str, str], gpus: int) -> torch.device:
    """Start with GPUs that are not there, and without the others."""
    patch.setattr(os, "environ", dict(environment))
    patch.setattr(torch.cuda, "device_count", lambda: gpus)
    patch.setattr(torch.cuda, "set_device", lambda device: None)
    patch.setattr(group, "_join", lambda *_: None)
    return group.start(use_cuda=True)


@pytest.mark.parametrize(("environment", "gpus", "device"), [(BY_SRUN, 2, 1), (BY_SRUN, 1, 0), (BY_TORCHRUN, 2, 1)])
def test_a_process_takes_its_gpu_or_the_only_one_that_srun_shows_it(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], gpus: int, device: int
) -> None:
    assert start(monkeypatch, environment, gpus) == torch.device("cuda", device)


@pytest.mark.parametrize(
    ("environment", "gpus"), [(BY_TORCHRUN, 1), (BY_SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1,3"}, 2)]
)
def test_more_processes_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], gpus: int
) -> None:
    with pytest.raises(UserError, match=rf"{gpus + 1} processes .* it has {gpus} GPUs?; .*--ntasks-per-node"):
        start(monkeypatch, environment, gpus)


def test_processes_with_the_same_gpu_are_told_so() -> None:
    with pytest.raises(UserError, match="two processes have the same GPU"), group.report_lost_peers():
        raise torch.distributed.DistBackendError(
            "invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
        )


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        places = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        monkeypatch.setattr(os, "environ", os.environ.copy() | places)
        with pytest.raises(UserError, match=f"meet, {port}, is in use; set MASTER_PORT"):
            group.start(use_cuda=False)


def test_an_outcome_is_a_value_or_an_error_that_waits() -> None:
    assert group.from_main(group.attempt(lambda: 3)) == 3

    def fail() -> int:
        raise UserError("no such folder")

    outcome = group.attempt(fail)
    with pytest.raises(UserError, match="no such folder"):
        group.from_main(outcome)
