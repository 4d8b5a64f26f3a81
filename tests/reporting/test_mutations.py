"""Files of run folders with random damage: the report and the listing of runs neither crash nor hang."""

import random
import time

import pytest

from foundation.errors import UserError
from foundation.run_states import find_runs
from reporting.instances import read_detections, read_ground_truth
from reporting.runs import read_runs

SNIPPETS = (
    *(b"[" * 2000, b"{", b"null", b"-1e999", b"9" * 5000, b"\xff\x00", b'"', b"NaN", b"true", b": &a [*a]", b"\n5\n"),
)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A cut, a deletion, a changed byte or an insertion somewhere."""
    place = chance.randrange(len(data) + 1)
    match chance.randrange(4):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + data[place + chance.randrange(1, 40) :]
        case 2:
            return data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]
        case _:
            return data[:place] + chance.choice(SNIPPETS) + data[place:]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_damage_is_an_error_of_one_line_or_none(tmp_path, detection, linear, dataset, pretraining, seed):
    chance = random.Random(seed)
    detection("random", 1, 10.0)
    linear("random", 1, knn_top1=20.0)
    originals = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".json", ".yaml")}
    for _ in range(100):
        chosen = chance.sample(sorted(originals), 2)
        for path in chosen:
            path.write_bytes(damaged(originals[path], chance))
        start = time.monotonic()
        assert find_runs(tmp_path)
        read_report(tmp_path, dataset)
        assert time.monotonic() - start < 5
        for path in chosen:
            path.write_bytes(originals[path])


def read_report(folder, dataset):
    """All that a report reads, without drawing it."""
    try:
        for run in read_runs([folder]).runs:
            for key in ("total_loss", "bbox/AP", "total", "knn_top1"):
                run.series(key)
            run.measured("results", "bbox", "AP")
            run.measured("knn_top1")
        truth = read_ground_truth(folder / "instances.json", folder)
        read_detections(folder / "random-1" / "predictions" / "coco_instances_results.json", truth, 0.5)
    except UserError:
        return
