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


def test_epochs_fit_in_the_time_that_is_left(gpu: dict) -> None:
    assert gpu["fitting_epochs"](one=30.0, left=220.0) == 20  # 10 s an epoch beside 20 s to start
    assert gpu["fitting_epochs"](one=30.0, left=1.0) == 1
    assert gpu["fitting_epochs"](one=1.0, left=1e6) == 100


def test_parts_are_recorded_and_a_second_call_continues(
    gpu: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--device", "cpu", "--quick", "--output", str(tmp_path), "--parts", "loss", "step"]
    monkeypatch.setitem(gpu["RUN"], "step", lambda args, seconds: {"complete": False, "seconds": 1.0, "output": "why"})
    with pytest.raises(SystemExit) as left:
        gpu["main"](command)
    assert left.value.code == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "PyTorch" in found["machine"]
    assert float(found["parts"]["loss"]["rows"][0]["CorInfoMax, ms"]) > 0
    page = (tmp_path / "gpu.md").read_text()
    assert "| CorInfoMax, ms |" in page
    assert "NOT COMPLETE" in page
    assert "    why" in page
    monkeypatch.setitem(gpu["RUN"], "step", lambda args, seconds: {"complete": True, "seconds": 1.0, "output": ""})
    capsys.readouterr()
    gpu["main"](command)
    assert "loss: complete already" in capsys.readouterr().out
    assert "NOT COMPLETE" not in (tmp_path / "gpu.md").read_text()


def test_a_command_that_takes_too_long_is_ended(gpu: dict) -> None:
    part = gpu["call"](["-c", "import time; print('begun', flush=True); time.sleep(60)"], seconds=2)
    assert part["output"].startswith("begun")
    assert not part["complete"]
    assert part["seconds"] < 30
