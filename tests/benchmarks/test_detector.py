"""The detectors' benchmark runs with tiny sizes, and what it compares is the same work."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield runpy.run_path(str(BENCHMARKS / "detector.py"))
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name in ("benchmark_train", "benchmark_val", "benchmark_scored"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_quick_run_prints_all_tables(benchmark, capsys):
    benchmark["main"](["--quick", "--threads", "1"])
    machine, *lines = capsys.readouterr().out.splitlines()
    assert "1 thread(s)" in machine
    tables = [table.splitlines() for table in "\n".join(lines).split("\n\n")]
    assert [len(table) for table in tables] == [4, 4, 4, 4, 4]
    assert all(len({len(line) for line in table}) == 1 for table in tables)
    iteration, image = ([cell.strip() for cell in line.split("|")[1:-1]] for line in tables[0][2:])
    assert iteration[1] == "iteration of 2 images"
    assert image[1].startswith("image evaluated, ")
    assert float(iteration[5].split()[0]) == pytest.approx(float(iteration[4]) / float(iteration[3]), rel=0.02)
    assert 0 < float(iteration[6].rstrip("%")) < 100
    for line, side in zip(tables[1][2:], ("ours", "stock"), strict=True):
        model, name, whole, *parts = [cell.strip() for cell in line.split("|")[1:-1]]
        assert (model, name) == ("FPN", side)
        assert all(float(part) > 0 for part in parts[:6])
        assert sum(map(float, parts[:6])) == pytest.approx(float(whole), rel=0.02)
    for line, (head, side) in zip(tables[2][2:], (("FPN", "28"), ("C4", "14")), strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[:4] == [head, "16", "2048", side]
        assert float(cells[6].split()[0]) > 1
    noted, evaluated = ([cell.strip() for cell in line.split("|")[1:-1]] for line in tables[4][2:])
    assert noted[:3] == ["notes images", "10", "1000"]
    assert evaluated[:3] == ["evaluates", "3", "300"]


def test_both_sides_score_the_same_detections(benchmark):
    from detection.evaluation import scores

    dataset, results = benchmark["synthetic_results"](4, 100)
    assert len(results) == 400
    for task in ("bbox", "segm"):
        theirs = benchmark["score_conventionally"](dataset, results, task).stats
        assert np.allclose(scores.score(dataset, results, task).stats, theirs, rtol=0, atol=1e-12)
        assert 0.05 < theirs[0] < 0.95
