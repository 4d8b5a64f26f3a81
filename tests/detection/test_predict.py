"""Pictures through detectors of random weights: batches, files that are none, COCO results, what is drawn."""

import importlib.util
import json
import re
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

pytest.importorskip("detectron2")

from detection import config as configs
from detection import inference, predict
from detection.coco_results import check_replaceable, image_ids
from detection.data import datasets
from detection.evaluation import overlays
from detection.evaluation.overlays import Classes
from detection.training.trainer import TransferTrainer
from detection.video_files import VideoReader, VideoWriter
from foundation.errors import UserError

# isort: split
from detectron2.structures import Boxes, Instances

SMALL = [
    *("DATASETS.TEST", "('unknown',)", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "SOLVER.PRECISION", "float32"),
    *("TEST.DETECTIONS_PER_IMAGE", "5", "MODEL.DEVICE", "cpu"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A config file and weights of a detector of three classes that finds something everywhere."""
    folder = tmp_path_factory.mktemp("detector")
    config = configs.load("shapes_R18_FPN", SMALL)
    config, _ = configs.for_one_process(config)
    torch.manual_seed(0)
    model = TransferTrainer.build_model(config)
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    (folder / "config.yaml").write_text(config.dump())
    return ["--config", str(folder / "config.yaml"), "--weights", str(folder / "model.pth")]


@pytest.fixture
def pictures(tmp_path):
    """Seven pictures of two sizes."""
    rng = numpy.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(7):
        size = (80, 64) if index % 3 else (64, 64)
        pixels = rng.integers(0, 255, (*size, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def results(path):
    return json.loads(path.read_text())


def test_batches_find_what_single_pictures_do(recipe, pictures, tmp_path):
    one, three = tmp_path / "one.json", tmp_path / "three.json"
    predict.main([*recipe, "--json", str(one), str(pictures)])
    predict.main([*recipe, "--json", str(three), "--batch-size", "3", str(pictures)])
    assert len(results(one)) == len(results(three)) > 7
    for single, batched in zip(results(one), results(three), strict=True):
        assert (single["image_id"], single["category_id"]) == (batched["image_id"], batched["category_id"])
        assert single["score"] == pytest.approx(batched["score"], abs=1e-4)
        assert single["bbox"] == pytest.approx(batched["bbox"], abs=1e-2)
        overlap = coco_mask.iou([single["segmentation"]], [batched["segmentation"]], [0])[0, 0]
        assert overlap > 0.99 or not coco_mask.area(single["segmentation"])


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [
        ("coco_R50_RetinaNet_1x", {"image_id", "category_id", "bbox", "score"}),
        ("coco_keypoints_R50_FPN", {"image_id", "category_id", "bbox", "score", "keypoints"}),
        ("voc_semseg_R50_FPN", {"image_id", "category_id", "segmentation"}),
    ],
)
def test_other_architectures(recipe, fields, pictures, tmp_path, monkeypatch):
    sizes = [*SMALL[2:6], *("MODEL.DEVICE", "cpu", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")]
    thresholds = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "3"]
    config, _ = configs.for_one_process(configs.load(recipe, [*sizes, *thresholds]))
    torch.manual_seed(0)
    model = TransferTrainer.build_model(config).eval()
    monkeypatch.setattr(inference, "build_detector", lambda name, file: (config, model))
    unused = ["--config", "c", "--weights", "w"]
    arguments = [*unused, "--json", str(tmp_path / "found.json"), "--output", str(tmp_path / "drawn")]
    predict.main([*arguments, "--score-threshold", "0", str(pictures / "0.png"), str(pictures / "1.png")])
    found = results(tmp_path / "found.json")
    assert {each["image_id"] for each in found} == {1, 2}
    assert all(set(each) == fields for each in found)
    assert len(list((tmp_path / "drawn").iterdir())) == 2


def fail(number, reason):
    raise AssertionError(reason)


def test_pictures_wait_for_others_of_their_size_and_none_is_lost():
    class Model:
        def __init__(self):
            self.seen = []

        def __call__(self, inputs):
            self.seen.append([tuple(each["image"].shape[1:]) for each in inputs])
            return [{"sem_seg": torch.zeros(1, each["height"], each["width"])} for each in inputs]

    config = configs.load("shapes_R18_FPN", SMALL)
    sizes = [(64, 64), (64, 80), (64, 64), (64, 64), (64, 80)]
    model, pictures = Model(), [(i, Image.new("RGB", size[::-1])) for i, size in enumerate(sizes)]
    order = [number for number, _, _ in inference.in_batches(model, config, pictures, 2, fail)]
    assert order == [0, 2, 1, 4, 3]
    assert model.seen == [[(64, 64)] * 2, [(64, 80)] * 2, [(64, 64)]]
    many = [(i, Image.new("RGB", (64, 64 + i))) for i in range(20)]  # each of its own size
    assert sorted(number for number, _, _ in inference.in_batches(model, config, many, 2, fail)) == list(range(20))


def test_results_are_coco_results_with_names_beside_them(recipe, pictures, tmp_path):
    path = tmp_path / "deep" / "found.json"
    predict.main([*recipe, "--json", str(path), str(pictures / "0.png"), str(pictures / "1.png")])
    check_replaceable(path, numbered=True)  # they may be written again
    listing = json.loads((tmp_path / "deep" / "found.images.json").read_text())
    assert [(each["id"], each["width"], each["height"]) for each in listing["images"]] == [(1, 64, 64), (2, 64, 80)]
    assert listing["images"][1]["file_name"] == str(pictures / "1.png")
    assert [each["id"] for each in listing["categories"]] == [1, 2, 3]
    for record in results(path):
        assert record["category_id"] in (1, 2, 3)
        x, y, width, height = record["bbox"]
        size = listing["images"][record["image_id"] - 1]
        assert 0 <= x <= x + width <= size["width"] + 1e-3
        assert 0 <= y <= y + height <= size["height"] + 1e-3
        assert record["segmentation"]["size"] == [size["height"], size["width"]]
        assert isinstance(record["segmentation"]["counts"], str)


def test_frames_of_a_video(recipe, tmp_path, capsys):
    """A video gives what its frames give as images, in their order; a damaged one is reported, and others processed."""
    av = pytest.importorskip("av")
    folder = tmp_path / "clips"
    folder.mkdir()
    writer = VideoWriter(folder / "clip.mp4", Fraction(12))
    for number in range(5):
        noise = numpy.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=numpy.uint8)
        writer.write(Image.fromarray(noise).resize((80, 65), Image.Resampling.NEAREST))
    writer.close()
    (folder / "bad.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:500])
    frames = tmp_path / "frames"
    frames.mkdir()
    for number, (_, frame) in enumerate(VideoReader(folder / "clip.mp4").frames()):
        frame.save(frames / f"{number}.png")
    options = ["--score-threshold", "0", "--json"]
    predict.main([*recipe, *options, str(tmp_path / "images.json"), str(frames)])
    arguments = [*options, str(tmp_path / "video.json"), "--output", str(tmp_path / "drawn"), "--batch-size", "2"]
    with pytest.raises(UserError, match=r"1 of the 3 images failed: .*bad\.mp4; all others were processed"):
        predict.main([*recipe, *arguments, str(folder), str(frames / "0.png")])
    said = capsys.readouterr().out
    assert "bad.mp4 cannot be read as a video" in said
    assert f"{tmp_path / 'drawn' / 'clip.mp4'}: 25 objects in 5 frames" in said
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["0.png", "clip.mp4"]
    with av.open(str(tmp_path / "drawn" / "clip.mp4")) as drawn:
        stream = drawn.streams.video[0]
        assert (stream.average_rate, stream.frames, stream.width, stream.height) == (12, 5, 460, 368)
    listing = json.loads((tmp_path / "video.images.json").read_text())["images"]
    assert [each.get("frame") for each in listing] == [None, 0, 1, 2, 3, 4]  # images come first
    assert [each.get("seconds") for each in listing[1:3]] == [0.0, 0.083]
    expected, found = results(tmp_path / "images.json"), results(tmp_path / "video.json")
    assert [each["image_id"] - 1 for each in found if each["image_id"] > 1] == [each["image_id"] for each in expected]
    for one, two in zip(expected, [each for each in found if each["image_id"] > 1], strict=True):
        assert one["bbox"] == pytest.approx(two["bbox"], abs=1e-3)
        assert one["score"] == pytest.approx(two["score"], abs=1e-5)
    with pytest.raises(UserError, match="--annotations lists images: name the videos in a command without it"):
        predict.main([*recipe, *arguments, "--annotations", "x.json", str(folder)])


def test_a_video_without_pyav_names_the_package(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    with pytest.raises(UserError, match=r"clip\.mp4 is a video, which PyAV reads: pip install av"):
        VideoReader(tmp_path / "clip.mp4")


def test_the_ids_of_annotations(recipe, pictures, tmp_path):
    content = {
        "images": [{"id": 40 + i, "file_name": f"./pictures//{i}.png"} for i in range(7)],
        "categories": [{"id": i, "name": str(i)} for i in (9, 5, 7)],
    }
    annotations, path = tmp_path / "instances.json", tmp_path / "found.json"
    annotations.write_text(json.dumps(content))
    arguments = [*recipe, "--json", str(path), "--annotations", str(annotations)]
    predict.main([*arguments, str(pictures / "3.png")])
    assert {each["image_id"] for each in results(path)} == {43}
    assert {each["category_id"] for each in results(path)} <= {5, 7, 9}
    assert not (tmp_path / "found.images.json").exists()
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    with pytest.raises(UserError, match=r"other\.png: --annotations lists no image of that name"):
        predict.main([*arguments, str(tmp_path / "other.png")])
    annotations.write_text(json.dumps(content | {"categories": content["categories"][:2]}))
    with pytest.raises(UserError, match="--annotations has 2 categories, but the model has 3 classes"):
        predict.main([*arguments, str(pictures / "3.png")])
    annotations.write_text("[]")
    with pytest.raises(UserError, match=r"instances\.json: cannot be read as COCO annotations"):
        predict.main([*arguments, str(pictures / "3.png")])


def test_annotations_may_name_files_by_absolute_paths(tmp_path):
    file = tmp_path / "a" / "1.png"
    assert image_ids([file], {str(file): 7, "1.png": 8}) == [7]
    assert image_ids([file], {"a/1.png": 7, "1.png": 8}) == [7]
    (tmp_path / "link").symlink_to("a")
    linked = tmp_path / "link" / "1.png"
    assert image_ids([linked], {str(linked): 7, "1.png": 8}) == [7]


def test_categories_of_annotations_are_the_classes_of_that_name(coco_root):
    file = coco_root / "coco" / "annotations" / "instances_train2017.json"
    name = datasets.custom_name(file, coco_root / "coco" / "train2017")
    pairs = ["DATASETS.TRAIN", f"({name!r},)", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    config = configs.load("shapes_R18_FPN", pairs)
    assert overlays.classes_of(config).names == ["rectangle", "triangle"]
    renumbered = [{"id": "a", "name": "triangle"}, {"id": "b", "name": "rectangle"}]
    found = overlays.classes_of(config, renumbered)
    assert (found.names, found.ids) == (["rectangle", "triangle"], ["b", "a"])
    renamed = [{"id": 3, "name": "one"}, {"id": 10, "name": "two"}]
    found = overlays.classes_of(config, renamed)
    assert (found.names, found.ids) == (["one", "two"], [3, 10])
    with pytest.raises(UserError, match="categories that are not the model's classes: 'square'; name them alike"):
        overlays.classes_of(config, [{"id": 1, "name": "triangle"}, {"id": 2, "name": "square"}])


def test_ids_by_the_end_of_the_path(tmp_path):
    files = [tmp_path / "train" / "1.jpg", tmp_path / "val" / "1.jpg"]
    assert image_ids(files, None) == [1, 2]
    assert image_ids(files, {"train/1.jpg": "a", "val/1.jpg": "b", "1.jpg": "c"}) == ["a", "b"]
    with pytest.raises(UserError, match="are the same image"):
        image_ids(files, {"1.jpg": 1})


def test_files_that_are_no_pictures_are_named_when_the_others_are_done(recipe, pictures, tmp_path, capsys):
    (pictures / "3.png").write_text("<html>")
    arguments = [*recipe, "--output", str(tmp_path / "drawn"), "--json", str(tmp_path / "found.json"), str(pictures)]
    with pytest.raises(UserError, match=r"1 of the 7 images failed: .*3\.png; all others were processed"):
        predict.main(arguments)
    assert len(list((tmp_path / "drawn").iterdir())) == 6
    assert {each["image_id"] for each in results(tmp_path / "found.json")} == {1, 2, 3, 5, 6, 7}
    assert "3.png: not an image" in capsys.readouterr().out


def test_an_image_that_cannot_be_processed_fails_alone(recipe, pictures, tmp_path, capsys):
    """A strip is resized to a height of no pixel; a model that raises for one image of a batch is asked for each."""
    Image.new("RGB", (5000, 3)).save(pictures / "1.png")
    Image.new("RGB", (2000, 2)).save(pictures / "2.png")
    Image.new("RGB", (9000, 1)).save(pictures / "4.png")
    arguments = [*recipe, "--json", str(tmp_path / "found.json"), "--batch-size", "2", str(pictures)]
    with pytest.raises(UserError, match=r"\d of the 7 images failed: .*4\.png; all others were processed"):
        predict.main(arguments)
    assert {1, 4, 6, 7} <= {each["image_id"] for each in results(tmp_path / "found.json")}
    assert "an image of 9000 x 1 pixels cannot be processed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("too bright"), "too bright"),
        (torch.OutOfMemoryError("8 GB"), "the GPU is out of memory: CUDA_VISIBLE_DEVICES= uses the CPU (8 GB)"),
        (MemoryError("8 GB"), "this machine is out of memory: free some of it, or use smaller images (8 GB)"),
    ],
)
def test_a_model_that_fails_on_one_image_of_a_batch(error, said):
    class Model:
        def __call__(self, inputs):
            if any(each["image"].max() == 255 for each in inputs):
                raise error
            return [{"sem_seg": torch.zeros(1, each["height"], each["width"])} for each in inputs]

    config, failed = configs.load("shapes_R18_FPN", SMALL), {}
    images = [(i, Image.new("RGB", (64, 64), (255 * (i == 1), 0, 0))) for i in range(4)]
    found = [number for number, *_ in inference.in_batches(Model(), config, images, 4, failed.__setitem__)]
    assert found == [0, 2, 3]
    assert failed == {1: f"an image of 64 x 64 pixels cannot be processed: {said}"}


def test_where_nothing_is_found_the_threshold_is_named(recipe, pictures, tmp_path, capsys):
    predict.main([*recipe, "--json", str(tmp_path / "f.json"), "--score-threshold", "1", str(pictures / "0.png")])
    said = capsys.readouterr().out
    assert "0.png: 0 objects (highest score 0." in said
    line = said.splitlines()[-2]  # the last names the file
    assert line.startswith("no image has an object with a score of 1 or more; the highest score is 0.")
    lower = line.partition("--score-threshold ")[2].removesuffix(" draws it")
    predict.main([*recipe, "--json", str(tmp_path / "f.json"), "--score-threshold", lower, str(pictures / "0.png")])
    assert "0.png: 0 objects" not in capsys.readouterr().out


@pytest.mark.parametrize(("highest", "lower"), [(0.079, "0.07"), (0.5, "0.5"), (0.00234, "0.0023")])
def test_a_threshold_that_draws_the_best_object(highest, lower):
    assert predict._advise_on_threshold(0.6, highest).endswith(f"--score-threshold {lower} draws it")


def test_where_the_model_finds_nothing_no_threshold_helps():
    assert "whatever the threshold" in predict._advise_on_threshold(0.5, 0.0)


def test_the_threshold_of_each_class_is_taken_from_the_evaluation_of_the_run(recipe, pictures, tmp_path, capsys):
    """At 0 everything is drawn and at 1 nothing; without an evaluation the run is named."""
    folder = Path(recipe[-1]).parent
    arguments = [*recipe, "--json", str(tmp_path / "f.json"), "--score-threshold", "auto", str(pictures / "0.png")]
    with pytest.raises(UserError, match=re.escape(str(folder / "predictions" / "analysis.json"))):
        predict.main(arguments)
    (folder / "predictions").mkdir()
    for score, objects in ((0.0, 5), (1.0, 0)):
        entry = {"bbox": {"thresholds": {"best": {"score": score}, "classes": [{"name": "none", "score": None}]}}}
        (folder / "predictions" / "analysis.json").write_text(json.dumps(entry))
        predict.main(arguments)
        assert f"0.png: {objects} objects" in capsys.readouterr().out
    (overlay,) = overlays.detected(instances(), CLASSES, [0.3, 0.95])
    assert (overlay.text, round(overlay.score, 2)) == ("one", 0.4)


def test_small_pictures_are_enlarged_for_their_labels(recipe, pictures, tmp_path):
    picture = str(pictures / "1.png")
    Image.new("RGB", (470, 300)).save(tmp_path / "large.png")
    predict.main([*recipe, "--output", str(tmp_path / "drawn"), picture, str(tmp_path / "large.png")])
    assert Image.open(tmp_path / "drawn" / "1.png").size == (368, 460)
    assert Image.open(tmp_path / "drawn" / "large.png").size == (470, 300)
    predict.main([*recipe, "--output", str(tmp_path / "same"), "--scale", "1", picture])
    assert Image.open(tmp_path / "same" / "1.png").size == (64, 80)
    predict.main([*recipe, "--output", str(tmp_path / "large"), "--scale", "2.5", picture])
    assert Image.open(tmp_path / "large" / "1.png").size == (160, 200)


def test_what_is_read_is_never_overwritten(pictures, tmp_path, error_of):
    (pictures / "more").mkdir()
    command = [predict.cli, "--config", "x", "--weights", "y"]
    message = error_of(*command, pictures, "--output", pictures / "more" / "..")
    assert "0.png would be overwritten: choose another --output" in message
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps({"images": [{"id": i, "file_name": f"{i}.png"} for i in range(7)], "categories": []}))
    assert "a.json would be overwritten" in error_of(*command, pictures, "--json", listed, "--annotations", listed)


@pytest.mark.parametrize(("name", "content"), [("a.json", '{"images": []}'), ("a.images.json", '{"kind": 1}')])
def test_only_results_of_an_earlier_command_are_replaced(name, content, pictures, tmp_path):
    """Such as annotations, given to --json instead of --annotations."""
    (tmp_path / name).write_text(content)
    command = ["--config", "shapes_R18_FPN", "--weights", "none.pth", "--json", str(tmp_path / "a.json"), str(pictures)]
    with pytest.raises(UserError, match=rf"{name} does not hold results of predict.py: choose another --json"):
        predict.main(command)
    assert (tmp_path / name).read_text() == content


def test_subfolders_are_not_searched_and_named(pictures, tmp_path, capsys):
    assert len(predict.find_images([str(pictures)])) == 7
    assert capsys.readouterr().out == ""
    (pictures / "more").mkdir()
    predict.find_images([str(pictures)])
    assert "7 images and videos; it has 1 subfolder, not searched" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no images or videos in this folder .*; it has 1 subfolder, not searched"):
        predict.find_images([str(tmp_path)])


@pytest.mark.slow
def test_a_full_disk_is_one_line(recipe, pictures, tmp_path, error_of, files_up_to):
    with files_up_to(100):
        message = error_of(predict.cli, *recipe, pictures / "1.png", "--output", tmp_path / "drawn")
    assert "File too large" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name --output DIR for drawn images, or --json FILE"),
        (["--output", "d", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--output", "d", "--scale", "0"], "--scale must be above 0"),
        (["--json", "."], "--json . is a folder: name a file in it"),
        (["--output", "d", "--annotations", "f"], "--annotations gives the ids for --json FILE"),
    ],
)
def test_wrong_use(arguments, message, error_of):
    fixed = ["--config", "shapes_R18_FPN", "--weights", "none.pth", "none.jpg"]
    assert message in error_of(predict.cli, *fixed, *arguments)


def instances(**fields):
    found = Instances((30, 40))
    found.pred_boxes = Boxes(torch.tensor([[2.0, 3, 12, 23], [20, 5, 30, 25]]))
    found.scores = torch.tensor([0.9, 0.4])
    found.pred_classes = torch.tensor([1, 0])
    for name, value in fields.items():
        found.set(name, value)
    return {"instances": found}


CLASSES = Classes(["one", "two"], [10, 20], [(0, 1), (1, 2)])


def test_boxes_without_masks():
    """As RetinaNet and VOC's detectors give them."""
    (shape,) = overlays.detected(instances(), CLASSES, [0.5, 0.5])
    assert shape.box == (2, 3, 12, 23)
    assert shape.mask is None
    assert (shape.text, round(shape.score, 2)) == ("two", 0.9)
    records = inference.to_records(instances(), 7, CLASSES)
    assert [each["category_id"] for each in records] == [20, 10]
    assert records[1]["bbox"] == [20, 5, 10, 20]
    assert "segmentation" not in records[0]


def test_keypoints_are_joined_where_they_are_seen():
    spots = torch.tensor([[[3.0, 4, 0.9], [5, 6, 0.8], [7, 8, 0.01]]] * 2)
    output = instances(pred_keypoints=spots)
    records = inference.to_records(output, 7, CLASSES)
    (shape,) = overlays.detected(output, CLASSES, [0.5, 0.5])
    assert shape.points == ((3, 4), (5, 6))
    assert shape.limbs == (((3, 4), (5, 6)),)
    assert records[0]["keypoints"][:3] == pytest.approx([2.5, 3.5, 0.9])  # COCO counts pixels by their centres
    assert spots[0, 0, 0] == 3


def test_regions_of_semantic_segmentation():
    scores = torch.zeros(2, 30, 40)
    scores[1, :, 25:] = 1
    regions = overlays.detected({"sem_seg": scores}, CLASSES, [0.5, 0.5])
    assert [(overlay.text, overlay.box, int(overlay.mask.sum())) for overlay in regions] == [
        ("one", None, 750),
        ("two", None, 450),
    ]
    first, second = inference.to_records({"sem_seg": scores}, 7, CLASSES)
    assert (first["category_id"], second["category_id"]) == (10, 20)
    assert coco_mask.area(second["segmentation"]) == 450
    assert "score" not in first


def test_the_background_is_no_region():
    nothing = overlays.detected({"sem_seg": torch.ones(2, 30, 40)}, Classes(["background", "two"], [1, 2]), [0.5] * 2)
    assert nothing == []
