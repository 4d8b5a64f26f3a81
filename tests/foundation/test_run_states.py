"""The table of kinds, and how far runs are: of every kind that is written here, whole or damaged."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from foundation.errors import UserError
from foundation.files import digest_file, sha256_of
from foundation.run_kinds import KINDS, flatten, identify, read_config
from foundation.run_states import find_runs, read_state

HOLD = """
import pathlib, sys
from foundation import locks
for folder in sys.argv[1:]:
    locks.hold(pathlib.Path(folder))
print(flush=True)
input()
"""


def write(folder: Path, config: str = "", **files: object) -> Path:
    """A folder with config.yaml and with JSON files: `results_json={...}` writes results.json."""
    folder.mkdir(parents=True)
    if config:
        (folder / "config.yaml").write_text(config)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("_json", ".json")).write_text(text)
    return folder


def checkpoint(path: Path) -> Path:
    """A file in the format of checkpoints, with a digest beside it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"0" * 1000)
    digest_file(path).write_text(sha256_of(path))
    return path


@pytest.fixture
def every_kind(tmp_path: Path) -> Path:
    root = tmp_path / "output"
    detector = "SOLVER: {MAX_ITER: 90}\nMODEL: {WEIGHTS: ''}\n"
    write(root / "a_pretrain", "OBJECTIVE: {NAME: corinfomax}\nTRAIN: {EPOCHS: 3}\n")
    (root / "a_pretrain" / "encoder.safetensors").touch()
    write(root / "b_linear", "LINEAR: {}\nTRAIN: {EPOCHS: 5}\n", results_json={"kind": "linear"})
    write(root / "c_finetune", "FINETUNE: {}\nTRAIN: {EPOCHS: 20}\n")
    write(root / "d_transfer", results_json={"kind": "transfer", "top1": 50.0})
    write(root / "e_detection", detector, results_json={"kind": "detection", "iterations": 90})
    write(root / "f_killed", detector, metrics_json='{"iteration": 3}\n')
    for name in ("model_0000029.pth", "model_0000059.pth", "model_final.pth", "model_best.pth"):
        checkpoint(root / "f_killed" / name)
    rows = [{"label": "a", "seed": 0, "linear_top1": 9.0}, {"label": "b", "seed": 0, "error": "killed"}]
    write(root / "g_sweep", results_json={"kind": "sweep", "runs": rows})
    write(root / "g_sweep" / "a" / "seed0" / "linear", results_json={"kind": "linear"})
    write(root / "h_series", seeds_json={"kind": "series", "runs": [{"seed": 1}, {"seed": 2}]})
    for seed in (1, 2):
        write(root / "h_series" / f"seed{seed}", detector, results_json={"kind": "detection", "iterations": 90})
    write(root / "none", "a: 1", results_json={"accuracy": 5})
    write(root / "none" / "deeper", results_json={"kind": "poem"})
    write(root / "none" / "damaged", results_json="[" * 100_000)
    return root


def test_every_kind_of_run_is_listed_with_how_far_it_is(every_kind: Path) -> None:
    assert [
        (state.folder.relative_to(every_kind).as_posix(), state.kind.name, state.progress, state.step, state.outlook)
        for state in find_runs(every_kind)
    ] == [
        ("a_pretrain", "pretrain", "3 epochs planned", None, "complete"),
        ("b_linear", "linear", "5 epochs planned", None, "complete"),
        ("c_finetune", "finetune", "20 epochs planned", None, "unfinished: nothing saved"),
        ("d_transfer", "transfer", "-", None, "complete"),
        ("e_detection", "detection", "90 of 90 iterations", None, "complete"),
        ("f_killed", "detection", "60 of 90 iterations", 60, "unfinished: continues with --resume"),
        ("g_sweep", "sweep", "1 run", None, "unfinished: the same command continues"),
        ("g_sweep/a/seed0/linear", "linear", "-", None, "complete"),
        ("h_series", "series", "2 runs", None, "complete"),
        ("h_series/seed1", "detection", "90 of 90 iterations", None, "complete"),
        ("h_series/seed2", "detection", "90 of 90 iterations", None, "complete"),
    ]
    assert {state.kind.name for state in find_runs(every_kind)} == set(KINDS)


def test_runs_that_were_moved_and_linked_are_found_once(tmp_path: Path) -> None:
    """Through links to folders too, whatever these contain: a run beside the link to it, loops, and what is above."""
    root, disk = tmp_path / "output", tmp_path / "disk"
    for folder in (root / "here", disk / "moved", disk / "deep" / "er" / "moved", tmp_path / "other"):
        write(folder, "OBJECTIVE: {}\nTRAIN: {EPOCHS: 3}\n")
    (root / "a_link").symlink_to(root / "here")
    (root / "moved").symlink_to(disk / "moved")
    (root / "z").symlink_to(disk)  # the first link leads to one of its runs, too
    (disk / "deep" / "back").symlink_to(root)
    (disk / "deep" / "itself").symlink_to(disk / "deep" / "itself")
    (root / "up").symlink_to(tmp_path)
    found = [state.folder.relative_to(root).as_posix() for state in find_runs(root)]
    assert found == ["here", "moved", "z/deep/er/moved"]
    (tmp_path / "link").symlink_to(root)
    assert len(find_runs(tmp_path / "link")) == 3


@pytest.mark.parametrize(("kind", "file"), [("sweep", "results_json"), ("series", "seeds_json")])
def test_a_collection_is_complete_with_as_many_runs_as_are_planned(kind: str, file: str, tmp_path: Path) -> None:
    """Killed after the first of two; ended; and as earlier versions wrote it, without a plan."""
    row = {"seed": 0}
    for name, content in {
        "killed": {"planned": 2, "runs": [row]},
        "ended": {"planned": 2, "runs": [row, row]},
        "old": {"runs": [row]},
        "odd": {"planned": "x", "runs": [row]},
    }.items():
        write(tmp_path / name, **{file: {"kind": kind, **content}})
    assert {state.folder.name: (state.progress, state.outlook) for state in find_runs(tmp_path)} == {
        "killed": ("1 of 2 runs", "unfinished: the same command continues"),
        "ended": ("2 of 2 runs", "complete"),
        "old": ("1 run", "complete"),
        "odd": ("1 run", "complete"),
    }


def test_a_series_whose_runs_were_moved_and_linked(tmp_path: Path) -> None:
    folder = write(tmp_path / "output" / "series", seeds_json={"kind": "series", "runs": [{"seed": 1}]})
    write(tmp_path / "disk" / "seed1", "SOLVER: {MAX_ITER: 90}\n")
    (folder / "seed1").symlink_to(tmp_path / "disk" / "seed1")
    state = read_state(folder)
    assert state is not None
    assert not state.complete


def test_a_detector_whose_training_was_extended_is_unfinished(tmp_path: Path) -> None:
    results = {"kind": "detection", "iterations": 90}
    longer = write(tmp_path / "longer", "SOLVER: {MAX_ITER: 180}", results_json=results)
    state = read_state(longer)
    assert state is not None
    assert (state.complete, state.progress) == (False, "90 of 180 iterations")
    early = write(tmp_path / "early", "SOLVER: {MAX_ITER: 180}", results_json={**results, "stopped_early": True})
    state = read_state(early)
    assert state is not None
    assert state.complete
    evaluated = write(tmp_path / "evaluated", "SOLVER: {MAX_ITER: 180}", results_json={**results, "iterations": 0})
    state = read_state(evaluated)
    assert state is not None
    assert state.complete


def test_a_damaged_checkpoint_is_none_to_continue_from(tmp_path: Path) -> None:
    detector = write(tmp_path / "detector", "SOLVER: {MAX_ITER: 90}")
    first, last = (checkpoint(detector / f"model_00000{number}9.pth") for number in (2, 5))
    last.write_bytes(last.read_bytes()[:-50])  # cut off

    def state(folder: Path) -> tuple[int | None, str]:
        found = read_state(folder)
        assert found is not None
        return found.step, found.outlook

    assert state(detector) == (30, "unfinished: continues with --resume from an earlier checkpoint: 1 newer damaged")
    first.write_bytes(b"")
    assert state(detector) == (None, "unfinished: every checkpoint is damaged")
    encoder = write(tmp_path / "encoder", "OBJECTIVE: {}\nTRAIN: {EPOCHS: 3}\n")
    (encoder / "checkpoints").mkdir()
    for step in (4, 8):
        checkpoint(encoder / "checkpoints" / f"step_{step:09d}.pt")
    assert state(encoder) == (8, "unfinished: continues with --resume")
    digest_file(encoder / "checkpoints" / "step_000000008.pt").unlink()  # without which it is not loaded
    assert state(encoder)[0] == 4


def test_a_run_that_another_process_is_at(tmp_path: Path) -> None:
    """And a sweep between two of its runs."""
    sweep = {"kind": "sweep", "planned": 2, "runs": [{"seed": 0}]}
    write(tmp_path / "run", "OBJECTIVE: {}\nTRAIN: {EPOCHS: 3}\n")
    write(tmp_path / "sweep", results_json=sweep)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run"), str(tmp_path / "sweep")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert [state.outlook for state in find_runs(tmp_path)] == ["running", "running"]
        holder.communicate(b"\n")
    assert [(state.outlook, state.progress) for state in find_runs(tmp_path)] == [
        ("unfinished: nothing saved", "3 epochs planned"),
        ("unfinished: the same command continues", "1 of 2 runs"),
    ]


def test_damaged_records_cost_what_they_say_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The epoch comes from lines that are whole; a config or results that are no objects are of no run."""
    lines = '{"iteration": 0, "epoch": 1.5}\n5\n{"epoch": "x"}\n{}\n{"iteration": "y", "epoch": 9}\n\x00\n'
    folder = write(tmp_path / "run", "OBJECTIVE: {}\nTRAIN: {EPOCHS: many}\n", metrics_json=lines, results_json="{")
    (folder / "checkpoints").mkdir()
    for name in ("step_000000004.pt", "step_best.pt", "last.pt"):
        checkpoint(folder / "checkpoints" / name)
    (state,) = find_runs(tmp_path)
    assert (state.kind.name, state.step, state.progress) == ("pretrain", 4, "1.5 epochs")
    assert len(caplog.records) == 1
    for number, config in enumerate(["[" * 50_000, "a: 2024-99-99", "\x00", "- 1", "a: &a [*a]", "? [1]\n: 2"]):
        assert identify(write(tmp_path / f"none{number}", config)) is None


def test_a_config_is_flattened_by_dotted_keys(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", "A: {B: {C: [1, 2]}, D: x}\nE: 1\n")
    assert flatten(read_config(folder)) == {"A.B.C": [1, 2], "A.D": "x", "E": 1}


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        find_runs(tmp_path / "nowhere")
