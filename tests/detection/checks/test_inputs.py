"""What people bring: each input trains and evaluates rightly, or is refused by --check-data and the run alike.

The table of `docs/data.md` has a line for each case here, which the last test compares.
"""

import contextlib
import copy
import json
import os
import random
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks

pytest.importorskip("detectron2")

from detection import config as configs
from detection.checks import audit, preflight
from detection.checks.content import size_or_reason
from detection.data import datasets, training_data
from detection.evaluation import evaluators
from foundation.errors import UserError

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

WIDTH, HEIGHT, SIDE = 96, 80, 30
DOCUMENT = Path(__file__).parents[3] / "docs" / "data.md"
WORKS = "used"


def corners(x):
    return [x, 10, x + SIDE, 10, x + SIDE, 40, x, 40]


def runs(x):
    """The run lengths of the square whose left side is at x."""
    middle = [SIDE, HEIGHT - SIDE] * (SIDE - 1)
    return [x * HEIGHT + 10, *middle, SIDE, WIDTH * HEIGHT - (x + SIDE - 1) * HEIGHT - 40]


def code(x):
    return coco_masks.frPyObjects({"size": [HEIGHT, WIDTH], "counts": runs(x)}, HEIGHT, WIDTH)["counts"]


def build():
    """Six images with two squares each, one of either class."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(1, 7)],
        "annotations": [
            {
                **{"id": 2 * i + kind, "image_id": i, "category_id": kind, "bbox": [x, 10, SIDE, SIDE], "iscrowd": 0},
                **{"area": SIDE**2, "segmentation": [corners(x)]},
            }
            for i in range(1, 7)
            for kind, x in ((1, 8), (2, 50))
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


def every(*path, **fields):
    """Sets fields of every annotation (or of another list) to what a function makes of the record."""
    (name,) = path or ("annotations",)

    def change(content):
        for record in content[name]:
            record.update({key: make(record) for key, make in fields.items()})

    return change


def one(key, value, name="annotations"):
    """Sets a field of the third record, of the second category."""

    def change(content):
        content[name][1 if name == "categories" else 2][key] = value

    return change


def several(key, *values):
    """Sets a field of the first annotations to one value each."""

    def change(content):
        for record, value in zip(content["annotations"], values, strict=False):
            record[key] = value

    return change


def together(*changes):
    def change(content):
        for each in changes:
            each(content)

    return change


def left(record):
    return record["bbox"][0]


def segmentation(make):
    return every(segmentation=lambda record: make(left(record)))


def coded(make):
    return segmentation(lambda x: {"size": [HEIGHT, WIDTH], "counts": make(x)})


def ids(make, key="images", field="image_id"):
    return together(every(key, id=lambda r: make(r["id"])), every("annotations", **{field: lambda r: make(r[field])}))


def crowd(**fields):
    """A third annotation in the first image, of a crowd."""

    def change(content):
        extra = {"id": 99, "image_id": 1, "category_id": 1, "bbox": [60, 50, 20, 20], "iscrowd": 1, "area": 400}
        content["annotations"].append({**extra, **fields})

    return change


CASES = {
    # Ids
    'image ids as text (`"i1"`)': (ids("i{}".format), WORKS),
    "image ids of 17 digits and more": (ids(lambda i: 12345678901234567 + i), WORKS),
    "image ids as floats (`7.0`)": (ids(float), WORKS),
    "image ids as text in `images`, as numbers in `annotations`": (every("images", id=lambda r: str(r["id"])), WORKS),
    "category ids as text": (ids(str, "categories", "category_id"), WORKS),
    "category ids as words": (ids("c{}".format, "categories", "category_id"), WORKS),
    "annotation ids as text": (every(id=lambda r: f"a{r['id']}"), WORKS),
    "an id that is null or missing": (one("id", None), "annotations[2].id is missing"),
    "an image id of an annotation that is null": (one("image_id", None), "annotations[2].image_id is missing"),
    "an id with a fraction (`1.5`)": (one("id", 1.5, "images"), "images[2].id is 1.5"),
    "two images with one id": (one("id", 1, "images"), "images[2].id is 1, which another image has"),
    "two annotations with one id": (one("id", 3), "annotations[2].id is 3, which another annotation has"),
    "two categories with one id": (one("id", 1, "categories"), "categories[1].id is 1, which another category has"),
    "two categories with one name": (
        one("name", "a", "categories"),
        "categories[1].name is 'a', which another category has: keep",
    ),
    "an annotation of an image that is not listed": (one("image_id", 77), "annotations[2].image_id is 77"),
    "an annotation of a category that is not listed": (one("category_id", 77), "annotations[2].category_id is 77"),
    # Names
    "a category name that is a number": (every("categories", name=lambda r: r["id"]), WORKS),
    "a category name that is null or missing": (one("name", None, "categories"), "categories[1].name is missing"),
    "a `file_name` that is not Unicode": (one("file_name", "\ud800.png", "images"), "images[2].file_name is"),
    "a `file_name` that is null or missing": (one("file_name", None, "images"), "images[2].file_name is missing"),
    "a `file_name` with `./` before it": (every("images", file_name=lambda r: f"./{r['id']}.png"), WORKS),
    # Sizes
    "`width` and `height` as floats (`96.0`)": (every("images", width=lambda r: 96.0, height=lambda r: 80.0), WORKS),
    "`width` and `height` as text": (every("images", width=lambda r: "96", height=lambda r: "80"), WORKS),
    "a `width` of 0": (one("width", 0, "images"), "images[2].width is 0: must be at least 1 pixel"),
    "a `width` that is null or missing": (one("width", None, "images"), "images[2].width is missing"),
    "a size that is not the file's": (one("width", 95, "images"), "images of another size than annotated: 3.png"),
    # Boxes
    "`bbox` as text": (every(bbox=lambda r: list(map(str, r["bbox"]))), WORKS),
    "a `bbox` that is null or missing": (one("bbox", None), "annotations[2].bbox is missing"),
    "a `bbox` of 3 or 5 numbers": (one("bbox", [1, 2, 3]), "annotations[2].bbox is [1, 2, 3]"),
    "a `bbox` with NaN": (one("bbox", [1, 2, float("nan"), 4]), "annotations[2].bbox is [1, 2, nan, 4]"),
    "boxes as two corners": (
        every(bbox=lambda r: [left(r), 10, left(r) + SIDE, 40]),
        "datasets whose boxes are two corners: 6 of 12 reach out of their image",
    ),
    "boxes as fractions of the image": (
        every(bbox=lambda r: [left(r) / WIDTH, 10 / HEIGHT, SIDE / WIDTH, SIDE / HEIGHT]),
        "datasets whose boxes are fractions of the image: the first is 0.3125 x 0.375 pixels",
    ),
    "`area` null, missing, text, 0, negative or a list: computed": (
        several("area", None, "x", 0, -1, []),
        WORKS,
    ),
    '`iscrowd` null, missing, `"0"` or false': (
        several("iscrowd", None, "0", False),
        WORKS,
    ),
    "`iscrowd` that is neither 0 nor 1": (one("iscrowd", 2), "annotations[2].iscrowd is 2: must be 0 or 1"),
    "`ignore` 0 or null": (every(ignore=lambda r: None if r["id"] % 2 else 0), WORKS),
    "`ignore` 1": (one("ignore", 1), "annotations marked `ignore`: annotations[2].ignore is 1"),
    # Polygons
    "polygons as points (`[[[8, 10], [38, 10], ..]]`)": (
        segmentation(lambda x: [[list(pair) for pair in zip(corners(x)[::2], corners(x)[1::2], strict=True)]]),
        WORKS,
    ),
    "one polygon as points (`[[8, 10], [38, 10], ..]`)": (
        segmentation(lambda x: [list(pair) for pair in zip(corners(x)[::2], corners(x)[1::2], strict=True)]),
        WORKS,
    ),
    "one polygon that is not in a list (`[8, 10, 38, 10, ..]`)": (segmentation(corners), WORKS),
    "polygons with coordinates as text": (segmentation(lambda x: [list(map(str, corners(x)))]), WORKS),
    "a polygon of 4 numbers that is not in a list": (one("segmentation", [1, 2, 3, 4]), "is a list of 4 numbers"),
    "a polygon with null (`[null]`, `[[null]]`)": (one("segmentation", [None]), "annotations[2].segmentation must be"),
    "a polygon with null in a list": (one("segmentation", [[None]]), "annotations[2].segmentation must be"),
    "a polygon with NaN": (one("segmentation", [[1, 2, 3, 4, 5, float("nan")]]), "a coordinate that is not finite"),
    "a polygon far outside": (one("segmentation", [[1, 2, 3, 1e300, 5, 6]]), "a coordinate beyond 1,000,000 pixels"),
    "an object without a mask, for a model with masks": (one("segmentation", None), "objects without a mask"),
    "a crowd without `segmentation`": (crowd(), WORKS),
    "a crowd with `segmentation` null": (crowd(segmentation=None), WORKS),
    # Run-length codes (INPUT.MASK_FORMAT bitmask)
    "run-length codes, compressed or not": (
        together(coded(runs), one("segmentation", {"size": [HEIGHT, WIDTH], "counts": code(8).decode()})),
        WORKS,
    ),
    "a run-length code as the text of Python bytes (`\"b'..'\"`)": (coded(lambda x: str(code(x))), WORKS),
    "a run-length code that does not fill the image": (
        coded(lambda x: [*runs(x)[:-1], runs(x)[-1] - 1]),
        "runs that cover 7679 pixels, but its size 80 x 96 has 7680",
    ),
    "a run-length code with a pixel too many": (coded(lambda x: [*runs(x), 1]), "runs that cover 7681 pixels"),
    "a run-length code of starts and lengths": (coded(lambda x: [810, 30, 890, 30]), "runs that cover 1760 pixels"),
    "a run-length code with a negative run": (coded(lambda x: [-1, 7681]), "negative runs"),
    "a compressed code that is cut off": (
        coded(lambda x: code(x).decode()[:-2]),
        "annotations[0].segmentation is",
    ),
    "a run-length code without `counts`": (
        segmentation(lambda x: {"size": [HEIGHT, WIDTH]}),
        "is a run-length code without counts",
    ),
    "a run-length code of another size than the image": (
        segmentation(lambda x: {"size": [HEIGHT, 2 * WIDTH], "counts": [2 * WIDTH * HEIGHT]}),
        "run-length codes of another size than their image",
    ),
    "a run-length code with a side of 2147483647": (
        segmentation(lambda x: {"size": [2**31 - 1, 2**31 - 1], "counts": [1]}),
        "a run-length code with the size 2147483647 x 2147483647",
    ),
    # Files
    "a JSON file with a byte order mark": (lambda c: "\ufeff" + json.dumps(c), WORKS),
    "a JSON file that is cut off": (lambda c: json.dumps(c)[:-9], "is damaged: not valid JSON"),
    "a JSON file that is nested 100,000 deep": (lambda c: "[" * 100_000, "is nested more than 100 deep"),
    "a JSON file that is not an object": (lambda c: "[]", "is not in COCO's format"),
    "only crowds": (every(iscrowd=lambda r: 1), "datasets without an image that has objects"),
}
CONTENT_IS_TEXT = ("byte order", "cut off", "nested", "not an object")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(1, 7):
        Image.new("RGB", (WIDTH, HEIGHT), (40 * i, 90, 60)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def own(tmp_path, pictures):
    """Makes a config of files with annotations; their content may be text."""
    names = []

    def call(train, test, *pairs, folder=pictures):
        for split, content in (("train", train), ("test", test)):
            file = tmp_path / f"{split}.json"
            file.write_text(content if isinstance(content, str) else json.dumps(content))
            names.append(datasets.custom_name(file, folder))
        found = ["DATASETS.TRAIN", f"({names[-2]!r},)", "DATASETS.TEST", f"({names[-1]!r},)"]
        fixed = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "INPUT.MIN_SIZE_TRAIN", "(80,)", "INPUT.MIN_SIZE_TEST", "80"]
        return configs.load("shapes_R18_FPN", [*found, *fixed, *pairs])

    yield call
    for name in names:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def verdicts(config, capsys):
    """What the start of a run says, None if nothing; and whether --check-data finds an error."""
    try:
        preflight.check(config, config.DATASETS.TRAIN, config.DATASETS.TEST)
        said = None
    except UserError as error:
        said = str(error)
    status = audit.run(config)
    printed = " ".join(capsys.readouterr().out.split())
    return said, status, printed


def evaluate(config, folder):
    """The metrics of a detector that finds the squares, and nothing else."""
    name = config.DATASETS.TEST[0]
    evaluator = evaluators.build_evaluator(config, name, folder / "predictions")
    evaluator.reset()
    mapper = training_data.evaluation_mapper(config)
    for record in DatasetCatalog.get(name):
        assert mapper(record)["image"].shape == (3, HEIGHT, WIDTH)
        detected = Instances((HEIGHT, WIDTH))
        detected.pred_boxes = Boxes(torch.tensor([[x, 10.0, x + SIDE, 40.0] for x in (8, 50)]))
        detected.scores = torch.tensor([0.9, 0.8])
        detected.pred_classes = torch.tensor([0, 1])
        detected.pred_masks = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
        for place, x in enumerate((8, 50)):
            detected.pred_masks[place, 10:40, x : x + SIDE] = True
        evaluator.process([record], [{"instances": detected}])
    return evaluator.evaluate()


@pytest.mark.parametrize("case", CASES)
def test_an_input_works_or_is_refused(case, own, tmp_path, capsys):
    change, outcome = CASES[case]
    content = build()
    changed = change(content)
    content = changed if any(words in case for words in CONTENT_IS_TEXT) and "code" not in case else content
    pairs = ["INPUT.MASK_FORMAT", "bitmask"] if "code" in case else []
    config = own(content, content, *pairs)
    said, status, printed = verdicts(config, capsys)
    if outcome != WORKS:
        assert outcome in said
        assert status == 2
        assert outcome in printed
        return
    assert (said, status) == (None, 0)
    records = DatasetCatalog.get(config.DATASETS.TRAIN[0])
    mapper = training_data.training_mapper(config)
    for record in records:
        assert sorted(mapper(record)["instances"].gt_classes.tolist()) == [0, 1]
        objects = [each for each in record["annotations"] if not each["iscrowd"]]
        boxes = [BoxMode.convert(each["bbox"], each["bbox_mode"], BoxMode.XYXY_ABS) for each in objects]
        assert boxes == [[8, 10, 38, 40], [50, 10, 80, 40]]
    metrics = evaluate(config, tmp_path)
    for task in ("bbox", "segm"):
        assert (metrics[task]["AP"], metrics[task]["APs"]) == pytest.approx((100, 100))
    results = json.loads((tmp_path / "predictions" / "coco_instances_results.json").read_text())
    content = json.loads(content.removeprefix("\ufeff")) if isinstance(content, str) else content
    assert {each["image_id"] for each in results} == {each["id"] for each in content["images"]}


def test_areas_decide_the_size_of_an_object(own, tmp_path):
    """Computed where they are not a positive number: of the mask, which is half of the box, so that it is small."""
    content = build()
    for record in content["annotations"]:
        record["bbox"], record["area"] = [*record["bbox"][:2], 40, 40], None
    config = own(content, content)
    preflight.check(config, config.DATASETS.TRAIN, config.DATASETS.TEST)
    metrics = evaluate(config, tmp_path)
    assert metrics["segm"]["APs"] == pytest.approx(100)  # 900 pixels of the mask; the box has 1600
    assert numpy.isnan(metrics["segm"]["APm"])


def test_a_test_set_without_annotations_gives_results_and_no_score(own, tmp_path, capsys):
    content = build()
    del content["annotations"]
    config = own(build(), content)
    said, status, printed = verdicts(config, capsys)
    assert (said, status) == (None, 0)
    assert "datasets without annotations" in printed
    assert evaluate(config, tmp_path) == {}
    assert len(json.loads((tmp_path / "predictions" / "coco_instances_results.json").read_text())) == 12


def test_an_empty_list_of_annotations_is_not_evaluated_instead_of_zero(own, tmp_path, capsys):
    content = build() | {"annotations": []}
    config = own(build(), content)
    assert verdicts(config, capsys)[:2] == (None, 0)
    metrics = evaluate(config, tmp_path)
    assert all(numpy.isnan(value) for task in metrics.values() for value in task.values())
    said, status, _ = verdicts(own(content, build()), capsys)
    assert "datasets without an image that has objects" in said
    assert status == 2


def test_fewer_classes_to_test_on_than_to_train_on(own, tmp_path, capsys):
    content = build()
    content["categories"] = [{"id": "only", "name": "b"}]
    content["annotations"] = [{**each, "category_id": "only"} for each in content["annotations"] if left(each) == 50]
    config = own(build(), content)
    assert verdicts(config, capsys)[:2] == (None, 0)
    assert evaluate(config, tmp_path)["bbox"]["AP"] == pytest.approx(100)
    results = json.loads((tmp_path / "predictions" / "coco_instances_results.json").read_text())
    assert {each["category_id"] for each in results} == {"only"}


def test_keypoints_of_ones_own(own, capsys):
    def points(record):
        return [left(record) + 5, 15, 2, left(record) + 25, 35, 1]

    content = build()
    every(keypoints=points)(content)
    for category in content["categories"]:
        category.update(keypoints=["left_end", "right_end"], skeleton=[[1, 2]])
    pairs = ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "2"]
    config = own(content, content, *pairs)
    with pytest.raises(UserError, match=r"2, but TEST\.KEYPOINT_OKS_SIGMAS is for 17; give the key a number for each"):
        preflight.check(config, (), config.DATASETS.TEST)
    pairs += ["TEST.KEYPOINT_OKS_SIGMAS", "[0.067, 0.067]"]
    config = own(content, content, *pairs, "INPUT.RANDOM_FLIP", "none")
    assert verdicts(config, capsys)[:2] == (None, 0)
    metadata = MetadataCatalog.get(config.DATASETS.TRAIN[0])
    assert metadata.keypoint_flip_map == [("left_end", "right_end")]
    assert datasets.known_keypoints(config.DATASETS.TRAIN[0]) == ["left_end", "right_end"]
    record = DatasetCatalog.get(config.DATASETS.TRAIN[0])[0]
    instances = training_data.training_mapper(config)(record)["instances"]
    assert instances.gt_keypoints.tensor[0].tolist() == [[13.5, 15.5, 2], [33.5, 35.5, 1]]
    content["annotations"][1]["keypoints"] = [1, 2, 3]
    said, status, _ = verdicts(own(content, content, *pairs), capsys)
    assert "annotations[1].keypoints" in said
    assert status == 2


def test_a_run_says_which_objects_it_loses(own, capsys):
    train, test = build(), build()
    several("segmentation", [[1, 2, 3, 4, 5]], [[1, 2]])(train)
    several("bbox", [8, 10, 30, 30], [8, 10, 30, 30], [8, 10, -3, 30])(train)
    several("bbox", [500, 10, 30, 30])(test)
    config = own(train, test)
    preflight.check(config, config.DATASETS.TRAIN, config.DATASETS.TEST)
    file, other = (names[0].partition(datasets.CUSTOM)[0] for names in (config.DATASETS.TRAIN, config.DATASETS.TEST))
    assert capsys.readouterr().out.splitlines() == [
        f"warning: {file}.json: objects whose polygons all have fewer than 3 points (2, the first: annotation 3 in"
        " 1.png): the object is left out, its box too; --check-data shows more",
        f"warning: {file}.json: boxes without width or height (1, the first: annotation 5 in 2.png): the object is left"
        " out; --check-data shows more",
        f"warning: {other}.json: boxes wholly outside their image (1, the first: annotation 3 in 1.png): an object that"
        " no detection can match; --check-data shows more",
    ]
    assert verdicts(config, capsys)[:2] == (None, 0)
    good = own(build(), build())
    preflight.check(good, good.DATASETS.TRAIN, good.DATASETS.TEST)
    assert capsys.readouterr().out == ""


def test_damaged_files_to_evaluate_on_are_found_before_training(own, tmp_path, pictures, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(1, 7):
        noise = numpy.random.default_rng(i).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=numpy.uint8)
        Image.fromarray(noise).save(folder / f"{i}.jpg")
    content = build()
    every("images", file_name=lambda r: f"{r['id']}.jpg")(content)
    config = own(content, content, folder=folder)
    assert verdicts(config, capsys)[:2] == (None, 0)
    whole = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"image files that are damaged: 3\.jpg"):
        preflight.check(config, (), config.DATASETS.TEST)
    preflight.check(config, config.DATASETS.TRAIN, ())  # only headers are read of what is trained on
    _, status, printed = verdicts(config, capsys)
    assert status == 2
    assert "training stops at one" in printed
    (folder / "3.jpg").write_text("<html>")
    said, status, _ = verdicts(config, capsys)
    assert "image files that cannot be read: 3.jpg" in said


def test_a_file_that_is_damaged_after_the_checks_is_named_in_one_line(own, tmp_path):
    from detection.training.trainer import TransferTrainer

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(1, 7):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{i}.png")
    config = own(build(), build(), "DATALOADER.NUM_WORKERS", "1", folder=folder)
    preflight.check(config, (), config.DATASETS.TEST)
    (folder / "1.png").write_text("<html>")
    evaluator = evaluators.build_evaluator(config, config.DATASETS.TEST[0], tmp_path)
    with pytest.raises(UserError) as raised:
        TransferTrainer.test(config, torch.nn.Identity(), [evaluator])
    assert str(raised.value).startswith(f"{folder}/1.png: ")
    assert "\n" not in str(raised.value)


def test_pictures_of_16_bits_are_read_as_in_pretraining(own, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    ramp = numpy.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(numpy.uint16)
    for i in range(1, 7):
        Image.fromarray(ramp).save(folder / f"{i}.png")
    config = own(build(), build(), folder=folder)
    preflight.check(config, config.DATASETS.TRAIN, config.DATASETS.TEST)
    record = DatasetCatalog.get(config.DATASETS.TRAIN[0])[0]
    for mapper in (training_data.training_mapper(config), training_data.evaluation_mapper(config)):
        image = mapper(record)["image"].numpy()
        assert abs(image.mean() - 127.5) < 1
        assert image[:, 0, 0].max() <= image[:, -1, -1].max()


VALUES = [
    *(None, True, False, 0, 1, -1, 2, 7.0, 1.5, 1e300, 10**400, float("nan"), float("inf")),
    *("", "1", "7.0", "x", "1e999", "b'1'", [], {}, [1], [[1, 2]], [[]], [None], ["x"], [1, 2, 3, 4]),
    *([[1, 2, 3, 4, 5, 6]], [[1, 2, 3, 4, 5, 6], [1]], [[[1, 2], [3, 4], [5, 6]]]),
    *({"size": [HEIGHT, WIDTH]}, {"counts": [1]}, {"size": [1, 1], "counts": "0"}),
]


def mutate(content, chance):
    """Replaces, removes, repeats or swaps a value anywhere in the content."""
    name = chance.choice(["images", "annotations", "annotations", "annotations", "categories"])
    records = content[name]
    record = chance.choice(records)
    key = chance.choice([*record])
    kind = chance.randrange(6)
    if kind == 0:
        del record[key]
    elif kind == 1:
        records.append(chance.choice([*records, *VALUES]))
    elif kind == 2 and isinstance(record[key], list) and record[key]:
        record[key][chance.randrange(len(record[key]))] = copy.deepcopy(chance.choice(VALUES))
    elif kind == 3:
        content[chance.choice([*content])] = copy.deepcopy(chance.choice(VALUES))
    else:
        record[key] = copy.deepcopy(chance.choice(VALUES))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_mutated_annotations_are_refused_by_both_checks_or_train_and_evaluate(seed, own, tmp_path, capsys):
    chance = random.Random(seed)
    refused = 0
    for _ in range(100):
        content = build()
        for _ in range(chance.randrange(1, 3)):
            with contextlib.suppress(LookupError, TypeError, AttributeError):  # of what was mutated before
                mutate(content, chance)
        config = own(content, content, "INPUT.MASK_FORMAT", chance.choice(["polygon", "bitmask"]))
        said, status, printed = verdicts(config, capsys)
        assert (said is None) == (status == 0), (said, printed)
        if said is not None:
            refused += 1
            assert "\n" not in said
            continue
        mapper = training_data.training_mapper(config)
        for record in DatasetCatalog.get(config.DATASETS.TRAIN[0]):
            mapper(record)
        evaluate(config, tmp_path)
    assert 20 < refused < 100


def test_the_table_of_the_documentation_has_every_case():
    text = DOCUMENT.read_text()
    for case, (_, outcome) in CASES.items():
        row = f"| {case} | {'used' if outcome == WORKS else 'refused'} |"
        assert row in text, row


def test_a_named_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert size_or_reason(tmp_path / "a.png") == "not a file"
