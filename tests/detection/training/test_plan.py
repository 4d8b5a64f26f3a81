"""The plan for a user's own data: by hand, and from the command line."""

import json
import socket
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from detection import config as configs
from detection import train_net
from detection.checks import preflight
from detection.data import custom
from detection.data.annotations import read_annotations
from detection.data.coco_records import to_records
from detection.training import dry_run, plan, prepare, run_folder
from foundation import files
from foundation.config import recipe_name
from foundation.errors import UserError

# isort: split
from detectron2.modeling import GeneralizedRCNNWithTTA


def values(recipe, images, given=(), device="cuda", pairs=()):
    config = configs.load(recipe, pairs)
    lines = plan.apply(config, images, device, given)
    return config, lines


def test_the_plan_by_hand():
    """300 images of 500 pixels: 1,500 x 3 ** 0.64 = 3,030 iterations of 16; objects of 50 to 200 of 504 pixels."""
    objects = [0.1] * 20 + [0.2] * 60 + [0.4] * 20
    config, lines = values("coco_R50_FPN_1x_moco", plan.Images(300, 500.0, objects, masks=True))
    solver = config.SOLVER
    assert (solver.MAX_ITER, solver.STEPS, solver.IMS_PER_BATCH) == (3030, (2020, 2693), 16)
    assert (solver.BASE_LR, solver.WARMUP_ITERS) == (0.02, 303)
    assert (config.TEST.EVAL_PERIOD, solver.CHECKPOINT_PERIOD, config.TEST.PRECISE_BN.NUM_ITER) == (303, 303, 19)
    assert (config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST) == (496, 832)
    assert config.INPUT.MIN_SIZE_TRAIN == (400, 448, 496, 544, 592)
    # Middle of 49.6 and 198.4: 99; of 32 to 512: 128; the nearest octave is the recipe's own.
    assert config.MODEL.ANCHOR_GENERATOR.SIZES == [[32], [64], [128], [256], [512]]
    assert config.MODEL.MASK_ON is True
    assert "SOLVER.MAX_ITER 3030: 162 epochs of 300 images; random weights need 2 to 3 times as many" in lines


def test_small_objects_get_small_anchors_and_boxes_alone_no_mask_head():
    config, _ = values("coco_R50_FPN_1x_moco", plan.Images(10000, 900.0, [0.02] * 9 + [0.05], masks=False))
    assert config.INPUT.MIN_SIZE_TEST == 800
    sizes = config.MODEL.ANCHOR_GENERATOR.SIZES
    assert str(sizes) == "[[8], [16], [32], [64], [128]]", "whole numbers, as in the recipes"
    assert config.MODEL.MASK_ON is False
    assert pytest.approx(28580, abs=10) == config.SOLVER.MAX_ITER


def test_masks_that_are_all_broken_are_reported_instead_of_training_on_boxes(tmp_path):
    categories, images = [{"id": 1, "name": "a"}], [{"id": 1, "file_name": "a.png", "width": 96, "height": 80}]
    mask = {"size": [80, 96], "counts": [10, 20]}
    objects = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "segmentation": mask}]
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    assert plan.survey(to_records(read_annotations(file), "")).masks
    del objects[0]["segmentation"]
    file.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    assert not plan.survey(to_records(read_annotations(file), "")).masks


def test_run_length_codes_are_trained_on_as_bitmasks(tmp_path):
    config, lines = values("shapes_R18_FPN", plan.Images(100, 64.0, [0.1], masks=True, coded_masks=True), device="cpu")
    assert config.INPUT.MASK_FORMAT == "bitmask"
    assert "INPUT.MASK_FORMAT bitmask: the annotations have masks as run-length codes" in lines
    record = {"width": 96, "height": 80, "annotations": [{"bbox": [1, 2, 3, 4], "segmentation": {"size": [80, 96]}}]}
    assert plan.survey([record]).coded_masks
    record["annotations"][0]["iscrowd"] = 1  # the mask of a crowd is not learned
    assert not plan.survey([record]).coded_masks


@pytest.mark.parametrize(
    ("check", "said"), [((), "a.json has no images to train on"), (("--check-data",), "would stop a run")]
)
def test_a_file_without_images_is_refused(check, said, tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
    words = ["--config", "shapes_R18_FPN", "--train-json", str(file), "--test-json", str(file), *check]
    with pytest.raises((UserError, SystemExit)) as error:
        train_net.main([*words, "--train-images", str(tmp_path), "--test-images", str(tmp_path)])
    assert said in str(error.value) + capsys.readouterr().out


def test_a_step_of_the_learning_rate_at_the_end_is_refused(tmp_path):
    config = configs.load("shapes_R18_FPN", ["SOLVER.STEPS", "(300,)", "OUTPUT_DIR", str(tmp_path / "run")])
    with pytest.raises(UserError, match=r"SOLVER\.STEPS has 300, where the training ends"):
        prepare.check(config, resume=False)


@pytest.mark.parametrize(("side", "size"), [(800.0, 1024), (128.0, 160)])
def test_jittered_images_are_as_large_as_those_of_the_evaluation(side, size):
    images = plan.Images(100, side, [0.1], masks=True)
    config, _ = values("coco_R50_FPN_1x_moco", images, pairs=["INPUT.LSJ.ENABLED", "True"])
    assert (side, size) == (config.INPUT.MIN_SIZE_TEST, config.INPUT.LSJ.SIZE)


def test_a_run_of_one_iteration_has_no_step_of_the_learning_rate():
    pairs = ["SOLVER.MAX_ITER", "1"]
    config, _ = values("shapes_R18_FPN", plan.Images(100, 64.0, [], True), ("SOLVER.MAX_ITER",), "cpu", pairs)
    assert config.SOLVER.STEPS == ()


def test_keys_that_are_given_stay_and_others_follow_them():
    given = {"SOLVER.MAX_ITER": "90", "SOLVER.IMS_PER_BATCH": "4", "INPUT.MIN_SIZE_TEST": "96"}
    pairs = [text for pair in given.items() for text in pair]
    config, lines = values("shapes_R18_FPN", plan.Images(100, 64.0, [], True), given, "cpu", pairs)
    assert (config.SOLVER.MAX_ITER, config.SOLVER.STEPS, config.TEST.EVAL_PERIOD) == (90, (60, 80), 90)
    assert config.SOLVER.BASE_LR == 0.02  # the recipe's batch is what was given
    assert config.INPUT.MIN_SIZE_TRAIN == (80, 88, 96, 104, 112)
    assert "SOLVER.MAX_ITER 90: as given" in lines


def test_the_images_are_found_beside_the_annotations(coco_root, tmp_path):
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    assert custom.find_images(file) == coco_root / "coco" / "train2017"
    (tmp_path / "a").mkdir()
    elsewhere = tmp_path / "a" / "x.json"
    elsewhere.write_text(file.read_text())
    with pytest.raises(UserError, match=r"are not beside it .*--train-images"):
        custom.find_images(elsewhere)
    elsewhere.write_text(json.dumps({"images": [{"file_name": "..\\upload\\1.png"}]}))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").touch()
    with pytest.raises(UserError, match=r"images/1\.png is: write file_name .*'1\.png', with / instead of a backslash"):
        custom.find_images(elsewhere)
    elsewhere.write_text(json.dumps({"images": [{"file_name": "https://a.org/" + "x" * 300}]}))
    with pytest.raises(UserError, match=r"\(https://a\.org/x*\.\.\. is not there\)"):
        custom.find_images(elsewhere)
    several = [{"file_name": "gone.png"}, {"file_name": "gone2.png"}, {"id": 3}]
    elsewhere.write_text(json.dumps({"images": several}))
    with pytest.raises(UserError, match=r"\(gone\.png is not there, nor another of the first 2\)"):
        custom.find_images(elsewhere)
    elsewhere.write_text(json.dumps({"images": [*several, {"file_name": "1.png"}]}))
    assert custom.find_images(elsewhere) == tmp_path / "images"  # where others are, although the first is missing
    elsewhere.write_text("{}")
    with pytest.raises(UserError, match="it lists no images"):
        custom.find_images(elsewhere)


def test_the_keys_of_the_plan_are_listed():
    config = configs.load("shapes_R18_FPN")
    lines = plan.apply(config, plan.Images(100, 64.0, [0.1], False), "cpu", ())
    assert {line.split()[0] for line in lines} == {*plan.KEYS} - {"INPUT.MASK_FORMAT", "INPUT.LSJ.SIZE"}


def test_a_split_is_seeded_and_loses_nothing(coco_root):
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    whole = json.loads(file.read_text())
    parts = custom.divide(file, file.parent, 0.25)
    assert parts == custom.divide(file, file.parent, 0.25)
    assert [len(part["images"]) for part in parts] == [3, 1]
    for key in ("images", "annotations"):
        assert sorted(each["id"] for part in parts for each in part[key]) == [each["id"] for each in whole[key]]
    for part in parts:
        assert {each["image_id"] for each in part["annotations"]} == {each["id"] for each in part["images"]}
        assert part["categories"] == whole["categories"]
    assert custom.divide(file, file.parent, 0.25, seed=1).val["images"] != parts.val["images"]


@pytest.fixture
def merged(coco_root):
    """Annotations that list each of four files under two ids, once by another path."""
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    (coco_root / "coco" / "train2017" / "again").symlink_to(".")
    for key in ("images", "annotations"):
        content[key] += [{**each, "id": each["id"] + 100} for each in content[key]]
    for each in content["images"][4:]:
        each["file_name"] = f"again/{each['file_name']}"
    for each in content["annotations"][8:]:
        each["image_id"] += 100
    file.write_text(json.dumps(content))
    return file


def test_images_with_the_same_file_come_into_one_part(merged):
    folder = custom.find_images(merged)
    for fraction in (0.25, 0.5, 0.75):
        parts = custom.divide(merged, folder, fraction)
        files = [{custom.resolve(folder, each["file_name"]) for each in part["images"]} for part in parts]
        assert [len(each) for each in files] == [4 - 4 * fraction, 4 * fraction]
        assert not files[0] & files[1]
        assert [len(part["images"]) for part in parts] == [8 - 8 * fraction, 8 * fraction]
        assert [len(part["annotations"]) for part in parts] == [16 - 16 * fraction, 16 * fraction]
    content = json.loads(merged.read_text())
    content["images"] = [each for each in content["images"] if each["id"] % 100 == 1]
    content["annotations"] = []
    merged.write_text(json.dumps(content))
    with pytest.raises(UserError, match="cannot be split: it must list two image files or more; add images, or name"):
        custom.divide(merged, folder, 0.5)
    del content["annotations"]
    merged.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"nothing to train on: there is no list 'annotations'$"):
        custom.divide(merged, folder, 0.5)


def test_classes_that_a_split_leaves_out_of_a_part_are_named(coco_root, tmp_path, capsys):
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    assert custom.describe_absent(custom.divide(file, file.parent, 0.5)) == []
    content["categories"] += [{"id": 3 + i, "name": f"kind {i}"} for i in range(8)]  # of the last there is no object
    (held_out,) = [each["id"] for each in custom.divide(file, file.parent, 0.25).val["images"]]
    others = [each for each in content["annotations"] if each["image_id"] != held_out]
    for i, each in enumerate([*others, *others][:6]):  # six classes with an object in training alone
        content["annotations"].append({**each, "id": 100 + i, "category_id": 3 + i})
    content["annotations"].append({**others[0], "id": 200, "category_id": 9, "image_id": held_out})
    content["annotations"].append({**others[0], "id": 201, "category_id": 9, "iscrowd": "1.0"})
    file.write_text(json.dumps(content))
    words = ["--train-json", str(file), "--num-gpus", "0", "--output", str(tmp_path / "run"), "--val-fraction", "0.25"]
    prepare.configure(train_net.parse([*words, "--dry-run"]))
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "without an object" in each]
    assert line.startswith(
        "warning: the split leaves without an object 1 of 10 classes in the part to train on (kind 6) and 6 of 10"
        " classes in the part to evaluate on (kind 0, kind 1, kind 2, kind 3, kind 4, ...): name two files"
    )


def test_a_run_of_an_earlier_version_keeps_its_split_of_repeated_files(merged, tmp_path):
    run, folder = tmp_path / "run", custom.find_images(merged)
    words = ["--train-json", str(merged), "--num-gpus", "0", "--output", str(run), "--val-fraction", "0.5"]
    config = prepare.configure(train_net.parse([*words, "--config", "shapes_R18_FPN"]))
    before = custom.divide(merged, folder, 0.5, by_file=False)
    assert before != custom.divide(merged, folder, 0.5)
    custom.write_parts(before, run / "data")
    (run / "model_0000001.pth").touch()
    run_folder.write_config(run, config, "shapes_R18_FPN")
    prepare.configure(train_net.parse([*words, "--resume"]))
    assert custom.are_written(before, run / "data")


def test_images_with_one_id_are_refused_whichever_part_they_would_come_into(coco_root):
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["images"][3]["id"] = 1
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 4]
    file.write_text(json.dumps(content))
    for fraction in (0.25, 0.5, 0.75):
        with pytest.raises(UserError, match=r"instances_train2017.json: images\[3\]\.id is 1, which another image has"):
            custom.divide(file, file.parent, fraction)


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize("use", ["train", "evaluate"])
def test_messages_about_a_part_name_the_file_that_was_divided(use, options, coco_root, tmp_path):
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    images = custom.find_images(file)
    parts = custom.divide(file, images, 0.5)
    words = ["--train-json", str(file), "--train-images", str(images), "--val-fraction", "0.5", "--num-gpus", "0"]
    words += ["--output", str(tmp_path / "run")]
    image = (parts.train if use == "train" else parts.val)["images"][0]["file_name"]
    (images / image).unlink()
    config = prepare.configure(train_net.parse([*words, *options]))
    with pytest.raises(UserError, match=rf"{file} \(the part to {use} on\): images whose file is missing: .*{image}"):
        preflight.check(config, config.DATASETS.TRAIN, config.DATASETS.TEST)


def test_the_parts_of_a_run_that_has_begun_are_never_replaced(coco_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    words = ["--config", "shapes_R18_FPN", "--train-json", str(file), "--num-gpus", "0", "--val-fraction", "0.5"]
    config = prepare.configure(train_net.parse(words))
    folder = tmp_path / config.OUTPUT_DIR
    assert prepare.default_output("shapes_R18_FPN") == config.OUTPUT_DIR  # where the parts are too
    files = [Path(name.partition("@")[0]) for name in (*config.DATASETS.TRAIN, *config.DATASETS.TEST)]
    assert files == [folder / "data" / "train.json", folder / "data" / "val.json"]
    (folder / "model_0000001.pth").touch()
    run_folder.write_config(folder, config, "shapes_R18_FPN")
    before = [each.read_text() for each in files]
    with pytest.raises(UserError, match="shapes_R18_FPN already holds a run"):
        prepare.configure(train_net.parse(words))
    assert prepare.configure(train_net.parse([*words, "--resume"])).DATASETS == config.DATASETS
    for options in ([], ["--resume"]):
        for other in (["--val-fraction", "0.25"], ["OUTPUT_DIR", config.OUTPUT_DIR, "--val-fraction", "0.25"]):
            with pytest.raises(UserError, match=r"shapes_R18_FPN holds a run on other images than .* 0\.25 gives"):
                prepare.configure(train_net.parse([*words, *other, *options]))
    other = prepare.configure(train_net.parse([*words, "--val-fraction", "0.25", "OUTPUT_DIR", "other"]))
    assert other.DATASETS.TRAIN[0].startswith(f"{tmp_path}/other/data/train.json@")
    assert [each.read_text() for each in files] == before
    # Earlier versions wrote the parts of a run without --output elsewhere.
    (folder.parent / "own").mkdir()
    (folder / "data").rename(folder.parent / "own" / "data")
    config.DATASETS.TRAIN = (config.DATASETS.TRAIN[0].replace("/shapes_R18_FPN/data", "/own/data", 1),)
    run_folder.write_config(folder, config, "shapes_R18_FPN")
    assert prepare.configure(train_net.parse([*words, "--resume"])).DATASETS.TRAIN == config.DATASETS.TRAIN


def test_annotations_alone_are_enough(coco_root, tmp_path, capsys):
    """From one file to a detector's results: the recipe, the split and the schedule are worked out."""
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    arguments = ["--train-json", str(file), "--num-gpus", "0", "--output", str(tmp_path / "run")]
    config = prepare.configure(train_net.parse([*arguments, "--val-fraction", "0.5"]))
    assert (config.SOLVER.IMS_PER_BATCH, config.SOLVER.MAX_ITER) == (2, 981)
    assert config.MODEL.ROI_HEADS.NUM_CLASSES == 2
    short = ["SOLVER.MAX_ITER", "2", "TEST.PRECISE_BN.NUM_ITER", "1", "TEST.EVAL_PERIOD", "0"]
    train_net.main([*arguments, *short])
    said = capsys.readouterr().out
    assert "plan for your own data" in said
    empty, result, following = said.splitlines()[-3:]
    assert (empty, result[:7]) == ("", "box AP ")
    assert "(1 image)" in result
    assert following.endswith(f"python detection/report.py {tmp_path}/run --output {tmp_path}/run/report")
    train_net.main([*arguments, *short, "--resume"])
    assert "is finished" in capsys.readouterr().out
    train_net.main(["--output", str(tmp_path / "run"), "--resume", "--num-gpus", "0"])
    assert "is finished" in capsys.readouterr().out
    assert recipe_name(str(tmp_path / "run" / "config.yaml")) == "shapes_R18_FPN"
    # The plan is made once: a run that an earlier version began with other values is continued with those.
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("MAX_SIZE_TRAIN: 136", "MAX_SIZE_TRAIN: 256"))
    again = prepare.configure(train_net.parse([*arguments, *short, "--resume"]))
    assert again.INPUT.MAX_SIZE_TRAIN == 256
    assert again.SOLVER.MAX_ITER == 2
    # A run's own config is complete: nothing is worked out again.
    again = prepare.configure(train_net.parse(["--config", str(tmp_path / "run" / "config.yaml"), "--num-gpus", "0"]))
    assert again.SOLVER.MAX_ITER == 2
    # Another run in its place is refused, before a plan is printed.
    capsys.readouterr()
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        train_net.main([*arguments, *short])
    assert "plan for your own data" not in capsys.readouterr().out


def test_a_dry_run_says_what_a_run_comes_to_and_leaves_no_trace(coco_root, tmp_path, capsys):
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    arguments = ["--train-json", str(file), "--num-gpus", "0", "--output", str(tmp_path / "run"), "--dry-run"]
    train_net.main([*arguments, "SOLVER.MAX_ITER", "900", "SOLVER.WARMUP_ITERS", "100", "MODEL.FPN.OUT_CHANNELS", "16"])
    said = capsys.readouterr().out
    assert "3 images a step" in said
    assert "900 iterations = 900 epochs of 3 images" in said
    assert "0.0075 at 100, 0.00075 at 600, 7.5e-05 at 800" in said
    assert "9 evaluations on 1 image\n" in said
    assert "memory of this process" in said
    assert " s an iteration; training " in said
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_evaluations_of_the_average_and_with_augmentation(coco_root, tmp_path, capsys, monkeypatch):
    """Of 10 s each, but 100 s with test-time augmentation: 200 s."""
    time_evaluation = dry_run._time_evaluation

    def ten_or_a_hundred(config, model, *images):
        assert time_evaluation(config, model, *images) > 0
        return 100.0 if isinstance(model, GeneralizedRCNNWithTTA) else 10.0

    monkeypatch.setattr(dry_run, "_time_evaluation", ten_or_a_hundred)
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    arguments = ["--train-json", str(file), "--num-gpus", "0", "--output", str(tmp_path / "run"), "--dry-run"]
    arguments += ["SOLVER.MAX_ITER", "900", "TEST.EVAL_PERIOD", "100", "TEST.PRECISE_BN.ENABLED", "False"]
    arguments += ["SOLVER.EMA", "0.9", "TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48, 64)"]
    train_net.main([*arguments, "MODEL.FPN.OUT_CHANNELS", "16"])
    said = capsys.readouterr().out
    assert "10 evaluations and one with test-time augmentation on 1 image\n" in said
    assert ", evaluation 0:03:20, together " in said


def test_the_check_of_the_data_plans_for_the_images_that_a_run_trains_on(coco_root, tmp_path, capsys):
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    words = ["--train-json", str(file), "--num-gpus", "0", "--output", str(tmp_path / "run"), "--check-data"]
    with pytest.raises(SystemExit) as done:
        train_net.main(words)
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert "epochs of 3 images" in said
    assert "(training): 4 images, 8 objects, 2 classes" in said
    assert "20% of the images, drawn at random, are for evaluation" in said
    assert not (tmp_path / "run").exists()


def test_images_without_objects_do_not_count_where_training_leaves_them_out(coco_root, tmp_path, capsys):
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] < 3]
    file.write_text(json.dumps(content))
    words = ["--train-json", str(file), "--test-json", str(file), "--num-gpus", "0", "--output", str(tmp_path / "run")]
    assert prepare.configure(train_net.parse(words)).SOLVER.IMS_PER_BATCH == 2
    assert "epochs of 2 images" in capsys.readouterr().out
    kept = prepare.configure(train_net.parse([*words, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False"]))
    assert kept.SOLVER.IMS_PER_BATCH == 4


@pytest.mark.parametrize("name", ["test.json", "val.json"])
def test_a_file_of_the_users_is_never_taken_for_a_part(name, coco_root, tmp_path):
    file = tmp_path / "data" / "train.json"
    file.parent.mkdir()
    text = (coco_root / "coco" / "annotations" / "instances_train2017.json").read_text()
    for each in (file, file.with_name(name)):
        each.write_text(text)
    images, run = ["--train-images", str(coco_root / "coco" / "train2017")], tmp_path / "run"
    words = ["--config", "shapes_R18_FPN", "--num-gpus", "0", "--output", str(run), "--train-json", str(file), *images]
    both = ["--test-json", str(file.with_name(name)), "--test-images", images[1]]
    config = prepare.configure(train_net.parse([*words, *both]))
    run.mkdir()
    (run / "model_0000001.pth").touch()
    run_folder.write_config(run, config, "shapes_R18_FPN")
    with pytest.raises(UserError, match=r"holds a run (on other images|with another config)"):
        prepare.check(prepare.configure(train_net.parse([*words, "--resume"])), resume=True)
    assert [each.read_text() for each in (file, file.with_name(name))] == [text, text]


def test_one_file_for_both_has_its_folder_named_once(coco_root, tmp_path):
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    alone = tmp_path / "elsewhere" / "alone" / "x.json"
    alone.parent.mkdir(parents=True)
    alone.write_text(file.read_text())
    folder = coco_root / "coco" / "train2017"
    words = ["--train-json", str(alone), "--train-images", str(folder), "--test-json", str(alone), "--num-gpus", "0"]
    names = prepare.configure(train_net.parse(words)).DATASETS
    assert names.TRAIN == names.TEST == (f"{alone}@{folder}",)


def test_seeds_after_a_sweep_have_the_learning_rate_of_the_plan(coco_root, tmp_path):
    """And a sweep that is continued has what it was begun with."""
    file, run = str(coco_root / "coco" / "annotations" / "instances_train2017.json"), tmp_path / "run"
    words = ["--train-json", file, "--test-json", file, "--num-gpus", "0", "--output", str(run)]
    config = prepare.configure(train_net.parse(words))
    planned = config.SOLVER.BASE_LR
    config.SOLVER.BASE_LR, config.SOLVER.MAX_ITER = 0.5, 77
    (run / "lr0.5").mkdir(parents=True)
    (run / "lr0.5" / "model_0000001.pth").touch()
    run_folder.write_config(run / "lr0.5", config, "shapes_R18_FPN")
    again = prepare.configure(train_net.parse([*words, "--seeds", "1", "2"]))
    assert (again.SOLVER.BASE_LR, again.SOLVER.MAX_ITER != 77) == (planned, True)
    assert prepare.configure(train_net.parse([*words, "--sweep-lr", "0.5"])).SOLVER.MAX_ITER == 77


@pytest.mark.parametrize("option", [["--dry-run"], ["--show-data", "2"]])
def test_looking_ahead_refuses_settings_that_a_run_refuses(option, coco_root, tmp_path):
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    words = ["--train-json", str(file), "--num-gpus", "0", "--output", str(tmp_path / "run"), *option]
    with pytest.raises(UserError, match=rf"'segm/AP51' is not measured on {file} \(the part to evaluate on\); choose"):
        train_net.main([*words, "TEST.BEST_METRIC", "segm/AP51"])
    held_out = custom.divide(file, custom.find_images(file), 0.2).val["images"][0]["file_name"]
    picture = coco_root / "coco" / "train2017" / held_out
    picture.write_bytes(picture.read_bytes()[:-500])
    with pytest.raises(UserError, match=rf"the part to evaluate on\): .*{held_out}"):
        train_net.main(words)


def test_parts_that_hold_nan_are_known_again(coco_root, tmp_path):
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for each in content["annotations"]:
        each["area"] = float("nan")
    file.write_text(json.dumps(content))
    custom.write_parts(custom.divide(file, file.parent, 0.3), tmp_path)
    assert custom.are_written(custom.divide(file, file.parent, 0.3), tmp_path)
    assert not custom.are_written(custom.divide(file, file.parent, 0.6), tmp_path)


def test_machines_write_the_parts_into_one_folder_at_once(coco_root, tmp_path, monkeypatch):
    """A second one writes both while the first one does; what it may be reading already is not replaced."""
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    parts, written, write = custom.divide(file, file.parent, 0.5), [], files.write_synced

    def write_with_another(draft, content):
        write(draft, content)
        monkeypatch.setattr(files, "write_synced", write)
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
        custom.write_parts(parts, tmp_path / "data")
        written.extend(path.stat().st_ino for path in custom.part_files(tmp_path / "data"))

    monkeypatch.setattr(files, "write_synced", write_with_another)
    custom.write_parts(parts, tmp_path / "data")
    assert custom.are_written(parts, tmp_path / "data")
    assert [path.stat().st_ino for path in custom.part_files(tmp_path / "data")] == written
    assert {*(tmp_path / "data").iterdir()} == {*custom.part_files(tmp_path / "data")}


@pytest.mark.parametrize("option", [["--dry-run"], ["--show-data", "2"]])
def test_looking_ahead_refuses_what_a_run_refuses(option, coco_root, tmp_path):
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    del content["annotations"][3]["segmentation"]
    file.write_text(json.dumps(content))
    words = ["--train-json", str(file), "--test-json", str(file), "--num-gpus", "0", "--output", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"objects without a mask: annotation 4 in 001\.jpg; set MODEL\.MASK_ON False"):
        train_net.main([*words, *option])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a recipe with --config, or data of your own with --train-json"),
        (["--config", "shapes_R18_FPN", "--test-json", "a.json"], "--test-json alone goes with --eval-only"),
        (["--config", "shapes_R18_FPN", "--train-images", "a"], "--train-images is the folder of --train-json FILE"),
    ],
)
def test_wrong_use(arguments, message):
    with pytest.raises(UserError, match=message):
        prepare.configure(train_net.parse([*arguments, "--num-gpus", "0"]))
