"""A detector as TorchScript finds what the original finds, in images of other sizes and other contents too."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")
try:
    import onnxruntime
except ImportError:
    onnxruntime = None

from detection import config as configs
from detection import export, inference
from detection.training.trainer import TransferTrainer
from foundation.errors import UserError

SMALL = [
    *("DATASETS.TEST", "('unknown',)", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"),
    *("SOLVER.PRECISION", "float32", "MODEL.DEVICE", "cpu", "TEST.DETECTIONS_PER_IMAGE", "5"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("MODEL.RETINANET.NUM_CLASSES", "3", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"),
]
CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
NEEDS_ONNX = pytest.mark.skipif(onnxruntime is None or find_spec("onnx") is None, reason="needs onnx and onnxruntime")


def detector(recipe, seed=0, pairs=()):
    config, _ = configs.for_one_process(configs.load(recipe, [*SMALL, *pairs]))
    torch.manual_seed(seed)
    return config, TransferTrainer.build_model(config).eval()


def image(height, width, seed):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def predictor(model):
    heads = model.roi_heads.box_predictor
    return heads[-1] if isinstance(heads, torch.nn.ModuleList) else heads


@pytest.mark.parametrize(
    ("recipe", "outputs"),
    [
        ("shapes_R18_FPN", ["boxes", "classes", "masks", "scores"]),
        pytest.param("shapes_R50_C4", ["boxes", "classes", "masks", "scores"], marks=pytest.mark.slow),
        pytest.param("coco_R50_Cascade_FPN_1x_moco", ["boxes", "classes", "masks", "scores"], marks=pytest.mark.slow),
        ("coco_R50_RetinaNet_1x", ["boxes", "classes", "scores"]),
    ],
)
def test_the_exported_detector_is_the_original(recipe, outputs):
    _, model = detector(recipe)
    traced, names = export.trace(model, image(64, 80, 0))
    assert names == outputs
    assert export.compare(traced, names, model, image(96, 64, 1)) > 0
    assert export.compare(traced, names, model, image(64, 64, 2)) > 0
    _, other = detector(recipe, seed=1)
    with pytest.raises(UserError, match=r"the exported detector (finds|differs)"):
        export.compare(traced, names, other, image(64, 64, 2))


def test_the_command_leaves_a_file_that_runs_without_this_project(tmp_path, capsys):
    config, model = detector("shapes_R18_FPN")
    (tmp_path / "config.yaml").write_text(config.dump())
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    path = tmp_path / "exported" / "detector.ts"
    export.main(
        ["--config", str(tmp_path / "config.yaml"), "--weights", str(tmp_path / "model.pth"), "--output", str(path)]
    )
    assert "objects as the original, in 64x48 and 64x80 pixels" in capsys.readouterr().out
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["detector.json", "detector.ts"]
    note = json.loads(path.with_suffix(".json").read_text())
    assert (note["format"], note["min_size"], note["classes"]) == ("RGB", 64, ["class 0", "class 1", "class 2"])
    export.check_target(path, [])  # it may be exported again
    program = (
        "import sys, torch, torchvision\n"
        "detector = torch.jit.load(sys.argv[1])\n"
        "found = dict(zip(sys.argv[2].split(), detector(torch.zeros(3, 70, 90, dtype=torch.uint8))))\n"
        "print(found['boxes'].shape[1], len({'detectron2', 'detection'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(path), " ".join(note["outputs"])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "4 0\n"


@NEEDS_ONNX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "pairs"),
    [
        ("shapes_R18_FPN", []),
        ("shapes_R18_FPN", CASCADE),
        ("shapes_R50_C4", []),
        ("coco_R50_RetinaNet_1x", []),
    ],
)
def test_onnx_finds_what_the_original_finds(recipe, pairs, tmp_path, capsys):
    config, model = detector(recipe, pairs=pairs)
    (tmp_path / "config.yaml").write_text(config.dump())
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    path = tmp_path / "detector.onnx"
    fixed = ["--config", str(tmp_path / "config.yaml"), "--weights", str(tmp_path / "model.pth")]
    export.main([*fixed, "--output", str(path)])
    assert "finds the same 5 and 5 objects as the original, in 64x48 and 64x80 pixels" in capsys.readouterr().out
    assert sorted(entry.name for entry in tmp_path.iterdir() if "detector" in entry.name) == [
        "detector.json", "detector.onnx",
    ]  # fmt: skip
    names = json.loads((tmp_path / "detector.json").read_text())["outputs"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert ([each.name for each in session.get_inputs()], [each.name for each in session.get_outputs()]) == (
        ["image"], names,
    )  # fmt: skip
    other = image(70, 96, 3)  # neither of the sizes that it was compared on
    found, expected = session.run(None, {"image": other.numpy()}), export.outputs_of(model, other)
    for name, value in zip(names, found, strict=True):
        assert torch.from_numpy(value).double() == pytest.approx(expected[name].detach().double(), abs=1e-2), name


@NEEDS_ONNX
@pytest.mark.slow
def test_an_onnx_file_that_finds_something_else_is_not_kept(tmp_path, monkeypatch):
    config, model = detector("shapes_R18_FPN")
    _, other = detector("shapes_R18_FPN", seed=1)
    monkeypatch.setattr(inference, "build_detector", lambda *_, **__: (config, model))
    flat = export._flat
    monkeypatch.setattr(export, "_flat", lambda _, example: flat(other, example))
    with pytest.raises(UserError, match=r"the exported detector (finds|differs)"):
        export.main(["--config", "x", "--weights", "x", "--output", str(tmp_path / "detector.onnx")])
    assert not list(tmp_path.iterdir())


def test_onnx_is_refused_where_it_cannot_be(tmp_path, monkeypatch):
    config = configs.load("coco_keypoints_R50_FPN", SMALL)
    monkeypatch.setattr(inference, "build_detector", lambda *_, **__: (config, None))
    arguments = ["--config", "x", "--weights", "x", "--output", str(tmp_path / "detector.onnx")]
    with pytest.raises(UserError, match="a detector of keypoints is not exported as ONNX"):
        export.main(arguments)
    config, model = detector("shapes_R18_FPN")
    monkeypatch.setattr(inference, "build_detector", lambda *_, **__: (config, model))
    monkeypatch.setattr(export, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"needs .*no_such_package: pip install"):
        export.main(arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
def test_a_check_in_which_nothing_is_found_is_repeated_without_a_threshold(heads):
    pairs = ["MODEL.ROI_HEADS.NAME", heads, *CASCADE[2:]]
    _, model = detector("shapes_R18_FPN", pairs=pairs)
    predictor(model).test_score_thresh = 0.99
    images = [image(64, 80, 0), image(96, 64, 1)]
    traced, names = export.trace(model, images[0])
    assert [export.compare(traced, names, model, each) for each in images] == [0, 0]
    assert min(export.compare_without_threshold(model, images)) > 0
    assert predictor(model).test_score_thresh == 0.99
    predictor(model).test_topk_per_image = 0
    with pytest.raises(UserError, match="finds no object in the images, which proves nothing"):
        export.compare_without_threshold(model, images)


@pytest.mark.parametrize("name", [".", "results.json"])
def test_a_name_that_the_description_needs_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"must be a file whose name does not end in \.json"):
        export.main(["--config", "shapes_R18_FPN", "--weights", "none.pth", "--output", str(tmp_path / name)])


def test_the_ending_chooses_the_format_and_an_unknown_one_is_refused(tmp_path):
    assert [export.format_of(Path(f"a.{each}")) for each in ("ts", "pt", "ONNX")] == ["torchscript"] * 2 + ["onnx"]
    with pytest.raises(UserError, match=r"own\.xyz: its ending stands for no .* in \.onnx .* or in \.ts, \.pt"):
        export.main(["--config", "shapes_R18_FPN", "--weights", "none.pth", "--output", str(tmp_path / "own.xyz")])


@pytest.mark.parametrize("content", ['{"kind": "detection", "results": {}}', "[1]", "not JSON", None])
def test_a_file_of_the_name_of_the_description_that_is_not_one_is_kept(content, tmp_path):
    other = tmp_path / "results.json"
    if content is None:
        other.mkdir()
    else:
        other.write_text(content)
    with pytest.raises(UserError, match=rf"{other} is not a description .*: choose another --output than"):
        export.main(["--config", "shapes_R18_FPN", "--weights", "none.pth", "--output", str(tmp_path / "results.ts")])
    assert content is None or other.read_text() == content


def test_only_an_earlier_export_is_replaced(tmp_path):
    """Such as `--output RUN/model_best.pth`, also where `RUN/model_best.ts` has been exported."""
    checkpoint, arguments = tmp_path / "model_best.pth", ["--config", "shapes_R18_FPN", "--weights", "none.pth"]
    torch.save({"model": {"weight": torch.ones(2)}}, checkpoint)
    (tmp_path / "model_best.onnx").write_text("notes")
    for described in (False, True):
        if described:
            checkpoint.with_suffix(".json").write_text(json.dumps(dict.fromkeys(export.DESCRIPTION)))
        for name in ("model_best.pth", "model_best.onnx"):
            with pytest.raises(UserError, match=rf"{name} is not an earlier export: choose another --output"):
                export.main([*arguments, "--output", str(tmp_path / name)])
    assert torch.load(checkpoint)["model"]["weight"].tolist() == [1, 1]
    export.check_target(tmp_path / "model_best.ts", [])


@pytest.mark.parametrize("name", ["model.pth", "link.pth", "b.png"])
def test_files_that_are_read_are_not_written(name, tmp_path):
    read = {option: tmp_path / file for option, file in (("weights", "model.pth"), ("a", "a.png"), ("b", "b.png"))}
    (tmp_path / "link.pth").symlink_to(read["weights"])
    with pytest.raises(UserError, match=rf"--output .*{name} is read: choose another"):
        export.main([
            *("--config", "shapes_R18_FPN", "--weights", str(read["weights"]), "--output", str(tmp_path / name)),
            *("--images", str(read["a"]), str(read["b"])),
        ])  # fmt: skip


def test_examples_of_one_size_prove_too_little(tmp_path):
    from PIL import Image

    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    config = configs.load("shapes_R18_FPN", SMALL)
    with pytest.raises(UserError, match="both are resized to one size"):
        export.example_images(config, [str(tmp_path / "a.png"), str(tmp_path / "b.png")])


@pytest.mark.parametrize(
    ("least", "largest", "shapes"),
    [
        (0, 1333, [(3, 600, 800), (3, 1000, 800)]),  # images are not resized
        (0, 400, [(3, 300, 400), (3, 500, 400)]),
        (640, 1333, [(3, 480, 640), (3, 800, 640)]),
    ],
)
def test_examples_of_noise_have_the_sizes_that_the_detector_sees(least, largest, shapes):
    pairs = ["INPUT.MIN_SIZE_TEST", str(least), "INPUT.MAX_SIZE_TEST", str(largest)]
    examples = export.example_images(configs.load("shapes_R18_FPN", pairs), None)
    assert [example.shape for example in examples] == shapes
