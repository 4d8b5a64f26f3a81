"""What the rest of the project gets from a file: the same as `torch.load` gives."""

import pickle

import numpy as np
import pytest
import torch

from convert.reader import load_tensors, load_tree, read_checkpoint
from foundation.errors import UserError


def assert_same(one, other):
    """Equal types, values, orders of keys and memory formats."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.stride() == other.stride() or one.numel() == 0
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for parts in zip(one, other, strict=True):
            assert_same(*parts)
    else:
        assert one == other


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "stream"])
def test_a_tree_is_what_torch_loads(options, tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    content = {
        "model": dict(network.state_dict()),
        "optimizer": optimizer.state_dict(),
        "types": [torch.arange(5).to(kind) for kind in (torch.bfloat16, torch.float16, torch.float64, torch.int32)],
        "flags": torch.tensor([True, False]),
        "strided": torch.arange(12.0).view(3, 4).t(),
        "part": torch.arange(12.0)[3:7].clone(),
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(5.0),
        "position": {"step": 3, "lr": 0.1, "name": "x", 7: (1, 2), "none": None},
    }
    torch.save(content, tmp_path / "x.pt", **options)
    assert_same(load_tree(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True))


def test_tensors_of_one_table(tmp_path):
    """Arrays count as tensors; what is neither is left out, and so is the rest of the file."""
    array = np.asfortranarray(np.arange(6.0, dtype=">f4").reshape(2, 3))
    torch.save(
        {"model": {"a": array, "b": torch.ones(2), "c": "text", "d": 1}, "rest": torch.ones(9)}, tmp_path / "x.pth"
    )
    source = read_checkpoint(tmp_path / "x.pth")
    found = load_tensors(source, source.content["model"])
    assert found.keys() == {"a", "b"}
    assert found["a"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    with pytest.raises(UserError, match="no table of tensors"):
        load_tensors(source, ["model"])


def test_tensors_that_pickle_wrote_are_refused_with_what_to_do(tmp_path):
    path = tmp_path / "state.pkl"
    path.write_bytes(pickle.dumps({"weight": torch.ones(3)}))
    for allow_unknown in (False, True):  # unknown names as empty records would not help
        with pytest.raises(UserError, match=r"with torch\.save instead"):
            read_checkpoint(path, allow_unknown)


def test_changed_values_do_not_reach_the_file(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(3)}, path)
    before = path.read_bytes()
    load_tree(path)["a"].add_(1)
    assert path.read_bytes() == before
