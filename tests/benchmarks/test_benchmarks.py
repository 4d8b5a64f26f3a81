"""Each benchmark runs with tiny sizes and prints its tables; and what they compute with is right."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TABLES = {"data": 4, "step": 1, "loss": 3, "defaults": 1, "first_gradient": 1, "listing": 1, "convolution": 2}


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / f"{name}.py"))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("defaults", "convolution") else name for name in TABLES],
)
def test_quick_run_prints_tables(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "albumentations", None)  # as if it was not installed
    load(name, monkeypatch)["main"](["--quick", "--threads", "1"])
    machine, *lines = capsys.readouterr().out.splitlines()
    assert sum("albumentations is left out" in line for line in lines) == (name == "data")
    assert torch.__version__ in machine
    assert "1 thread(s)" in machine
    assert sum(set(line) <= set("|- ") and "-" in line for line in lines) == TABLES[name]
    widths = {len(line) for line in "\n".join(lines).split("\n\n")[0].splitlines()}
    assert len(widths) == 1


@pytest.mark.slow
def test_operations_of_a_step_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    load("step", monkeypatch)["main"](["--count", "--quick", "--threads", "1", "--batch", "8"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[4:]]
    counted = {part: int(computing.replace(",", "")) for part, _, computing, _ in lines[1:]}
    whole = counted.pop("the whole step")
    without = counted.pop("augmentation of both views, without Triton")
    assert whole == sum(counted.values())
    assert counted["augmentation of both views"] == 4  # for each view its table comes to the GPU, and is used
    assert without > 100
    # Two views of 20 convolutions, as many BatchNorms and 17 ReLUs, each forward and backward.
    forward, backward = (counted[f"encoder and projector, {way}"] for way in ("forward", "backward"))
    assert forward > 2 * 57
    assert backward > 2 * 57
    assert abs(counted["the rest"]) < 10


def test_sides_alternate_and_the_ratio_is_the_median_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = load("timing", monkeypatch)
    calls: list[str] = []
    seconds = timing["alternate"]([lambda: calls.append("a"), lambda: calls.append("b")], 3, torch.device("cpu"))
    assert "".join(calls) == "abababab"  # one round to warm up
    assert seconds.shape == (3, 2)
    # A round that the machine slowed tenfold on both sides changes nothing.
    assert timing["ratio"](np.array([[1, 3], [10, 30], [1, 3.0]]), side=0, reference=1) == "3 (3–3)"


def test_vicreg_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    vicreg = load("loss", monkeypatch)["vicreg"]
    z = torch.tensor([[2.0, 0.0], [-2.0, 4.0]])  # variances 8 and 8: no hinge; covariance -8 both ways, over P = 2
    assert vicreg(z, z).item() == pytest.approx(2 * (2 * 64 / 2))
    assert vicreg(z, z + torch.tensor([3.0, 0.0])).item() == pytest.approx(25 * 9 + 128)
