"""Which runs a report reads, of every kind, whole, unfinished or damaged."""

import json
import re
import zipfile

import pytest

from foundation.errors import UserError
from reporting.runs import read_runs


def test_a_resumed_run_replaces_what_the_killed_one_wrote(tmp_path, write):
    lines = [{"iteration": i, "total": float(i)} for i in (0, 10, 20, 30)]
    lines += [{"iteration": 20, "total": 7.0}, {"iteration": 20, "knn_top1": 1.0}]
    folder = write(tmp_path / "run", config={"SEED": 0, "OBJECTIVE": {"NAME": "corinfomax"}}, lines=lines)
    with (folder / "metrics.json").open("a") as file:
        file.write('{"iteration": 30, "tot')
    (run,) = read_runs([folder]).runs
    assert run.series("total") == {0: 0.0, 10: 10.0, 20: 7.0}
    assert run.series("knn_top1") == {20: 1.0}


def test_a_folder_of_runs_stands_for_all_in_it(tmp_path, detection, pretraining):
    detection("random", 1, 10.0, name="all/seed1")
    detection("random", 2, 12.0, name="all/seed2")
    runs = read_runs([tmp_path / "all", tmp_path / "all" / "seed2", pretraining]).runs
    assert [run.path.name for run in runs] == ["seed1", "seed2", "pretraining"]


def test_a_sweep_or_series_stands_for_its_runs(tmp_path, detection, write):
    sweep = write(tmp_path / "sweep", {"kind": "sweep", "config": "x", "runs": []})
    linear = {"kind": "linear", "init": "corinfomax", "seed": 0, "knn_top1": 1.0}
    write(sweep / "a" / "seed0" / "linear", linear)
    config = {"OBJECTIVE": {"NAME": "corinfomax"}, "TRAIN": {"EPOCHS": 3}}
    write(sweep / "a" / "seed0" / "pretrain", config=config)
    detection("random", 1, 10.0, name="series/seed1")
    (tmp_path / "series" / "seeds.json").write_text(json.dumps({"kind": "series", "runs": []}))
    runs = read_runs([sweep, tmp_path / "series"]).runs
    assert [(run.kind.name, run.init, run.state) for run in runs] == [
        ("linear", "corinfomax", "complete"),
        ("pretrain", "corinfomax", "unfinished: nothing saved (3 epochs planned)"),
        ("detection", "random", "complete"),
    ]


@pytest.mark.usefixtures("no_pictures")
def test_unfinished_runs_are_listed_as_unfinished(tmp_path, detection, write, make_report):
    detector = {"SOLVER": {"MAX_ITER": 90}, "SEED": 3}
    folder = write(tmp_path / "runs" / "killed", config=detector, lines=[{"iteration": 1, "total_loss": 1.0}])
    with zipfile.ZipFile(folder / "model_0000029.pth", "w") as checkpoint:
        checkpoint.writestr("data.pkl", b"")
    detection("random", 1, 10.0, name="runs/whole")
    page = make_report(tmp_path / "runs")
    assert page.rows(str(folder))[0] == [
        *(str(folder), "detection", "", ""),
        "left out: unfinished: continues with --resume (30 of 90 iterations)",
    ]
    assert page.rows(str(tmp_path / "runs" / "whole"))[0][-1] == "complete"
    with pytest.raises(UserError, match=r"nothing to report: .*killed: unfinished: continues with --resume"):
        read_runs([folder])


def test_folders_without_a_run_are_refused_by_name(tmp_path, write):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"there is no run in .*empty: expected one of config\.yaml"):
        read_runs([write(tmp_path / "empty")])
    poem = write(tmp_path / "poem", {"kind": "poem", "init": "random"})
    with pytest.raises(UserError, match=r"poem: results\.json names the kind 'poem', which is not one of pretr"):
        read_runs([poem])
    with pytest.raises(UserError, match=r"other: its config\.yaml is not that of a run"):
        read_runs([write(tmp_path / "other", config={"a": 1})])


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "detection", ', "is damaged: not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ("[" * 100_000, "nested more than 100 deep"),
        ('{"kind": "linear", "init": "random"}', "names another kind than detection: 'linear'"),
        ('{"kind": "detection"}', "init must name the initialisation"),
    ],
)
def test_damaged_results_are_named_and_stop_no_report(tmp_path, detection, make_report, content, message):
    damaged = detection("random", 1, 10.0, name="runs/damaged")
    (damaged / "results.json").write_text(content)
    if "linear" in content:  # identified by its results: it is then a linear run without accuracies
        assert [run.kind.name for run in read_runs([damaged]).runs] == ["linear"]
        return
    with pytest.raises(UserError, match=re.escape(str(damaged / "results.json"))) as error:
        read_runs([damaged])
    assert message in str(error.value)
    detection("corinfomax", 2, 12.0, name="runs/whole")
    page = make_report(tmp_path / "runs")
    (row,) = page.rows(str(damaged))
    assert row[-1].startswith("left out: ")
    assert page.rows("corinfomax")[0][3] == "12.0"


def test_one_bad_value_or_line_costs_itself(linear, detection, make_report, caplog):
    folders = [linear("random", 1, knn_top1="high", linear_top1=30.0), linear("corinfomax", 1, knn_top1=20.0)]
    detector = detection("random", 1, 10.0)
    with (detector / "metrics.json").open("ab") as file:
        file.write(b'5\n{}\n\xff\n{"iteration": "x", "total_loss": 1}\n{"iteration": 50, "total_loss": "x"}\n')
        file.write(b'{"iteration": 1' + b"0" * 400 + b', "total_loss": 1}\n{"iteration": 60, "total_loss": 1e999}\n')
        file.write(b"[" * 100_000 + b"\n" + b'{"iteration": 70, "total_loss": 1' + b"0" * 400 + b"}\n")
    page = make_report(*folders, detector)
    assert page.rows("random")[0] == ["random", "1", "1", "30.0", ""]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"{detector / 'metrics.json'}: skipped 3 lines, the first of them 4, because a line must be one JSON object",
        f"{folders[0] / 'results.json'}: knn_top1 is not a number and counts as not measured",
    ]
    (run,) = read_runs([detector]).runs
    assert list(run.series("total_loss")) == [19, 39]
