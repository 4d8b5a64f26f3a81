import json
import logging
import pickle
import re
import shlex

import numpy
import pytest
import safetensors.torch
import torch
import torchvision

pytest.importorskip("detectron2")

from convert import to_d2
from convert.sidecar_files import read_sidecar
from detection import config as configs
from detection.training import checkpoints, trainer, weights
from detection.training import model as modeling
from foundation.errors import UserError
from tests.convert.hostile import dtype_with_objects


def build(name, *overrides):
    config, _ = configs.for_one_process(configs.load(name, overrides))
    config.MODEL.DEVICE = "cpu"
    return trainer.TransferTrainer.build_model(config)


@pytest.fixture(scope="module")
def c4():
    return build("shapes_R50_C4")


@pytest.fixture(scope="module")
def fpn():
    return build("shapes_R18_FPN")


def converted(model, seed=1):
    """What the converter would write for the backbone of `model`: other values under short names."""
    rng = numpy.random.default_rng(seed)
    found = {}
    for key, value in model.state_dict().items():
        for place in ("backbone.bottom_up.", "backbone.", "roi_heads."):
            short = key.removeprefix(place)
            if short != key and short.split(".")[0] in ("stem", "res2", "res3", "res4", "res5"):
                found[short] = rng.random(value.shape, dtype=numpy.float32)
                break
    return {k: v for k, v in found.items() if "num_batches" not in k and not k.startswith("res5.norm")}


def write(path, tensors):
    content = {"model": tensors, "__author__": "test", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    return path


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("name", "count"), [("c4", 265), ("fpn", 100)])
def test_every_backbone_tensor_comes_from_the_file(name, count, request, tmp_path):
    """265: the 53 convolutions of a ResNet-50 with weight, and scale, shift, mean, variance of their norms."""
    model = request.getfixturevalue(name)
    tensors = converted(model)
    assert len(tensors) == count
    before = snapshot(model)
    assert weights.load_backbone(model, write(tmp_path / "w.pkl", tensors)) == []
    state, filled = model.state_dict(), 0
    for key, value in state.items():
        short = key.replace("backbone.bottom_up.", "").replace("backbone.", "").replace("roi_heads.res5", "res5")
        if short in tensors:
            assert torch.equal(value, torch.from_numpy(tensors[short])), key
            filled += 1
        else:
            assert torch.equal(value, before[key]), key
    assert filled == count


def test_only_the_extra_norm_stays_as_it_was(c4, tmp_path):
    path = write(tmp_path / "w.pkl", converted(c4))
    weights.load_backbone(c4, path)
    norm = c4.roi_heads.res5.norm
    assert torch.equal(norm.weight, torch.ones(2048))
    assert torch.equal(norm.running_mean, torch.zeros(2048))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("stem.conv1.weight"), r"stem\.conv1\.weight \(missing\)"),
        (lambda t: t.update({"res4.3.conv2.wieght": t.pop("res4.3.conv2.weight")}), r"res4\.3\.conv2\.weight \(mis"),
        (lambda t: t.pop("res5.2.conv3.norm.running_var"), r"res5\.2\.conv3\.norm\.running_var \(missing\)"),
        (lambda t: t.update({"stem.conv1.weight": t["stem.conv1.weight"][:, :, 2:5, 2:5]}), r"\(64, 3, 3, 3\) inst"),
        (lambda t: t["res2.0.conv1.weight"].fill(numpy.nan), r"res2\.0\.conv1\.weight \(not finite\)"),
        (lambda t: t.update({"res4.6.conv1.weight": t["res4.5.conv1.weight"]}), r"no such layer in the model"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_one_wrong_tensor_and_nothing_is_loaded(spoil, message, c4, tmp_path):
    tensors = converted(c4, seed=2)
    spoil(tensors)
    before = snapshot(c4)
    with pytest.raises(UserError, match=message):
        weights.load_backbone(c4, write(tmp_path / "w.pkl", tensors))
    assert all(torch.equal(value, before[key]) for key, value in c4.state_dict().items())


def test_weights_of_another_depth_are_refused(fpn, c4, tmp_path):
    with pytest.raises(UserError, match=r"fit the 100 tensors of the backbone"):
        weights.load_backbone(fpn, write(tmp_path / "w.pkl", converted(c4)))


def test_a_classifier_has_no_place_and_does_no_harm(fpn, tmp_path):
    tensors = converted(fpn) | {"fc.weight": numpy.zeros((2, 2), numpy.float32)}
    assert weights.load_backbone(fpn, write(tmp_path / "w.pkl", tensors)) == ["fc.weight"]


def test_the_backbone_of_a_whole_detector_serves_too(fpn, tmp_path):
    torch.save({"model": build("shapes_R18_FPN").state_dict(), "iteration": 3}, tmp_path / "model_final.pth")
    weights.load_backbone(fpn, tmp_path / "model_final.pth")


PIXELS = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1")


def test_a_detector_of_the_model_zoo_is_taken_for_one(fpn, tmp_path):
    """As `to_d2` takes it; a config that contradicts is refused before a training, and its own is believed."""
    path = tmp_path / "model_final_f10217.pkl"
    tensors = {name: value.numpy() for name, value in fpn.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": tensors, "__author__": "Detectron2 Model Zoo"}))
    config = configs.load("shapes_R18_FPN", ["MODEL.WEIGHTS", str(path)])
    with pytest.raises(UserError, match=r"needs INPUT\.FORMAT BGR, but the config has RGB; set .* beside the file$"):
        modeling.check(config, whole=False)
    modeling.check(config, whole=True)  # an evaluation, by a config of which nothing says that it is wrong
    lines = weights.adopt(config, weights.describe(path), given=())
    assert [line.split()[0] for line in lines] == [*PIXELS, "colour"]
    assert "put the config.yaml of its run beside the file" in lines[-1]
    assert (config.INPUT.FORMAT, config.MODEL.PIXEL_STD) == ("BGR", [1.0, 1.0, 1.0])
    modeling.check(config, whole=False)


@pytest.mark.parametrize("name", ["model_final.pth", "."])
def test_the_config_of_a_detectors_run_describes_its_weights(name, fpn, tmp_path):
    own = configs.load("shapes_R18_FPN", ["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", "[1.0, 2.0, 3.0]"])
    (tmp_path / "config.yaml").write_text(own.dump())
    checkpoints.write(tmp_path / "model_final.pth", {"model": fpn.state_dict(), "iteration": 3})
    config = configs.load("shapes_R18_FPN", ["MODEL.WEIGHTS", str(tmp_path / name)])
    with pytest.raises(UserError, match=r"needs INPUT\.FORMAT BGR, but the config has RGB; set INPUT\.FORMAT BGR$"):
        modeling.check(config, whole=False)
    lines = weights.adopt(config, weights.describe(tmp_path / name), given=())
    assert [line.split()[0] for line in lines] == list(PIXELS[:2])
    assert config.MODEL.PIXEL_MEAN == [1.0, 2.0, 3.0]
    modeling.check(config, whole=False)
    if name == "model_final.pth":
        modeling.check(config, whole=True)
        config.INPUT.FORMAT = "RGB"
        with pytest.raises(UserError, match=r"needs INPUT\.FORMAT BGR"):
            modeling.check(config, whole=True)


def test_a_detector_that_the_converter_cannot_read_is_not_described(tmp_path, caplog):
    model = build("shapes_R18_FPN", "MODEL.RESNETS.NORM", "GN")
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    logging.getLogger("detection").propagate = True
    assert weights.describe(tmp_path / "model.pth") == {}
    assert "pixel statistics of the weights are not known: " in caplog.text
    weights.load_backbone(model, tmp_path / "model.pth")


def test_arrays_in_a_torch_archive_are_weights(c4, tmp_path):
    """The converter of CorInfoMax's authors hands numpy arrays to `torch.save`."""
    tensors = converted(c4)
    torch.save({"model": tensors, "__author__": "x", "matching_heuristics": True}, tmp_path / "w.pth")
    weights.load_backbone(c4, tmp_path / "w.pth")
    assert torch.equal(
        c4.state_dict()["backbone.res2.0.conv1.weight"], torch.from_numpy(tensors["res2.0.conv1.weight"])
    )


def test_a_detector_is_loaded_whole_or_not(fpn, tmp_path):
    state = build("shapes_R18_FPN").state_dict()
    torch.save({"model": state}, tmp_path / "a.pth")
    weights.load_detector(fpn, tmp_path / "a.pth")
    assert all(torch.equal(value, state[key]) for key, value in fpn.state_dict().items())
    state.pop("roi_heads.box_predictor.cls_score.weight")
    torch.save({"model": state}, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"tensors of the detector: roi_heads\.box_predictor\.cls_score\.weight"):
        weights.load_detector(fpn, tmp_path / "b.pth")
    state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(6, 256)  # of another number of classes
    torch.save({"model": state}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"\(\(6, 256\) instead of \(9, 256\)\); give the config\.yaml of the run"):
        weights.load_detector(fpn, tmp_path / "c.pth")


class Evil:
    def __reduce__(self):
        return print, ("code from a pickle ran",)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_no_code_of_a_file_is_run(suffix, tmp_path, capsys):
    path = tmp_path / f"evil{suffix}"
    path.write_bytes(pickle.dumps({"model": {"x": Evil()}, "__author__": "x"}))
    with pytest.raises(UserError, match=r"asks for builtins\.print.*nothing of it was run"):
        weights.read_weights(path)
    assert capsys.readouterr().out == ""


def test_a_number_type_with_objects_is_no_pointer(tmp_path):
    """numpy itself would take eight bytes of this file for a pointer, and crash."""
    (tmp_path / "w.pkl").write_bytes(dtype_with_objects())
    with pytest.raises(UserError, match=r"w\.pkl"):
        weights.read_weights(tmp_path / "w.pkl")


def test_a_checkpoint_that_is_not_as_it_was_saved_is_refused(fpn, tmp_path):
    path = tmp_path / "model_final.pth"
    checkpoints.write(path, {"model": fpn.state_dict()})
    weights.load_detector(fpn, path)
    digest = path.with_suffix(".sha256")
    digest.write_text(f"{digest.read_text().strip()}  {path.name}\n")  # as sha256sum has it
    weights.load_detector(fpn, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # torch itself would load it
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model_final\.pth cannot be read as weights: .* sha256"):
        weights.load_detector(fpn, path)


def test_what_is_no_file_of_weights_is_said(tmp_path):
    with pytest.raises(UserError, match="there is no such file of weights"):
        weights.read_weights(tmp_path / "none.pkl")
    (tmp_path / "text.pkl").write_text("<html>")
    with pytest.raises(UserError, match=r"text\.pkl is a web page"):
        weights.read_weights(tmp_path / "text.pkl")
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"blobs": {}}))
    with pytest.raises(UserError, match=r"no entry 'model'.*convert/to_d2\.py"):
        weights.read_weights(tmp_path / "other.pkl")


NOTE = {
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
    "format": "RGB",
    "stride_in_1x1": False,
    "depth": 50,
    "family": "corinfomax",
}


def test_a_note_that_agrees_is_returned(tmp_path):
    (tmp_path / "w.pkl").touch()
    (tmp_path / "w.json").write_text(json.dumps(NOTE))
    assert weights.check_sidecar(tmp_path / "w.pkl", configs.load("coco_R50_C4"))["family"] == "corinfomax"
    assert weights.check_sidecar(tmp_path / "without.pkl", configs.load("coco_R50_C4")) == {}


@pytest.mark.parametrize(
    ("field", "value", "key"),
    [
        ("pixel_mean", [0.0, 0.0, 0.0], "MODEL.PIXEL_MEAN"),
        ("pixel_std", [255.0, 255.0, 255.0], "MODEL.PIXEL_STD"),
        ("format", "BGR", "INPUT.FORMAT"),
        ("stride_in_1x1", True, "MODEL.RESNETS.STRIDE_IN_1X1"),
        ("depth", 18, "MODEL.RESNETS.DEPTH"),
    ],
)
def test_a_note_that_disagrees_names_the_key(field, value, key, tmp_path):
    (tmp_path / "w.pkl").touch()
    (tmp_path / "w.json").write_text(json.dumps(NOTE | {field: value}))
    with pytest.raises(UserError, match=re.escape(f"; set {key} {shlex.quote(str(value))}")):
        weights.check_sidecar(tmp_path / "w.pkl", configs.load("coco_R50_C4"))


def test_a_note_that_is_no_json_is_said(tmp_path):
    (tmp_path / "w.json").write_text("{")
    with pytest.raises(UserError, match=r"w\.json"):
        read_sidecar(tmp_path / "w.pkl")


@pytest.fixture
def foreign(tmp_path):
    """A checkpoint of torchvision's naming, with a classifier, as anyone may have it."""
    torch.manual_seed(3)
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), path)
    return path


def test_what_the_converter_takes_is_converted_on_the_way(fpn, foreign, tmp_path):
    """To the very tensors that `to_d2` writes."""
    assert weights.load_backbone(fpn, foreign) == []
    on_the_way = snapshot(fpn)
    to_d2.main([str(foreign), str(tmp_path / "w.pkl")])
    weights.load_backbone(fpn, tmp_path / "w.pkl")
    assert all(torch.equal(value, on_the_way[key]) for key, value in fpn.state_dict().items())
    sidecar = weights.describe(foreign)
    assert (sidecar["depth"], sidecar["format"]) == (18, "RGB")


def test_a_run_folder_is_read(fpn, tmp_path):
    (tmp_path / "run").mkdir()
    network = torchvision.models.resnet18(num_classes=3)
    network.fc = torch.nn.Identity()
    about = {"format": "corinfomax-encoder", "architecture": "resnet18", "stem": "imagenet"}
    about |= {"mean": "0.4,0.5,0.6", "std": "0.2,0.2,0.2"}
    safetensors.torch.save_file(network.state_dict(), tmp_path / "run" / "encoder.safetensors", about)
    weights.load_backbone(fpn, tmp_path / "run")
    assert torch.equal(fpn.backbone.bottom_up.stem.conv1.weight, network.conv1.weight)
    assert weights.describe(tmp_path / "run")["pixel_mean"] == pytest.approx([102.0, 127.5, 153.0])
    # The folder of a detector gives its newest checkpoint.
    checkpoints.write(tmp_path / "model_0000001.pth", {"model": build("shapes_R18_FPN").state_dict(), "iteration": 1})
    weights.load_backbone(fpn, tmp_path)
    assert not torch.equal(fpn.backbone.bottom_up.stem.conv1.weight, network.conv1.weight)


def test_what_cannot_be_converted_is_sent_to_the_converter(fpn, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"run python convert/to_d2\.py .*x\.pth weights\.pkl"):
        weights.load_backbone(fpn, path)


def test_keys_that_follow_from_the_weights_are_taken_from_them():
    config = configs.load("coco_R50_FPN_1x_moco")
    changed = NOTE | {"pixel_mean": [1.0, 2.0, 3.0], "depth": 18, "format": "BGR", "resnets": {"NUM_GROUPS": 1}}
    lines = weights.adopt(config, changed, given=["INPUT.FORMAT"])
    assert config.MODEL.PIXEL_MEAN == [1.0, 2.0, 3.0]
    assert (config.MODEL.RESNETS.DEPTH, config.INPUT.FORMAT) == (18, "RGB")
    assert [line.split()[0] for line in lines] == ["MODEL.PIXEL_MEAN", "MODEL.RESNETS.DEPTH"]
