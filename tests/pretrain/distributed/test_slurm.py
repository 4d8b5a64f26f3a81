"""Training under SLURM: the variables of srun, and the batch script of the documentation."""

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from foundation.config import load_config
from foundation.errors import UserError
from foundation.signals import STOPPED
from pretrain import train
from pretrain.config import get_defaults
from pretrain.distributed import slurm

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "docs" / "pretrain.sbatch"
TINY = [
    *("DATA.NAME", "folder", "DATA.IMAGE_SIZE", "16", "DATA.WORKERS", "1", "PROJECTOR.DIMS", "[12, 8]"),
    *("TRAIN.BATCH_SIZE", "4", "TRAIN.PRECISION", "float32", "TRAIN.LR", "0.01", "TRAIN.EPOCHS", "6"),
    *("LOG.PERIOD", "1"),
]
LIMIT = 280.0  # seconds

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
    with pytest.raises(UserError, match="4 processes, but SLURM_NODEID, SLURM_STEP_NODELIST is not set"):
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


def test_the_command_of_the_batch_script_is_taken() -> None:
    text = SCRIPT.read_text()
    command = re.search(r"^srun (?:--\S+ )*python pretrain/train\.py (.*)$", text, flags=re.MULTILINE)
    usage = re.search(r"^# +(sbatch .*docs/pretrain\.sbatch /shared/run (.*))$", text, flags=re.MULTILINE)
    assert command
    assert usage
    assert usage[1] in (ROOT / "docs" / "reliability.md").read_text()
    parsed = train.build_parser().parse_args(shlex.split(command[1].replace('"$@"', usage[2])))
    assert parsed.resume
    load_config(get_defaults(), parsed.config, "pretrain", parsed.overrides)


@pytest.mark.parametrize(
    ("status", "saves", "requeues"),
    [
        (0, True, False),
        (2, False, False),  # an error
        (2, True, True),  # another process was lost
        (STOPPED, True, True),
        (128 + signal.SIGKILL, False, False),
        (128 + signal.SIGKILL, True, True),
        (128 + signal.SIGUSR1, False, True),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_the_batch_script_queues_again_what_has_got_further(
    tmp_path: Path, status: int, saves: bool, requeues: bool, begun: bool
) -> None:
    """With stand-ins for SLURM's commands: srun saves or not, and leaves with the status."""
    last = tmp_path / "a run" / "checkpoints" / "last.pt"
    last.parent.mkdir(parents=True)
    if begun:
        last.symlink_to("step_1.pt")
    srun = f'echo "$@"; {f"ln -sf step_2.pt {shlex.quote(str(last))};" if saves else ""} exit {status}'
    for name, line in {"srun": srun, "scontrol": 'echo "scontrol $@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "3"}
    run = str(tmp_path / "a run")
    done = subprocess.run(["bash", SCRIPT, run, "KEY", "A B"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "")
    command, *more = done.stdout.splitlines()
    assert command.endswith(f"python pretrain/train.py --output {run} --resume KEY A B")
    assert more == (["scontrol requeue 7"] if requeues else [])


class Job:
    """A job of the batch script, in two processes: on two nodes if there are that many."""

    def __init__(self, images: Path, run: Path) -> None:
        self.run = run
        nodes = min(2, len(set(self.call("sinfo", "--noheader", "--Node", "--format=%N").split())))
        place = [f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}", "--gpus-per-node=0", "--cpus-per-task=1"]
        arguments = [str(run), "--config", "shapes_R18", *TINY, "DATA.ROOT", str(images)]
        options = ["--parsable", f"--job-name={run.parent.name}", "--time=20", f"--output={run}.log", *place]
        self.number = self.call("sbatch", *options, str(SCRIPT), *arguments).strip()

    @staticmethod
    def call(*command: str) -> str:
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_for(self, condition: Callable[[str], bool]) -> None:
        """Until what SLURM says of the job is so. A requeued job, which SLURM lets wait two minutes, begins at once."""
        deadline = time.monotonic() + LIMIT
        while not condition(state := self.call("scontrol", "--oneliner", "show", "job", self.number)):
            assert time.monotonic() < deadline, state + self.run.with_suffix(".log").read_text()
            if "Reason=BeginTime" in state:
                self.call("scontrol", "update", f"JobId={self.number}", "StartTime=now")
            time.sleep(0.5)

    def wait_for_steps(self, more: int) -> None:
        before = self.steps()
        self.wait_for(lambda _: self.steps() >= before + more)

    def steps(self) -> int:
        metrics = self.run / "metrics.json"
        return metrics.read_text().count("\n") if metrics.exists() else 0


@pytest.fixture(scope="module")
def torture() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tests" / "pretrain" / "torture.py"))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that the nodes see if they see the repository, or the tests are skipped."""
    found = shutil.which("sbatch") and shutil.which("scontrol")
    if not found or subprocess.run(["scontrol", "ping"], stdout=subprocess.DEVNULL).returncode:
        pytest.skip("there is no SLURM")
    (ROOT / "output").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "output") as name:
        yield Path(name)
        subprocess.run(["scancel", f"--name={Path(name).name}"], check=True)


@pytest.fixture(scope="module")
def images(folder: Path, torture: dict[str, Any]) -> Path:
    torture["write_images"](folder / "images")
    return folder / "images"


@pytest.fixture(scope="module")
def whole(folder: Path, images: Path) -> Path:
    """A run that was left alone."""
    job = Job(images, folder / "whole")
    job.wait_for(lambda state: "JobState=COMPLETED" in state)
    return job.run


def differences(torture: dict[str, Any], *runs: Path) -> list[str]:
    """As the kills of torture.py are judged, the encoder by its tensors."""
    results = [torture["result"](run) for run in runs]
    return torture["differences"](*(end | {"encoder": safetensors.torch.load(end["encoder"])} for end in results))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_goes_on_after_a_signal_and_after_preemption(
    folder: Path, images: Path, whole: Path, torture: dict[str, Any]
) -> None:
    job = Job(images, folder / "stopped")
    job.wait_for_steps(8)
    job.call("scancel", "--signal=USR1", job.number)  # as --signal=USR1@300 does
    job.wait_for(lambda state: "Restarts=1 " in state and "JobState=RUNNING" in state)
    job.wait_for_steps(8)
    job.call("scontrol", "requeue", job.number)  # as PreemptMode=REQUEUE does
    job.wait_for(lambda state: "Restarts=2 " in state and "JobState=COMPLETED" in state)
    assert job.run.with_suffix(".log").read_text().count("stopped as requested") == 2
    assert not differences(torture, whole, job.run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cancelled_job_ends_and_another_one_goes_on(
    folder: Path, images: Path, whole: Path, torture: dict[str, Any]
) -> None:
    job = Job(images, folder / "cancelled")
    job.wait_for_steps(8)
    job.call("scancel", job.number)
    job.wait_for(lambda state: "JobState=CANCELLED" in state)
    Job(images, job.run).wait_for(lambda state: "JobState=COMPLETED" in state)
    assert not differences(torture, whole, job.run)
