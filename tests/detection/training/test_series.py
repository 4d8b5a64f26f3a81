"""Several seeds and several learning rates: which runs there are, and what their results come to."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from detection import config as configs
from detection.training import run_folder, series
from foundation.errors import UserError


@pytest.fixture
def config(tmp_path):
    return configs.load("coco_R50_C4", ["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "6", "SEED", "4"])


class Training:
    """Stands for a training: AP is 30 + seed + 100 * rate. Runs in `failing` end before they have results."""

    def __init__(self, failing=()):
        self.failing, self.done = failing, []

    def __call__(self, config):
        folder = Path(config.OUTPUT_DIR)
        self.done.append(folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.write_config(folder, config, "shapes_R18_FPN")
        if folder.name in self.failing:
            raise UserError("the loss is not finite")
        metrics = {"AP": 30 + config.SEED + 100 * config.SOLVER.BASE_LR, "AP50": 50.0, "APl": math.nan, "AP-cat": 1.0}
        run_folder.write_json(
            folder / "results.json",
            {
                "kind": "detection",
                "iterations": config.SOLVER.MAX_ITER,
                "config_sha256": run_folder.digest(config),
                "results": {"bbox": metrics},
            },
        )


def test_the_runs_of_a_series(config, tmp_path):
    def runs(rates, seeds):
        members = series.plan(config, rates, seeds)
        return [
            (str(each.folder.relative_to(tmp_path)), each.config.SOLVER.BASE_LR, each.config.SEED) for each in members
        ]

    assert runs([], [1, 2]) == [("seed1", 0.02, 1), ("seed2", 0.02, 2)]
    assert runs([0.01, 0.1], []) == [("lr0.01", 0.01, 4), ("lr0.1", 0.1, 4)]
    assert runs([0.1], [1, 2]) == [("lr0.1/seed1", 0.1, 1), ("lr0.1/seed2", 0.1, 2)]
    assert (config.SOLVER.BASE_LR, config.SEED) == (0.02, 4)
    for rates, seeds, message in (([], [1, 1], "names a run twice"), ([0.0], [], "needs learning rates above 0")):
        with pytest.raises(UserError, match=message):
            series.plan(config, rates, seeds)


def test_mean_and_sample_standard_deviation_by_hand(config, tmp_path, capsys):
    """AP of seeds 1, 2, 6 is 33, 34, 38: mean 35, squared deviations 4 + 1 + 9 = 14, over 3 - 1 = 7."""
    series.run(tmp_path, series.plan(config, [], [1, 2, 6]), Training())
    content = json.loads((tmp_path / "seeds.json").read_text())
    assert content["planned"] == 3
    (means,) = content["means"]
    assert (means["rate"], means["count"]) == (0.02, 3)
    assert means["metrics"]["bbox/AP"] == {"mean": pytest.approx(35), "spread": pytest.approx(math.sqrt(7))}
    assert means["metrics"]["bbox/AP50"] == {"mean": 50.0, "spread": 0.0}
    assert "bbox/APl" not in means["metrics"]  # an average over nothing
    assert [(run["seed"], Path(run["folder"]).name, run["metrics"]["bbox/AP"]) for run in content["runs"]] == [
        (1, "seed1", 33.0), (2, "seed2", 34.0), (6, "seed6", 38.0),
    ]  # fmt: skip
    header, _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.split("|")] == ["", "learning rate", "runs", "bbox/AP", "bbox/AP50", ""]
    assert [cell.strip() for cell in row.split("|")] == ["", "0.02", "3", "35.00 ± 2.65", "50.00 ± 0.00", ""]


def test_a_sweep_has_a_row_for_each_rate(config, tmp_path, capsys):
    series.run(tmp_path, series.plan(config, [0.01, 0.1], []), Training())
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("| 0.")]
    assert [[cell.strip() for cell in row] for row in rows] == [["0.01", "1", "35.00"], ["0.1", "1", "44.00"]]
    assert len(json.loads((tmp_path / "sweep.json").read_text())["means"]) == 2


def test_finished_runs_are_kept_and_a_failed_one_is_repeated(config, tmp_path, capsys):
    members = series.plan(config, [], [1, 2, 3])
    first = Training(failing=["seed2"])
    with pytest.raises(UserError, match=r"1 of 3 runs failed: .*seed2: the loss is not finite"):
        series.run(tmp_path, members, first)
    assert first.done == ["seed1", "seed2", "seed3"]
    assert "| 0.02" in capsys.readouterr().out  # the table of the others
    again = Training()
    series.run(tmp_path, members, again)
    assert again.done == ["seed2"]
    assert json.loads((tmp_path / "seeds.json").read_text())["means"][0]["count"] == 3


def test_a_repeated_series_keeps_the_rows_of_the_runs_that_are_finished(config, tmp_path):
    members = series.plan(config, [], [1, 2, 3])
    series.run(tmp_path, members, Training())
    (tmp_path / "seed2" / "results.json").unlink()

    def seeds():
        return [row["seed"] for row in json.loads((tmp_path / "seeds.json").read_text())["runs"]]

    class Watching(Training):
        def __call__(self, config):
            assert seeds() == [1, 3]
            super().__call__(config)

    again = Watching()
    series.run(tmp_path, members, again)
    assert again.done == ["seed2"]
    assert seeds() == [1, 2, 3]


def test_later_seeds_join_those_that_are_finished(config, tmp_path, capsys):
    """AP of seeds 1, 3, 4 is 33, 35, 36 and their mean 34.67. Seed 2 failed, and seed 9 trained with another config."""

    def seeds(name):
        return [row["seed"] for row in json.loads((tmp_path / name).read_text())["runs"]]

    with pytest.raises(UserError, match="1 of 3 runs failed"):
        series.run(tmp_path, series.plan(config, [], [3, 2, 1]), Training(failing=["seed2"]))
    other = config.clone()
    other.SOLVER.WEIGHT_DECAY = 0.5
    Training()(series.plan(other, [], [9])[0].config)
    (tmp_path / "seed10").mkdir()  # without a config
    capsys.readouterr()
    later = Training()
    series.run(tmp_path, series.plan(config, [], [4]), later)
    assert later.done == ["seed4"]
    assert seeds("seeds.json") == [4, 1, 3]
    row = capsys.readouterr().out.partition("| 0.02")[2].split("|")
    assert [cell.strip() for cell in row[1:3]] == ["3", "34.67 ± 1.53"]


def test_a_sweep_of_one_rate_is_a_sweep(config, tmp_path):
    """And a later one has the rows of both, but not those with other seeds, nor a run with the config's own rate."""
    series.run(tmp_path, series.plan(config, [0.1], []), Training())
    assert not (tmp_path / "seeds.json").exists()
    series.run(tmp_path, series.plan(config, [], [4]), Training())
    config.SEED = 5
    series.run(tmp_path, series.plan(config, [0.03], []), Training())
    config.SEED = 4
    series.run(tmp_path, series.plan(config, [0.01], []), Training())
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert [(row["rate"], row["seed"]) for row in content["runs"]] == [(0.01, 4), (0.1, 4)]
    assert [row["rate"] for row in content["means"]] == [0.01, 0.1]
    content = json.loads((tmp_path / "seeds.json").read_text())
    assert [(row["rate"], row["seed"]) for row in content["runs"]] == [(0.02, 4)]


def test_where_every_run_fails_no_metrics_are_promised(config, tmp_path, capsys):
    with pytest.raises(UserError, match="2 of 2 runs failed"):
        series.run(tmp_path, series.plan(config, [], [1, 2]), Training(failing=["seed1", "seed2"]))
    assert "All metrics" not in capsys.readouterr().out
    assert not (tmp_path / "seeds.json").exists()


def test_finished_runs_of_other_settings_are_not_taken(config, tmp_path):
    series.run(tmp_path, series.plan(config, [], [1]), Training())
    config.SOLVER.MAX_ITER = 9  # longer: it is continued
    longer = Training()
    series.run(tmp_path, series.plan(config, [], [1]), longer)
    assert longer.done == ["seed1"]
    config.TEST.DETECTIONS_PER_IMAGE, config.DATALOADER.NUM_WORKERS = 7, 3  # evaluated by other rules, so once more
    evaluated = Training()
    series.run(tmp_path, series.plan(config, [], [1]), evaluated)
    assert evaluated.done == ["seed1"]
    config.SOLVER.WEIGHT_DECAY = 0.5
    with pytest.raises(UserError, match=r"holds a run with another config: SOLVER.WEIGHT_DECAY \(0.0001 then, 0.5 now"):
        series.run(tmp_path, series.plan(config, [], [1]), Training())
