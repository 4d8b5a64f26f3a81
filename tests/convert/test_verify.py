"""The numeric proof, and forward parity of what comes out with Detectron2's own network."""

import importlib
import pickle

import numpy as np
import pytest
import torch
import torchvision

from convert.export import Float32Arrays
from convert.pixels import find_pixels
from convert.reader import read_checkpoint
from convert.selection import select
from convert.verify import verify
from convert.writer import write_detectron2
from foundation.errors import UserError
from tests.convert.conftest import load_pickle, tiny_resnet
from tests.convert.foreign_names import caffe2, hugging_face, simclr_v2
from tests.convert.test_families import FAMILIES

try:
    importlib.import_module("foundation.detectron2_compat")
except UserError:
    pytest.skip("Detectron2 is not installed", allow_module_level=True)
pytest.importorskip("detectron2")


@pytest.fixture(scope="module")
def backbone():
    """Detectron2's ResNet-50 at the width of the tests."""
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.resnet import build_resnet_backbone

    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()


def assert_parity(network, backbone, path):
    """Torchvision's network and Detectron2's give the same features at every stage."""
    state = {name: torch.from_numpy(array) for name, array in load_pickle(path)["model"].items()}
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    assert unexpected == []
    assert [name for name in missing if "num_batches" not in name] == []
    images = torch.randn(2, 3, 65, 97, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        made = backbone(images)
        features = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        for stage in (1, 2, 3, 4):
            features = getattr(network, f"layer{stage}")(features)
            assert (features - made[f"res{stage + 1}"]).abs().max() < 1e-4 * max(1.0, float(features.abs().max()))


@pytest.mark.parametrize("family", FAMILIES, ids=[row[0].__name__ for row in FAMILIES])
def test_forward_parity_of_every_family(family, query, key, convert, backbone):
    build, _, _, side = family
    assert_parity(query if side == "q" else key, backbone, convert(build(query, key)))


@pytest.mark.parametrize("build", [hugging_face, simclr_v2])
def test_forward_parity_of_other_names(build, query, convert, backbone):
    state = build(query, "resnet.") if build is hugging_face else {"resnet": build(query)}
    assert_parity(query, backbone, convert(state))


def test_verify_compares_both_detectors(query, convert, capsys):
    convert(query.state_dict(), "--verify")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["FPN", "C4"]
    for line in lines[:2]:
        assert all(float(value) < 1e-4 for value in line.split()[4::2])


def test_verify_of_strides_in_the_1x1_convolution(query, convert):
    """A Caffe2 model: BGR, other statistics, no running statistics of its own."""
    data = pickle.dumps({"blobs": caffe2(query)})
    output = convert(data, "--verify", name="R-50.pkl")
    assert output.exists()


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_verify_of_basic_blocks(name, convert, capsys):
    convert(getattr(torchvision.models, name)(weights=None).state_dict(), "--verify")
    assert capsys.readouterr().out.startswith("FPN")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d", "resnext101_32x8d"])
def test_verify_of_large_networks(name, convert, capsys):
    convert(getattr(torchvision.models, name)(weights=None).state_dict(), "--verify")
    assert capsys.readouterr().out.count("largest difference") == 2


@pytest.mark.slow
def test_verify_of_a_network_twice_as_wide(convert, capsys):
    convert(tiny_resnet(2, width=128).state_dict(), "--verify")
    assert capsys.readouterr().out.count("largest difference") == 2


def test_verify_refuses_what_is_not_the_same(query, convert, tmp_path):
    """One changed weight, and one swapped pair of tensors, in the written file."""
    output = convert(query.state_dict())
    source = read_checkpoint(tmp_path / "checkpoint.pth")
    selection = select(source)
    arrays = Float32Arrays(selection.tensors, source)
    model = load_pickle(output)["model"]
    swapped = {**model, "res2.1.conv1.norm.weight": model["res2.1.conv1.norm.bias"]}
    changed = {**model, "res4.5.conv3.weight": model["res4.5.conv3.weight"] + np.float32(1e-3)}
    for wrong in (swapped, changed):
        with output.open("wb") as file:
            write_detectron2(file, wrong, "test")
        with pytest.raises(UserError, match="1 tensors were not loaded"):
            verify(output, arrays, selection.architecture, find_pixels(source, selection))


def test_verify_compares_features_and_not_only_tensors(query, convert, tmp_path, monkeypatch):
    output = convert(query.state_dict())
    source = read_checkpoint(tmp_path / "checkpoint.pth")
    selection = select(source)
    model = load_pickle(output)["model"]
    model["res4.5.conv3.weight"] += np.float32(1e-2)
    with output.open("wb") as file:
        write_detectron2(file, model, "test")
    monkeypatch.setattr("convert.verify._check_tensors", lambda *arguments: None)
    arrays = Float32Arrays(selection.tensors, source)
    with pytest.raises(UserError, match="FPN: res4, res5 differ from the source network"):
        verify(output, arrays, selection.architecture, find_pixels(source, selection))


def test_a_failed_verification_writes_nothing(query, convert, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise UserError("res4 differs")

    monkeypatch.setattr("convert.verify.verify", refuse)
    with pytest.raises(UserError, match="res4 differs"):
        convert(query.state_dict(), "--verify")
    assert not (tmp_path / "out.pkl").exists()
    assert not (tmp_path / "out.json").exists()
