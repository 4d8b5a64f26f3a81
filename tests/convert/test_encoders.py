"""Encoders that other programs of this project take from any file."""

import pytest
import torch
import torchvision

from convert.encoders import read_encoder
from convert.to_d2 import main
from foundation.errors import UserError
from tests.convert.checkpoints import moco, own
from tests.convert.conftest import detectron2_name, encoder_of, load_pickle, values_of


def test_torchvision_loads_an_encoder_whole(tmp_path):
    network = torchvision.models.resnet18(weights=None)
    torch.save(moco(network, network), tmp_path / "moco.pth.tar")
    encoder = read_encoder(tmp_path / "moco.pth.tar")
    other = torchvision.models.resnet18(weights=None)
    other.fc = torch.nn.Identity()
    other.load_state_dict(encoder.tensors)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in encoder_of(network).items())
    assert (encoder.sidecar["architecture"], encoder.sidecar["stem"]) == ("resnet18", "imagenet")


def test_detectron2_names_are_those_that_the_command_writes(query, key, tmp_path):
    torch.save(moco(query, key), tmp_path / "moco.pth.tar")
    encoder = read_encoder(tmp_path / "moco.pth.tar", naming="detectron2", branch="encoder_k")
    assert encoder.tensors.keys() == {detectron2_name(name) for name in values_of(key)}
    main([str(tmp_path / "moco.pth.tar"), str(tmp_path / "out.pkl"), "--branch", "encoder_k"])
    for name, array in load_pickle(tmp_path / "out.pkl")["model"].items():
        assert torch.equal(encoder.tensors[name], torch.from_numpy(array))


def test_the_folder_of_a_run_and_its_statistics(query, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    torch.save(own(query, query), tmp_path / "checkpoints/last.pt")
    encoder = read_encoder(tmp_path)
    assert encoder.sidecar["pixel_mean"] == [127.5, 102.0, 76.5]
    assert encoder.sidecar["trained_by"] == "corinfomax"


def test_a_cifar_stem_is_for_torchvision_only(query, tmp_path):
    state = encoder_of(query) | {"conv1.weight": torch.ones(8, 3, 3, 3)}
    torch.save(state, tmp_path / "cifar.pth")
    encoder = read_encoder(tmp_path / "cifar.pth")
    assert encoder.sidecar["stem"] == "cifar"
    assert encoder.tensors["conv1.weight"].shape == (8, 3, 3, 3)
    with pytest.raises(UserError, match="CIFAR stem"):
        read_encoder(tmp_path / "cifar.pth", naming="detectron2")
    main([str(tmp_path / "cifar.pth"), str(tmp_path / "e.safetensors"), "--to", "safetensors"])
    assert read_encoder(tmp_path / "e.safetensors").sidecar["stem"] == "cifar"


def test_values_that_are_not_finite_are_refused(query, tmp_path):
    torch.save(encoder_of(query) | {"conv1.weight": torch.full((8, 3, 7, 7), float("nan"))}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"conv1\.weight holds NaN"):
        read_encoder(tmp_path / "x.pth")
