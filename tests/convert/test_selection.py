"""Which encoder of a file is taken, and the account of everything beside it."""

import pytest
import torch

from foundation.errors import UserError
from tests.convert.checkpoints import dino_full, moco, own, slotcon, under
from tests.convert.conftest import assert_holds, encoder_of, sidecar_of, values_of


def test_own_statistics_and_account(query, key, convert):
    sidecar = sidecar_of(convert(own(query, key)))
    assert sidecar["pixel_mean"] == [127.5, 102.0, 76.5]
    assert sidecar["pixel_std"] == [51.0, 51.0, 25.5]
    assert (sidecar["format"], sidecar["stride_in_1x1"], sidecar["stem"]) == ("RGB", False, "imagenet")
    assert sidecar["dropped"] == {
        "num_batches_tracked": 53,
        "objective (another table)": 2,
        "optimizer (another table)": 1,
        "projector": 4,
    }


def test_branch_takes_the_other_encoder(query, key, convert):
    assert_holds(convert(moco(query, key), "--branch", "encoder_k"), values_of(key))
    assert_holds(convert(dino_full(query, key), "--branch", "student", output="b.pkl"), values_of(query))
    with pytest.raises(UserError, match="it has: model:encoder_k, model:encoder_q"):
        convert(slotcon(query, key), "--branch", "backbone", output="c.pkl")


def test_two_equal_candidates_need_a_choice(query, key, convert):
    content = under("left.", encoder_of(query)) | under("right.", encoder_of(key))
    with pytest.raises(UserError, match="several encoders"):
        convert(content)
    assert_holds(convert(content, "--branch", "right"), values_of(key))
    twice = under("left.", encoder_of(query)) | under("right.", encoder_of(query))
    assert_holds(convert(twice, output="twice.pkl"), values_of(query))


def test_unknown_tensors_are_an_error_until_dropped(query, convert):
    content = under("backbone.", encoder_of(query)) | {"mystery.weight": torch.ones(3)}
    with pytest.raises(UserError, match=r"mystery\.weight.*--drop"):
        convert(content)
    output = convert(content, "--drop", "mystery")
    assert sidecar_of(output)["dropped"]["mystery"] == 1


@pytest.mark.parametrize(
    ("label", "beside"),
    [("model_ema", ["n_averaged", "module.fc.weight"]), ("ema_state_dict", ["steps", "module.head.fc.weight"])],
    ids=["torchvision's references", "mmengine"],
)
def test_averaged_weights_with_their_count(label, beside, query, key, convert):
    averaged = under("module.", encoder_of(key)) | dict.fromkeys(beside, torch.ones(3))
    content = {"model": encoder_of(query), label: averaged}
    assert_holds(convert(content), values_of(query))
    assert_holds(convert(content, "--branch", label, "--overwrite"), values_of(key))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
def test_other_number_formats_become_float32(dtype, legacy, query, convert, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in encoder_of(query).items() if tensor.is_floating_point()}
    torch.save(state, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=not legacy)
    assert_holds(convert(None), {name: tensor.float().numpy() for name, tensor in state.items()})


def test_transposed_and_shared_storages(query, convert):
    """Channels-last kernels have other strides, and a flat buffer may hold every parameter."""
    state = encoder_of(query.to(memory_format=torch.channels_last))
    names = [name for name in state if state[name].dtype == torch.float32]
    flat = torch.cat([state[name].flatten() for name in names])
    views = dict(zip(names, flat.split([state[name].numel() for name in names]), strict=True))
    shared = {name: views[name].view(state[name].shape) for name in names}
    query.to(memory_format=torch.contiguous_format)
    assert_holds(convert(state), values_of(query))
    assert_holds(convert(shared, "--overwrite"), values_of(query))


def test_a_broken_query_side_is_not_replaced_silently(query, key, convert):
    content = moco(query, key)
    del content["state_dict"]["module.encoder_q.layer4.2.bn3.bias"]
    with pytest.raises(UserError, match=r"layer4\.2\.bn3\.bias is missing.*--branch can take state_dict:encoder_k"):
        convert(content)
