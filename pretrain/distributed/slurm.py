"""The processes that `srun` has started, told to the rest as torchrun would have told it.

`srun` gives each process its place in variables `SLURM_*` of the environment; PyTorch reads others.
"""

import re
from collections.abc import Mapping

from foundation.errors import UserError

PORTS = range(12000, 32000)  # below those that systems give to connections by themselves
WANTED = "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"


def torchrun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have added to an environment, from what srun has put there.

    The processes meet on the step's first node, where the first of them is, at a port that belongs to the step. A
    `MASTER_ADDR` or `MASTER_PORT` that is there already is left alone.

    Returns:
        Nothing where there are not several processes of one `srun`, or where `WORLD_SIZE` is set: by torchrun, or by
        someone who wants each process to train by itself (`WORLD_SIZE=1`).

    Raises:
        UserError: there are several, but the variables that tell them apart have not come through.
    """
    count = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if count == 1 or "WORLD_SIZE" in environment:
        return {}
    missing = [name for name in WANTED if not environment.get(name)]
    if missing:
        raise UserError(
            f"srun has started {count} processes, but {', '.join(missing)} of their environment is not set: have all "
            "variables SLURM_* passed on (into a container, say), or set WORLD_SIZE=1 to train in each by itself"
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
    """The first of a list of nodes: `rack[1-2]n[07-09,12]-ib,login` begins with `rack1n07-ib`.

    What `scontrol show hostnames | head -1` prints, which a container may not have.
    """
    first = re.match(r"(\[[^]]*\]|[^],[])*", nodes)
    assert first
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0])


def counts(per_node: str) -> list[int]:
    """Processes of each node: `8(x2),4` is 8, 8 and 4."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node)
    return [int(count) for count, times in found for _ in range(int(times or 1))]
