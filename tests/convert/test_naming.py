"""Networks that name their tensors otherwise than torchvision, and what each of them expects of its images."""

import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch

from convert.architecture import Architecture
from convert.containers import Container
from convert.families import FAMILIES
from convert.pixels import find_pixels
from convert.reader import Source
from convert.selection import Candidate, Selection
from convert.sidecar import describe
from foundation.errors import UserError
from tests.convert.checkpoints import LINEAR, mlp, under
from tests.convert.conftest import assert_holds, detectron2_name, sidecar_of, tiny_resnet, values_of
from tests.convert.foreign_names import caffe2, haiku, hugging_face, simclr_v2


def test_hugging_face(query, convert):
    output = convert(hugging_face(query, "resnet.") | under("classifier.1.", LINEAR))
    assert_holds(output, values_of(query))
    assert sidecar_of(output)["family"] == "Hugging Face transformers"


def test_simclr_v2_takes_unnormalised_images(query, convert):
    output = convert({"resnet": simclr_v2(query) | under("fc.", LINEAR), "head": mlp("layers.", 0, 3)})
    assert_holds(output, values_of(query))
    sidecar = sidecar_of(output)
    assert (sidecar["family"], sidecar["branch"]) == ("SimCLR v2 (PyTorch)", "resnet")
    assert (sidecar["pixel_mean"], sidecar["pixel_std"]) == ([0.0] * 3, [255.0] * 3)


def test_simclr_v2_with_selective_kernels_is_refused(query, convert):
    state = simclr_v2(query)
    state["net.1.blocks.0.net.2.main_conv.0.weight"] = state.pop("net.1.blocks.0.net.2.weight")
    with pytest.raises(UserError, match="selective-kernel"):
        convert({"resnet": state, "head": {}})


ByolState = namedtuple(
    "_ByolExperimentState", ["online_params", "target_params", "online_state", "target_state", "opt_state"]
)


def test_byol_from_deepmind(query, key, convert, foreign_class):
    """Pickled with protocol 2, parameters in haiku's mapping type, beside optimizer state of a class of its own."""
    mapping = foreign_class("haiku._src.data_structures", "FlatMapping")
    state_class = foreign_class("byol.byol_experiment", "_ByolExperimentState", ByolState)
    online, target = haiku(query), haiku(key)
    optimizer = foreign_class("byol.utils.optimizers", "LarsState")({"mu": {"a": np.ones(3)}})
    experiment = state_class(mapping(online[0]), mapping(target[0]), mapping(online[1]), mapping(target[1]), optimizer)
    content = {"experiment_state": experiment, "step": np.int64(5), "rng": np.zeros(2, np.uint32)}
    data = pickle.dumps(content, protocol=2)
    output = convert(data, name="pretrain_res50x1.pkl")
    assert_holds(output, values_of(query))
    sidecar = sidecar_of(output)
    assert sidecar["family"] == "BYOL (DeepMind)"
    assert "SAME padding" in sidecar["warnings"][0]
    assert_holds(convert(data, "--branch", "target", name="b.pkl", output="target.pkl"), values_of(key))


def test_caffe2_gets_its_own_statistics_and_strides(query, convert):
    output = convert(pickle.dumps({"blobs": caffe2(query)}, protocol=2), name="R-50.pkl")
    expected = values_of(query)
    for name in expected:
        if name.endswith("running_mean"):
            expected[name] = np.zeros_like(expected[name])
        elif name.endswith("running_var"):
            expected[name] = np.full_like(expected[name], 1 - 1e-5)
    assert_holds(output, expected)
    sidecar = sidecar_of(output)
    assert (sidecar["format"], sidecar["stride_in_1x1"]) == ("BGR", True)
    assert (sidecar["pixel_mean"], sidecar["pixel_std"]) == ([103.53, 116.28, 123.675], [1.0, 1.0, 1.0])


@pytest.mark.parametrize("family", ["caffe2", "detectron2"])
@pytest.mark.parametrize(
    ("architecture", "std", "stride_in_1x1", "norm"),
    [
        (Architecture(101, (3, 4, 23, 3), 64, 64, 256, 1), (1.0, 1.0, 1.0), True, "FrozenBN"),
        (Architecture(101, (3, 4, 23, 3), 64, 256, 256, 32), (57.375, 57.12, 58.395), False, "FrozenBN"),
        (Architecture(152, (3, 8, 36, 3), 64, 256, 256, 32), (1.0, 1.0, 1.0), False, "FrozenBN"),
    ],
    ids=["R-101", "X-101-32x8d", "X-152-32x8d-IN5k"],
)
def test_resnexts_of_the_model_zoo_have_other_statistics_and_strides(
    family, architecture, std, stride_in_1x1, norm, tmp_path
):
    """As `configs/*/*_X_101_32x8d_*.yaml` of Detectron2 has them."""
    (tmp_path / "X.pkl").write_bytes(b"any")
    source = Source(tmp_path / "X.pkl", {})
    row = next(each for each in FAMILIES if each.pixels == family)
    candidate = Candidate(Container((), {}), "", row.scheme, row, {})
    selection = Selection(candidate, architecture, {})
    pixels = find_pixels(source, selection)
    assert (pixels.format, pixels.std, pixels.stride_in_1x1) == ("BGR", std, stride_in_1x1)
    assert describe(source, selection, pixels)["norm"] == norm


def test_simclr_v1_is_told_by_what_its_first_layer_has_seen(convert):
    """SimCLR v1's files have torchvision's names; only their statistics tell that images were not normalised."""
    network = tiny_resnet(3, width=16)
    kernel = network.conv1.weight.detach().sum(dim=(2, 3))
    network.bn1.running_mean.copy_(kernel @ torch.tensor([0.47, 0.44, 0.40]) + 0.001 * torch.randn(16))
    sidecar = sidecar_of(convert({"state_dict": network.state_dict()}, name="resnet50-1x.pth"))
    assert (sidecar["pixel_mean"], sidecar["pixel_std"]) == ([0.0] * 3, [255.0] * 3)
    assert "0.47, 0.44, 0.40" in sidecar["pixel_origin"]
    # Elsewhere the family's statistics stand, with a warning: bright images would look the same.
    sidecar = sidecar_of(convert(network.state_dict(), "--overwrite"))
    assert sidecar["pixel_mean"] == [123.675, 116.28, 103.53]
    assert sidecar["pixel_origin"].endswith("check whether they were normalised")
    network.bn1.running_mean.copy_(kernel @ torch.tensor([0.05, -0.03, 0.02]))
    sidecar = sidecar_of(convert({"state_dict": network.state_dict()}, "--overwrite"))
    assert sidecar["pixel_mean"] == [123.675, 116.28, 103.53]


@pytest.mark.parametrize("by_torch", [False, True], ids=["pickle", "torch.save"])
def test_what_other_converters_wrote_for_detectron2(by_torch, query, convert):
    """MoCo's converter pickles, with the classifier behind `stem.`; the one of CorInfoMax's authors, and VISSL's, hand
    numpy arrays to torch.save.
    """
    model = {detectron2_name(name): value for name, value in values_of(query).items()}
    model |= {f"stem.fc.{name}": value.numpy() for name, value in mlp("", 0, 2).items()}
    content = {"model": model, "__author__": "MOCO", "matching_heuristics": True}
    output = convert(content if by_torch else pickle.dumps(content), name="converted.pkl")
    assert_holds(output, values_of(query))
    sidecar = sidecar_of(output)
    assert (sidecar["family"], sidecar["format"], sidecar["stride_in_1x1"]) == ("Detectron2", "RGB", False)
    assert sidecar["dropped"] == {"stem.fc": 4}
