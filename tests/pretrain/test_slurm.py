"""Training under SLURM: what srun tells, and the batch script of the documentation."""

import pytest

from cli.errors import UserError
from pretrain import slurm

# Of the third of four processes on two nodes, as SLURM 22.05 has set them.
STEP = {
    "SLURM_JOB_ID": "31",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}


def test_the_place_of_a_process_that_srun_started() -> None:
    assert slurm.torchrun_variables(STEP) == {
        "RANK": "2",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "12250",  # 12000 + 8 * 31 + 2
    }


def test_steps_of_a_job_and_the_next_job_meet_at_ports_of_their_own() -> None:
    places = [(job, step) for job in ("31", "32") for step in ("0", "1", "2")]
    found = [slurm.torchrun_variables(STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}) for job, step in places]
    assert len({variables["MASTER_PORT"] for variables in found}) == 6
    largest = slurm.torchrun_variables(STEP | {"SLURM_JOB_ID": str(2**32 - 1)})
    assert int(largest["MASTER_PORT"]) in slurm.PORTS


def test_a_place_to_meet_that_is_given_is_kept() -> None:
    found = slurm.torchrun_variables(STEP | {"MASTER_ADDR": "ib0.n1", "MASTER_PORT": "4000"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("ib0.n1", "4000")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "31", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the batch script itself, before its srun
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        STEP | {"RANK": "5", "WORLD_SIZE": "16"},  # srun torchrun
        STEP | {"WORLD_SIZE": "1"},
    ],
)
def test_processes_that_srun_has_not_started_together(environment: dict[str, str]) -> None:
    assert slurm.torchrun_variables(environment) == {}


def test_variables_that_have_not_come_through_are_named() -> None:
    environment = {name: value for name, value in STEP.items() if name not in ("SLURM_NODEID", "SLURM_STEP_NODELIST")}
    with pytest.raises(UserError, match="4 processes, but SLURM_NODEID, SLURM_STEP_NODELIST of"):
        slurm.torchrun_variables(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n3", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[007-010,12],cpu1", "gpu007"),
        ("gpu[12,14-15]-ib", "gpu12-ib"),
        ("rack[1-2]n[07-09]", "rack1n07"),
        ("a-b.cluster,c[1-2]", "a-b.cluster"),
    ],
)
def test_the_first_node(nodes: str, first: str) -> None:
    assert slurm.first_host(nodes) == first


def test_processes_of_each_node() -> None:
    assert slurm.counts("8(x2),4") == [8, 8, 4]
    assert slurm.counts("1") == [1]
    assert slurm.counts("3,2(x3),10") == [3, 2, 2, 2, 10]
