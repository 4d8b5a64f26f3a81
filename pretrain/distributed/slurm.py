"""Translate the environment variables of `srun` to those that PyTorch reads.

`srun` gives each process its rank in variables `SLURM_*`; PyTorch reads the variables that torchrun sets.
"""

import re
from collections.abc import Mapping

from foundation.errors import UserError

PORTS = range(12000, 32000)  # below the ephemeral ports
WANTED = "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"


def torchrun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun for a process that srun has started.

    The processes meet on the first node of the step, where the first process is, at a port that is chosen by the step's
    number. `MASTER_ADDR` and `MASTER_PORT` are kept if they are set.

    Returns:
        An empty dictionary if `srun` has started only one process, or if `WORLD_SIZE` is set: by torchrun, or by a user
        who wants each process to train alone (`WORLD_SIZE=1`).

    Raises:
        UserError: there are several processes, but some of the variables that tell them apart are missing.
    """
    count = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if count == 1 or "WORLD_SIZE" in environment:
        return {}
    missing = [name for name in WANTED if not environment.get(name)]
    if missing:
        raise UserError(
            f"srun has started {count} processes, but {', '.join(missing)} is not set in their environment: pass all "
            "variables SLURM_* on (into a container, for example), or set WORLD_SIZE=1 to train in each separately"
        )
    rank, local_rank, node, per_node, nodes = (environment[name] for name in WANTED)
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(counts(per_node)[int(node)]),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(nodes)),
        "MASTER_PORT": environment.get("MASTER_PORT", str(PORTS[(8 * job + step) % len(PORTS)])),
    }


def first_host(nodes: str) -> str:
    """The first of a list of nodes: of `rack[1-2]n[07-09,12]-ib,login` it is `rack1n07-ib`.

    As `scontrol show hostnames | head -1` prints it, which a container may not have.
    """
    first = re.match(r"(\[[^]]*\]|[^],[])*", nodes)
    assert first
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0])


def counts(per_node: str) -> list[int]:
    """The number of processes on each node: `8(x2),4` is 8, 8 and 4."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node)
    return [int(count) for count, times in found for _ in range(int(times or 1))]
