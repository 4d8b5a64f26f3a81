"""`python pretrain/sweep.py`: what it plans, keeps and skips; the commands that it calls are stubs but once."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from foundation import signals
from foundation.config import config_folder, load_config
from foundation.signals import STOPPED, StopRequest
from pretrain import figures
from pretrain import sweep as command
from pretrain.config import get_defaults as get_pretrain_defaults
from pretrain.evaluation import sweep
from pretrain.images import remote

TABLE = """| run | seeds | linear top-1 (%) | kNN top-1 (%) |
|---|---|---|---|
| untrained | 1 | 10.00 | 9.00 |
| TRAIN.LR=0.1 | 2 | 42.00 ± 2.83 | 30.00 ± 0.00 |
| TRAIN.LR=0.5 | 1 of 2 | 46.00 | 33.00 |
| TRAIN.LR=9.0 | 0 of 1 | failed | failed |
"""


def write(folder: Path, text: str) -> str:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return str(path)


def test_the_thesis_four_sweeps_and_all_others_plan() -> None:
    plans = {
        path.stem: sweep.plan(load_config(sweep.get_defaults(), str(path), "sweep"))
        for path in config_folder("sweep").glob("*.yaml")
    }
    labels = {name: [one.label for one in runs] for name, runs in plans.items()}
    assert labels["cifar100_attraction"] == [f"OBJECTIVE.ATTRACTION={a}" for a in (125.0, 250.0, 500.0, 1000.0, 2000.0)]
    assert labels["cifar100_batch_size"] == [f"TRAIN.BATCH_SIZE={n}" for n in (256, 512, 1024)]
    assert labels["cifar100_learning_rate"] == [f"TRAIN.LR={rate}" for rate in (0.25, 0.5, 1.0)]
    assert labels["cifar100_projector"] == [f"PROJECTOR.DIMS=[4096, 4096, {p}]" for p in (64, 128, 256)]
    assert len(plans["shapes_objectives"]) == 3 * 8  # seeds x (untrained, six objectives, the article's projector)
    assert labels["cifar10_eigenvalues"] == ["OBJECTIVE.NAME=corinfomax", "OBJECTIVE.NAME=simclr"]
    grids = {name: len(runs) for name, runs in plans.items() if name.endswith("_grid")}
    assert grids == dict.fromkeys(("cifar10_grid", "cifar100_grid", "tiny_imagenet_grid", "imagenet100_grid"), 36)


def test_mean_and_spread_by_hand() -> None:
    rows: list[dict[str, Any]] = [
        {"label": "untrained", "linear_top1": 10.0, "knn_top1": 9.0},
        {"label": "TRAIN.LR=0.1", "linear_top1": 40.0, "knn_top1": 30.0},
        {"label": "TRAIN.LR=0.1", "linear_top1": 44.0, "knn_top1": 30.0},
        {"label": "TRAIN.LR=0.5", "linear_top1": 46.0, "knn_top1": 33.0},
        {"label": "TRAIN.LR=0.5", "error": "error: killed"},
        {"label": "TRAIN.LR=9.0", "error": "error: the loss is nan"},
    ]
    assert sweep.table(rows) == TABLE


def test_runs_are_made_once_and_failures_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: Callable[..., str]
) -> None:
    calls: list[tuple[str, Sequence[str]]] = []
    broken = {"TRAIN.LR=2.0"}

    def call(module: str, arguments: Sequence[str], request: StopRequest) -> str:
        calls.append((module, arguments))
        output = Path(arguments[arguments.index("--output") + 1])
        output.mkdir(parents=True)
        if output.parts[-3] in broken and module == "pretrain.train":
            output.rmdir()
            return "error: the loss is nan"
        if module == "pretrain.linear":
            (output / "results.json").write_text(json.dumps({"linear_top1": 50.0, "knn_top1": 40.0, "k": 20}))
        return ""

    monkeypatch.setattr(sweep, "call", call)
    config = write(tmp_path, "UNTRAINED: True\nCOMMON: [TRAIN.EPOCHS, 3]\nRUNS: [[TRAIN.LR, 0.1], [TRAIN.LR, 2.0]]\n")
    argv = ["--config", config, "--output", str(tmp_path / "out")]
    assert "1 of 3 runs failed: TRAIN.LR=2.0 (seed 0)" in error_of(command.main, argv)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["planned"] == 3
    assert [module for module, _ in calls] == ["pretrain.linear", "pretrain.train", "pretrain.linear", "pretrain.train"]
    assert calls[0][1][-4:-3] == ["random"]
    assert calls[1][1][:8] == ["--config", "shapes_R18", "SEED", "0", "TRAIN.EPOCHS", "3", "TRAIN.LR", "0.1"]
    calls.clear()
    broken.clear()
    command.main(argv)
    assert [module for module, _ in calls] == ["pretrain.train", "pretrain.linear"]
    assert "| TRAIN.LR=2.0 | 1 | 50.00 | 40.00 |" in (tmp_path / "out" / "table.md").read_text()
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 3
    assert "holds a run with other arguments" in error_of(command.main, [*argv, "COMMON", "['TRAIN.EPOCHS', 4]"])


def test_every_run_is_checked_before_the_first(tmp_path: Path, error_of: Callable[..., str]) -> None:
    def error(text: str, *overrides: str) -> str:
        given = ["--config", write(tmp_path, text), "--output", str(tmp_path / "never"), *overrides]
        return error_of(command.main, given)

    assert "RUNS and GRID are empty" in error("SEEDS: [0]")
    assert "SEEDS is empty" in error("RUNS: [[TRAIN.LR, 0.1]]\nSEEDS: []")
    assert "did you mean 'TRAIN.LR'" in error("RUNS: [[TRAIN.LR, 0.1], [TRAIN.LRR, 0.2]]")
    assert "TRAIN.EPOCHS must be" in error("RUNS: [[TRAIN.LR, 0.1], [TRAIN.EPOCHS, 0]]")
    assert "is not a list KEY, VALUE" in error("RUNS: [[TRAIN.LR]]")
    assert "name the same run twice" in error("RUNS: [[TRAIN.LR, 0.1], [TRAIN.LR, 0.1]]")
    assert "there is no config 'nosuch'" in error("PRETRAIN: nosuch\nRUNS: [[TRAIN.LR, 0.1]]")
    assert "LINEAR.LR" in error("LINEAR_COMMON: [LINEAR.LRS, [1.0]]\nRUNS: [[TRAIN.LR, 0.1]]")
    assert "is not of the form [KEY, [VALUE" in error("GRID: [[TRAIN.LR, 0.1]]")
    assert "FIGURES is 'nosuch'" in error("RUNS: [[TRAIN.LR, 0.1]]\nFIGURES: [nosuch]")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("file", "content", "command_name"),
    [
        ("config.yaml", "OBJECTIVE: {NAME: corinfomax}\n", "pretrain/train.py"),
        ("results.json", '{"kind": "transfer"}', "pretrain/transfer.py"),
        ("seeds.json", '{"kind": "series"}', "detection/train_net.py"),
    ],
)
def test_a_run_of_another_command_is_not_replaced(
    file: str, content: str, command_name: str, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text(content)
    given = ["--config", write(tmp_path, "RUNS: [[TRAIN.LR, 0.1]]"), "--output", str(tmp_path / "run")]
    message = error_of(command.main, given)
    assert message == f"{tmp_path / 'run'} holds a run of {command_name}: choose another --output"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [file]


def test_a_second_sweep_in_the_folder_is_refused(tmp_path: Path, error_of: Callable[..., str]) -> None:
    program = "import pathlib, sys; from foundation import locks; locks.hold(pathlib.Path(sys.argv[1])); input(print())"
    environment = {**remote.environment(), "PYTHONUNBUFFERED": "1"}
    output = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as first:
        assert first.stdout is not None
        first.stdout.readline()
        given = ["--config", write(tmp_path, "RUNS: [[TRAIN.LR, 0.1]]"), "--output", str(output)]
        assert f"another process is running in {output}" in error_of(command.main, given)
        first.communicate(b"\n")
    assert [path.name for path in output.iterdir()] == [".lock"]


def test_the_documented_sweep_of_own_images_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    block = page[page.index("    PRETRAIN: output/PHOTOS") :].split("\n\n")[0]
    config = write(tmp_path, textwrap.dedent(block))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "PHOTOS").mkdir(parents=True)
    planned = get_pretrain_defaults()
    planned.DATA.ROOT = "/photos"
    (tmp_path / "output" / "PHOTOS" / "config.yaml").write_text(planned.dump())
    runs = sweep.plan(load_config(sweep.get_defaults(), config, "sweep"))
    assert [one.label for one in runs][:2] == ["untrained", "TRAIN.LR=0.025 OBJECTIVE.ATTRACTION=15.625"]
    assert len(runs) == 5


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    text = "RUNS: [[SEED, 5]]\nGRID: [[OBJECTIVE.ATTRACTION, [250.0, 500.0]], [PROJECTOR.DIMS, [[8, 4], [8, 8]]]]\n"
    runs = sweep.plan(load_config(sweep.get_defaults(), write(tmp_path, text), "sweep"))
    grid = [f"OBJECTIVE.ATTRACTION={a} PROJECTOR.DIMS=[8, {p}]" for a in (250.0, 500.0) for p in (4, 8)]
    assert [one.label for one in runs] == ["SEED=5", *grid]
    assert runs[2].pretrain[-4:] == ["OBJECTIVE.ATTRACTION", "250.0", "PROJECTOR.DIMS", "[8, 8]"]


def test_a_long_list_of_values_is_a_folder_too() -> None:
    names = {sweep.Run("TRAIN.LR=0.1 " * 30 + end, 0, [], []).folder.parts[0] for end in "ab"}
    assert len(names) == 2
    assert max(map(len, names)) < 100


def test_a_folder_in_the_working_directory_does_not_shadow_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pretrain", "foundation", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the folder in the working directory')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert "name either --data or --voc07" in sweep.call("pretrain.transfer", ["--weights", "random"], StopRequest())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_the_run_may_save(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where saving takes longer than a start-up that is stuck may take to leave."""
    monkeypatch.setattr(signals, "STUCK_AFTER", 0.1)
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    (tmp_path / "a_run.py").write_text(
        "import pathlib, signal, sys, time\n"
        f"def save(*_): time.sleep(0.5); pathlib.Path({str(saved)!r}).touch(); sys.exit()\n"
        f"signal.signal(signal.SIGTERM, save); pathlib.Path({str(ready)!r}).touch(); time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def stop_when_ready() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(sweep, "execute", lambda one, folder, request: sweep.call("a_run", [], request))
    thread = threading.Thread(target=stop_when_ready, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        command.main(["--config", write(tmp_path, "RUNS: [[TRAIN.LR, 0.1]]\n"), "--output", str(tmp_path / "out")])
    assert stopped.value.code == STOPPED
    assert saved.exists()
    assert f"{number.name} received: stopping now; the same command continues\n" in capfd.readouterr().err


def test_figures_are_drawn_of_the_first_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Sequence[str]]] = []

    def call(module: str, arguments: Sequence[str], request: StopRequest) -> str:
        calls.append((module, arguments))
        if module == "pretrain.linear":
            output = Path(arguments[arguments.index("--output") + 1])
            output.mkdir(parents=True)
            (output / "results.json").write_text(json.dumps({"linear_top1": 50.0, "k": 20}))
        return ""

    monkeypatch.setattr(sweep, "call", call)
    text = "RUNS: [[TRAIN.LR, 0.1], [TRAIN.LR, 0.2]]\nSEEDS: [3, 4]\nUNTRAINED: True\nFIGURES: [eigenvalues, tsne]\n"
    command.main(["--config", write(tmp_path, text), "--output", str(tmp_path / "out")])
    module, arguments = calls[-1]
    assert module == "pretrain.figures"
    assert arguments[:2] == [str(tmp_path / "out" / f"TRAIN.LR={lr}" / "seed3" / "pretrain") for lr in (0.1, 0.2)]
    assert arguments[2:] == ["--output", str(tmp_path / "out" / "figures"), "--only", "eigenvalues,tsne"]
    assert figures.build_parser().parse_args(arguments).only == "eigenvalues,tsne"


@pytest.mark.slow
def test_a_real_sweep(photos: Path, tmp_path: Path) -> None:
    tiny = "DATA.NAME, folder, DATA.IMAGE_SIZE, 32, DATA.WORKERS, 0, TRAIN.BATCH_SIZE, 8, TRAIN.EPOCHS, 1"
    text = f"COMMON: [{tiny}, TRAIN.WARMUP_EPOCHS, 0, PROJECTOR.DIMS, [16, 8]]\nRUNS: [[TRAIN.LR, 0.01]]\n"
    config = write(tmp_path, f"{text}LINEAR_COMMON: [{tiny}, LINEAR.CACHED_VIEWS, 1]\nROOT: {photos}\n")
    command.main(["--config", config, "--output", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert row["label"] == "TRAIN.LR=0.01"
    assert 0 <= row["linear_top1"] <= 100
    assert (tmp_path / "out" / "TRAIN.LR=0.01" / "seed0" / "pretrain" / "encoder.safetensors").is_file()
