"""The command for a GPU, run on a CPU: what it measures, records, and continues with."""

import json
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "gpu.py"))


def test_tables_are_read_by_their_columns(gpu: dict) -> None:
    text = "machine\n| a   | b  |\n| --- | -- |\n| 1   | 2 x |\n| 3 | 4 |\n\nwords\n| c |\n| - |\n| 5 |\n"
    assert gpu["read_tables"](text) == [{"a": "1", "b": "2 x"}, {"a": "3", "b": "4"}, {"c": "5"}]
    assert gpu["read_tables"]("| a | b |\n| - | - |\n| 1 | 2 |\n| 3") == [{"a": "1", "b": "2"}]  # ended by a signal


def test_epochs_fit_in_the_time_that_is_left(gpu: dict) -> None:
    assert gpu["fitting_epochs"](one=30.0, left=220.0) == 20  # 10 s an epoch beside 20 s to start
    assert gpu["fitting_epochs"](one=30.0, left=1.0) == 1
    assert gpu["fitting_epochs"](one=1.0, left=1e6) == 100
    assert gpu["fitting_epochs"](one=0.0, left=100.0) == 100


def test_parts_are_recorded_and_a_second_call_continues(
    gpu: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--device", "cpu", "--quick", "--output", str(tmp_path), "--parts", "loss", "step"]
    monkeypatch.setitem(gpu["MOST"], "loss", 250.0)  # on a busy machine the imports take most of a minute
    failed = {"complete": False, "seconds": 1.0, "output": "why"}
    monkeypatch.setitem(gpu["RUN"], "step", lambda args, seconds: [failed])
    with pytest.raises(SystemExit) as left:
        gpu["main"](command)
    assert left.value.code == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "PyTorch" in found["parts"]["loss"]["machine"]
    assert float(found["parts"]["loss"]["rows"][0]["CorInfoMax, ms"]) > 0
    page = (tmp_path / "gpu.md").read_text()
    assert "| CorInfoMax, ms |" in page
    assert "NOT COMPLETE" in page
    assert "    why" in page
    monkeypatch.setitem(gpu["RUN"], "step", lambda args, seconds: [{"complete": True, "seconds": 1.0, "output": ""}])
    capsys.readouterr()
    gpu["main"](command)
    assert "loss: complete already" in capsys.readouterr().out
    assert "NOT COMPLETE" not in (tmp_path / "gpu.md").read_text()


def test_a_command_that_takes_too_long_is_ended(gpu: dict) -> None:
    part = gpu["call"](["-c", "import time; print('begun', flush=True); time.sleep(60)"], seconds=2)
    assert part["output"].startswith("begun")
    assert not part["complete"]
    assert part["seconds"] < 30


def test_without_a_gpu_it_is_one_line(gpu: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(gpu["UserError"], match=r"^--device cuda: PyTorch .* finds no GPU"):
        gpu["main"](["--output", str(tmp_path)])


def test_missing_modules_are_named_at_once(gpu: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu["find_missing"](gpu["NEEDED"]) == []
    monkeypatch.setitem(gpu["main"].__globals__, "NEEDED", ("json", "no_such_one", "no_such_two"))
    with pytest.raises(gpu["UserError"], match="lacks no_such_one, no_such_two: install"):
        gpu["main"](["--device", "cpu", "--output", str(tmp_path)])


@pytest.mark.parametrize("content", ["", "[]", '{"parts": 1}', '{"parts": {"loss": 1}}'])
def test_a_file_of_something_else_is_refused(gpu: dict, tmp_path: Path, content: str) -> None:
    (tmp_path / "gpu.json").write_text(content)
    with pytest.raises(gpu["UserError"], match="choose another --output"):
        gpu["main"](["--device", "cpu", "--output", str(tmp_path)])
    assert (tmp_path / "gpu.json").read_text() == content


def test_a_file_of_an_earlier_version_is_continued(gpu: dict, tmp_path: Path) -> None:
    part = {"complete": True, "seconds": 1.0, "output": "", "rows": []}
    (tmp_path / "gpu.json").write_text(json.dumps({"machine": "a GPU", "parts": {"loss": part}}))
    gpu["main"](["--device", "cpu", "--output", str(tmp_path), "--parts", "loss"])
    assert gpu["read_results"](tmp_path / "gpu.json") == {"loss": {"machine": "a GPU", **part}}


def test_fashion_mnist_is_resumed_as_it_was_begun(gpu: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call is interrupted in pretraining, the second in the last evaluation; the third completes."""
    names = gpu["run_fashion_mnist"].__globals__
    calls: list[str] = []
    interrupted = ["run", "untrained"]

    def call(command: list[str], seconds: float) -> dict:
        assert seconds <= 500
        folder = Path(command[command.index("--output") + 1])
        calls.append(f"{folder.name}{' resumed' * ('--resume' in command)}")
        if folder.name == "run":
            epochs.append(command[command.index("TRAIN.EPOCHS") + 1])
        if folder.name in interrupted:
            interrupted.remove(folder.name)
            return {"complete": False, "seconds": 1.0, "output": f"{folder.name} stopped"}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("encoder.safetensors" if folder.name == "run" else "results.json")).write_text(
            '{"linear_top1": 90.0}'
        )
        return {"complete": True, "seconds": 1.0, "output": ""}

    epochs: list[str] = []
    monkeypatch.setitem(names, "call", call)
    arguments = gpu["build_parser"]().parse_args(["--runs", str(tmp_path), "--device", "cpu"])
    first, second, third = ([*gpu["run_fashion_mnist"](arguments, 500.0)][-1] for _ in range(3))
    assert calls == [
        *("epoch", "run resumed"),
        *("run resumed", "corinfomax resumed", "untrained resumed"),
        "untrained resumed",
    ]
    assert len(set(epochs)) == 1
    assert first["machine"] == third["machine"] != ""
    assert (first["complete"], first["accuracy"], first["output"]) == (False, {}, "run stopped")
    assert (second["complete"], second["output"]) == (False, "untrained stopped")
    assert second["accuracy"] == {"corinfomax": {"linear_top1": 90.0}}
    assert third["complete"]
    assert third["accuracy"].keys() == {"corinfomax", "untrained"}
    assert "NOT COMPLETE" not in gpu["describe"]({"fashion_mnist": third})


def test_the_gpu_tests_are_found(gpu: dict) -> None:
    files = gpu["files_with_gpu_tests"]()
    assert {"tests/pretrain/test_cuda.py", "tests/detection/test_cuda.py"} <= set(files)
    assert len(files) < 10
