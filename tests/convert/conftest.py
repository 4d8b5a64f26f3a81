import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from convert.to_d2 import main


def tiny_resnet(seed, blocks=(3, 4, 6, 3), width=8):
    """A ResNet-50 by torchvision, `width` channels wide instead of 64, every tensor of it random."""
    torch.manual_seed(seed)
    network = ResNet(Bottleneck, list(blocks), num_classes=7)
    network.inplanes = width
    network.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    for stage, count in enumerate(blocks):
        layer = network._make_layer(Bottleneck, width << stage, count, stride=1 if stage == 0 else 2)
        setattr(network, f"layer{stage + 1}", layer)
    network.fc = nn.Linear(32 * width, 7)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 1 and tensor.is_floating_point():
            tensor.normal_(1.0 if "weight" in name else 0.0, 0.2)
    return network.eval()


def encoder_of(network):
    """Its tensors without classifier."""
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}


def values_of(network):
    """What has to come out of a conversion: no classifier, no counters."""
    return {
        name: tensor.numpy() for name, tensor in encoder_of(network).items() if not name.endswith("num_batches_tracked")
    }


def detectron2_name(name):
    """Detectron2's name for torchvision's, spelt out apart from the converter's own table."""
    parts = name.split(".")
    if parts[0] in ("conv1", "bn1"):
        return ".".join(["stem", "conv1", *(["norm"] if parts[0] == "bn1" else []), *parts[1:]])
    stage = f"res{int(parts[0][-1]) + 1}"
    if parts[2] == "downsample":
        return ".".join([stage, parts[1], "shortcut", *(["norm"] if parts[3] == "1" else []), parts[4]])
    return ".".join([stage, parts[1], f"conv{parts[2][-1]}", *(["norm"] if parts[2][:2] == "bn" else []), parts[3]])


def sidecar_of(output):
    """The sidecar of a conversion."""
    return json.loads(output.with_suffix(".json").read_text())


def load_pickle(path):
    with path.open("rb") as file:
        return pickle.load(file, encoding="latin1")


def assert_holds(path, expected):
    """The file has exactly the expected tensors, bit for bit, under Detectron2's names."""
    model = load_pickle(path)["model"]
    assert model.keys() == {detectron2_name(name) for name in expected}
    for name, value in expected.items():
        found = model[detectron2_name(name)]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, value, err_msg=name)


@pytest.fixture(scope="session")
def query():
    return tiny_resnet(0)


@pytest.fixture(scope="session")
def key():
    return tiny_resnet(1)


@pytest.fixture
def convert(tmp_path):
    """Run the command on a content or a file; returns the path of the output."""

    def run(content, *options, name="checkpoint.pth", output="out.pkl"):
        source = tmp_path / name
        if isinstance(content, (bytes, bytearray)):
            source.write_bytes(content)
        elif content is not None:
            torch.save(content, source)
        target = tmp_path / output
        main([str(source), str(target), *options])
        return target

    return run


@pytest.fixture
def foreign_class(monkeypatch):
    """Make a class that pickle finds in a module of that name while the test runs."""

    def make(module, name, base=dict):
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            parent = ".".join(parts[:depth])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        cls = type(name, (base,), {"__module__": module, "__qualname__": name})
        monkeypatch.setattr(sys.modules[module], name, cls, raising=False)
        return cls

    return make
