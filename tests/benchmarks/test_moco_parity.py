"""The comparison with MoCo's repository sees a difference wherever there is one."""

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def parity(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "moco_parity.py"))


def side(weight=1.0, loss=2.0, name="w"):
    state = {"parameters": {name: torch.tensor([weight])}, "buffers": {"mean": torch.zeros(2)}}
    losses, inputs = [{"loss_cls": torch.tensor(loss)}], [[{"image": torch.ones(3, 2, 2, dtype=torch.uint8)}]]
    gradients = [{"w": torch.tensor(0.5)}]
    return {
        **{"inputs": inputs, "before": state, "losses": losses, "gradients": gradients, "rates": [[0.1, 0.2]]},
        "after": state,
    }


def test_a_difference_in_any_part_is_seen(parity, capsys):
    report = parity["report"]
    assert report(side(), side()) == 0
    assert "1 parameters, 1 buffers; losses of the iterations: 2.0000" in capsys.readouterr().out
    for other in (side(weight=1.0 + 1e-6), side(loss=2.5), side(name="v"), side() | {"rates": [[0.1]]}):
        assert report(side(), other) == 1
    undefined = side() | {"rates": [[0.1, float("nan")]]}
    assert report(undefined, undefined) == 1
    assert parity["difference"]([{"a": torch.tensor([1.0, 2.0])}], [{"a": torch.tensor([1.0, 2.25])}]) == 0.25


def test_a_folder_without_mocos_files_is_named(parity, tmp_path):
    with pytest.raises(parity["UserError"], match=r"is no clone of .*moco: it has no detection/train_net"):
        parity["main"]([str(tmp_path)])
