"""Which runs are compared, which repeat one another, and the statistics over them."""

import pytest
import yaml
from matplotlib.figure import Figure

from reporting import figures
from reporting.figures import label_colours
from reporting.groups import Statistic, difference, differing_keys, label_curves, leading, settings, short_dataset
from reporting.runs import read_runs
from reporting.text import signed_text


def test_the_baseline_comes_first_and_a_folder_counts_once(linear):
    folders = [linear("corinfomax", 1, knn_top1=1.0), linear("random", 1, knn_top1=1.0)]
    (setting,) = settings(read_runs([*folders, folders[0]]).runs)
    assert setting.kind.name == "linear"
    assert [(group.label, len(group.runs)) for group in setting.groups] == [("random", 1), ("corinfomax", 1)]


def test_the_spread_of_a_difference_needs_both():
    assert difference(Statistic((1.0, 3.0)), Statistic((5.0,))).spread is None
    assert difference(Statistic((1.0, 3.0)), Statistic((5.0, 7.0))).spread == pytest.approx(2.0)


def test_bookkeeping_and_keys_of_another_version_do_not_tell_runs_apart(linear):
    folders = [linear("random", seed, knn_top1=1.0) for seed in (1, 2, 3)]
    configs = [{"LOG": {"WANDB": ""}, "A": 1}, {"LOG": {"WANDB": "mine"}, "A": 1}, {"A": 1, "B": 2}]
    for folder, config in zip(folders, configs, strict=True):
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (setting,) = settings(read_runs(folders).runs)
    assert [(group.label, len(group.runs)) for group in setting.groups] == [("random", 3)]
    (folders[0] / "config.yaml").write_text(yaml.safe_dump({"A": 3}))
    (setting,) = settings(read_runs(folders).runs)
    assert [len(group.runs) for group in setting.groups] == [1, 2]


@pytest.mark.parametrize(
    ("results", "other"),
    [
        ({"kind": "transfer", "encoder": "resnet18", "data": "flowers", "image_size": 40}, {"image_size": 224}),
        ({"kind": "transfer", "encoder": "resnet18", "data": "flowers", "stem": "cifar"}, {"stem": "imagenet"}),
        ({"kind": "finetune", "config": "tiny", "fraction": 1.0, "images": 3, "dataset": "a"}, {"dataset": "b"}),
    ],
    ids=["image size", "stem", "dataset"],
)
def test_runs_under_other_conditions_are_not_averaged(results, other, write, tmp_path):
    common = {"init": "random", "top1": 50.0} | results
    folders = [write(tmp_path / str(seed), common | {"seed": seed}) for seed in (1, 2)]
    folders.append(write(tmp_path / "3", common | {"seed": 3} | other))
    assert [[len(group.runs) for group in each.groups] for each in settings(read_runs(folders).runs)] == [[2], [1]]


def test_a_run_evaluated_by_other_rules_is_told_apart(detection, change):
    """`--eval-only` leaves config.yaml as the run began with it, and notes what it changed."""
    folders = [detection("random", seed, 10.0) for seed in (1, 2, 3)]
    for folder in folders:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"TEST": {"DETECTIONS_PER_IMAGE": 100}}))
    change(folders[2], evaluated_with={"TEST.DETECTIONS_PER_IMAGE": 7})
    (setting,) = settings(read_runs(folders).runs)
    assert sorted(len(group.runs) for group in setting.groups) == [1, 2]
    runs = [run for group in setting.groups for run in group.runs]
    assert "TEST.DETECTIONS_PER_IMAGE" in differing_keys(runs)
    change(folders[2], evaluated_with=[5])  # damaged
    (setting,) = settings(read_runs(folders).runs)
    assert [len(group.runs) for group in setting.groups] == [3]


def test_runs_that_divided_the_same_data_are_compared(detection, change, dataset, tmp_path):
    """Each has the parts in its own folder, as `train_net.py --train-json` writes them."""
    folders = [detection("random", 1, 10.0), detection("corinfomax", 1, 12.0), detection("other", 1, 9.0)]
    for folder, text in zip(folders, ("{}", "{}", "[]"), strict=True):
        names = {}
        for part in ("train", "val"):
            (folder / "data").mkdir(exist_ok=True)
            (folder / "data" / f"{part}.json").write_text(text)
            names[part] = f"{folder}/data/{part}.json@/images"
        change(folder, dataset={**dataset, "name": names["val"]})
        config = {"SOLVER": {"MAX_ITER": 40}, "DATASETS": {"TRAIN": [names["train"]], "TEST": [names["val"]]}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    same, other = settings(read_runs(folders).runs)
    assert [group.label for group in same.groups] == ["random", "corinfomax"]
    assert [group.label for group in other.groups] == ["other"]
    assert differing_keys(same.runs) == []
    folders[1].rename(tmp_path / "moved")  # its config names the old place
    (same,) = settings(read_runs([folders[0], tmp_path / "moved"]).runs)
    assert len(same.groups) == 2


def test_fine_tuning_on_folders_is_told_apart_by_the_folder(write, tmp_path):
    results = {"kind": "finetune", "config": "tiny", "fraction": 1.0, "images": 3, "dataset": "folder"}
    folders = []
    for seed, root in ((1, "/data/flowers"), (2, "/data/birds")):
        config = {"FINETUNE": {"HEAD_LR": 1.0}, "DATA": {"ROOT": root}}
        folders.append(write(tmp_path / str(seed), results | {"init": "random", "top1": 1.0, "seed": seed}, config))
    found = settings(read_runs(folders).runs)
    assert [each.name for each in found] == [
        f"tiny on {name}, 100 % of the labels (3 images)" for name in ("flowers", "birds")
    ]


def test_only_corinfomaxs_loss_has_terms(write, tmp_path):
    lines = [{"iteration": i, "total": 8.0 - i, "big_bang": 6.0, "learning_rate": 0.1} for i in (0, 1)]
    for name in ("corinfomax", "vicreg"):
        write(tmp_path / name, None, {"OBJECTIVE": {"NAME": name}, "ENCODER": {"NAME": "resnet18"}}, lines)
    found = settings(read_runs([tmp_path / "corinfomax", tmp_path / "vicreg"]).runs)
    loss, *others = Figure().subplots(1, 3)
    figures._draw_pretraining([loss, *others], found[0], label_colours(["corinfomax", "vicreg"]))
    assert len(loss.lines) == 3 + 1


def test_ap_over_the_number_of_labels(detection, change, make_report):
    folders = []
    for images, factor in ((8, 1.0), (80, 2.0), (800, 3.0)):
        for init, base in (("random", 5.0), ("corinfomax", 10.0)):
            for seed in (1, 2):
                folder = detection(init, seed, base * factor + seed, name=f"{init}-{images}-{seed}")
                folders.append(change(folder, train_images=images))
    longer = detection("random", 1, 99.0, name="longer")
    folders.append(change(longer, train_images=8, iterations=80))
    page = make_report(*folders)
    assert "labels.png" in page.files
    below = "Box AP, in percent (tiny_FPN, evaluated on tiny)"
    assert page.rows("training images", below)[0] == ["training images", "8", "80", "800"]
    assert page.rows("random", below)[0] == ["random", "99.0", "11.5 ± 0.7", "16.5 ± 0.7"]
    assert page.rows("corinfomax", below)[0] == ["corinfomax", "", "21.5 ± 0.7", "31.5 ± 0.7"]
    assert "predictions-2.png" not in page.files  # scenes of the setting with most images only
    found = settings(read_runs(folders).runs)
    assert [setting.conditions[1:3] for setting in found] == [(8, 40), (8, 80), (80, 40), (800, 40)]
    assert [setting.conditions[1] for setting in leading(found)] == [800]
    assert label_curves(found[:1]) == []
    assert leading(found[:1]) == found[:1]


def test_a_colour_belongs_to_a_name():
    assert label_colours(["corinfomax", "a", "random", "a", "b"]) == {
        **{"random": "#767676", "corinfomax": "#0072b2"},
        **{"a": "#d55e00", "b": "#009e73"},
    }


def test_the_short_name_of_a_dataset():
    assert short_dataset("/long/val.json@/long/val") == "val.json"
    assert short_dataset("coco_2017_val") == "coco_2017_val"
    assert short_dataset("a@b") == "a@b"


@pytest.mark.parametrize(
    ("base", "other", "shown"), [(100 / 3, 125 / 3, "+8.3"), (100 / 3, 50 / 3, "−16.7"), (0.0, 0.04, "0.0")]
)
def test_a_printed_difference_is_the_true_one_rounded(base, other, shown):
    """41.67 after 33.33 is 8.33 more, although 41.7 - 33.3 is 8.4."""
    assert signed_text(difference(Statistic((base,)), Statistic((other,)))) == shown


def test_a_single_value_is_drawn_as_a_point():
    axes = Figure().subplots()
    figures._line(axes, {39: 1.5}, "red", "-")
    figures._draw_group(axes, [{39: 1.5}], "red", "")
    figures._draw_group(axes, [{9: 2.0, 39: 1.5}], "red", "")
    assert [line.get_marker() for line in axes.lines] == ["o", "o", "None"]


@pytest.fixture
def sweep(tmp_path, write):
    """Runs as a sweep writes them: two learning rates, two seeds; sweep(seed of the evaluation, place of weights)."""

    def make(seed_of=lambda seed: seed, place=tmp_path / "sweep"):
        for rate, accuracy in ((0.1, 40.0), (0.2, 60.0)):
            for seed in (0, 1):
                folder = tmp_path / "sweep" / f"TRAIN.LR={rate}" / f"seed{seed}"
                config = {"SEED": seed, "OBJECTIVE": {"NAME": "corinfomax"}, "TRAIN": {"LR": rate}}
                write(folder / "pretrain", config=config)
                weights = place / folder.relative_to(tmp_path / "sweep") / "pretrain" / "encoder.safetensors"
                own = {"SEED": seed_of(seed), "LINEAR": {"LR": 1.0}}
                results = {"kind": "linear", "init": "corinfomax", "seed": seed_of(seed), "weights": str(weights)}
                write(folder / "linear", results | {"linear_top1": accuracy + 2 * seed}, own)
        untrained = {"kind": "linear", "init": "random", "weights": "random", "seed": 0, "linear_top1": 9.0}
        write(tmp_path / "sweep" / "untrained" / "seed0" / "linear", untrained, {"SEED": 0, "LINEAR": {"LR": 1.0}})
        return [setting for setting in settings(read_runs([tmp_path / "sweep"]).runs) if setting.kind.name == "linear"]

    return make


def test_a_sweeps_seeds_are_averaged_for_each_of_its_settings(sweep):
    (setting,) = sweep()
    assert [(group.label, group.seeds) for group in setting.groups] == [
        ("random", "0"),
        ("corinfomax (TRAIN.LR=0.1)", "0, 1"),
        ("corinfomax (TRAIN.LR=0.2)", "0, 1"),
    ]
    assert [group.statistic(setting.headline[0]).mean for group in setting.groups] == [9.0, 41.0, 61.0]


@pytest.mark.usefixtures("no_pictures")
def test_the_pretrainings_of_a_sweep_are_told_apart(sweep, tmp_path, make_report):
    sweep()
    page = make_report(tmp_path / "sweep")
    assert page.rows("TRAIN.LR=0.1/seed1")[0][1] == "corinfomax (TRAIN.LR=0.1)"


def test_a_moved_sweep_and_evaluations_with_one_seed_are_averaged_too(sweep, tmp_path):
    (setting,) = sweep(seed_of=lambda seed: 5, place=tmp_path / "before")
    assert [(group.label, group.seeds) for group in setting.groups[1:]] == [
        (f"corinfomax (TRAIN.LR={rate})", "5 (pretraining 0), 5 (pretraining 1)") for rate in (0.1, 0.2)
    ]


@pytest.mark.parametrize("kind", ["transfer", "finetune"])
def test_other_evaluations_of_a_sweeps_encoders_are_averaged(kind, sweep, tmp_path, write):
    sweep()
    for weights in (tmp_path / "sweep").glob("TRAIN*/seed*/pretrain"):
        name, seed = weights.parent.parent.name, int(weights.parent.name[-1])
        results = {"kind": kind, "init": "corinfomax", "seed": seed, "top1": 50.0 + seed}
        results["weights"] = str(weights / "checkpoints" / "last.pt")
        write(tmp_path / kind / name / str(seed), results)
    (setting,) = settings(read_runs([tmp_path / kind]).runs)
    assert sorted((group.label, len(group.runs)) for group in setting.groups) == [
        ("corinfomax (TRAIN.LR=0.1)", 2),
        ("corinfomax (TRAIN.LR=0.2)", 2),
    ]


def test_weights_whose_pretraining_is_not_known_are_told_apart_by_their_seeds(sweep, tmp_path):
    sweep()
    for config in (tmp_path / "sweep").glob("*/seed*/pretrain/config.yaml"):
        config.unlink()
    (setting,) = settings(read_runs([tmp_path / "sweep"]).runs)
    assert [len(group.runs) for group in setting.groups] == [1, 1, 1, 1, 1]
