"""Each benchmark runs with tiny sizes and prints its tables; and what they compute with is right."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from foundation.errors import UserError
from pretrain.convolution import SmallMapConv2d

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


def test_an_interrupted_benchmark_prints_the_rows_that_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows() -> Iterator[list[str]]:
        yield ["1", "2"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load("timing", monkeypatch)["print_table"](["a", "b"], rows())
    assert capsys.readouterr().out == "| a | b |\n| - | - |\n| 1 | 2 |\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda"], "--device cuda: PyTorch .* finds no GPU"),
        (["--threads", "-1"], "--threads is -1; it must be 0 or greater"),
        (["--rounds", "0"], "--rounds is 0; it must be 1 or greater"),
        (["--rounds", "many"], "argument --rounds: invalid int value"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        load("loss", monkeypatch)["main"](options)


def test_the_conventional_step_has_pytorchs_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    step = load("step", monkeypatch)
    _, conventional, alone = step["build_sides"](step["load"](step["QUICK"]), 2, torch.device("cpu"))
    assert not any(isinstance(module, SmallMapConv2d) for module in conventional.args[0].modules())
    assert any(isinstance(module, SmallMapConv2d) for module in alone.args[0].modules())


def test_a_process_that_fails_does_not_block_the_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    in_process = load("listing", monkeypatch)["in_process"]
    assert in_process(int, "7") == 7
    with pytest.raises(RuntimeError, match="a process that measures has failed"):
        in_process(int, "seven")


def test_a_gpu_without_enough_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. Including non-PyTorch memory")

    with pytest.raises(UserError, match="the GPU is out of memory: choose smaller sizes, such as another --batch"):
        load("timing", monkeypatch)["alternate"]([fail], 1, torch.device("cpu"))


def test_vicreg_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    vicreg = load("loss", monkeypatch)["vicreg"]
    z = torch.tensor([[2.0, 0.0], [-2.0, 4.0]])  # variances 8 and 8: no hinge; covariance -8 both ways, over P = 2
    assert vicreg(z, z).item() == pytest.approx(2 * (2 * 64 / 2))
    assert vicreg(z, z + torch.tensor([3.0, 0.0])).item() == pytest.approx(25 * 9 + 128)
