"""Checkpoints: their format, and what happens when a file is damaged or cannot be written."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from foundation.errors import UserError
from pretrain.encoder import build_encoder
from pretrain.runs import checkpoint


def state(step: int) -> dict[str, Any]:
    return {
        "format": checkpoint.PRETRAIN,
        "model": {"w": torch.full((1000,), float(step))},
        "position": {"step": step},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step))
    return tmp_path


def test_the_newest_two_are_kept_and_last_points_to_the_newest(run: Path) -> None:
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [
        "last.pt",
        "step_000000002.pt",
        "step_000000002.sha256",
        "step_000000003.pt",
        "step_000000003.sha256",
    ]
    assert checkpoint.load(run / "checkpoints" / "last.pt")["position"] == {"step": 3}


@pytest.mark.parametrize("damage", ["flip a bit", "truncate", "empty"])
def test_a_damaged_newest_falls_back_to_the_one_before(run: Path, damage: str) -> None:
    newest = run / "checkpoints" / "step_000000003.pt"
    content = bytearray(newest.read_bytes())
    if damage == "flip a bit":
        content[len(content) // 2] ^= 1
    newest.write_bytes({"truncate": content[:-1], "empty": b""}.get(damage, content))
    loaded = checkpoint.load_newest(run)
    assert loaded is not None
    assert loaded["position"] == {"step": 2}
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(newest)


def test_all_damaged_is_an_error_and_not_a_new_beginning(run: Path) -> None:
    for path in (run / "checkpoints").glob("step_*.pt"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        checkpoint.load_newest(run)
    assert checkpoint.load_newest(run / "other") is None


def test_a_save_that_fails_leaves_the_earlier_ones(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"cannot save .*No space left .*free\); earlier checkpoints are"):
        checkpoint.save(run, state(4))
    assert not list((run / "checkpoints").glob("*.tmp"))
    monkeypatch.undo()
    loaded = checkpoint.load_newest(run)
    assert loaded is not None
    assert loaded["position"] == {"step": 3}


def test_a_first_save_that_fails_promises_no_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_000000004.pt.tmp").symlink_to("/dev/full")
    large = {**state(4), "model": {"w": torch.zeros(1_000_000)}}
    message = r"No space left on device \(\d+ MB free, 5 MB needed\); there is no checkpoint before it: make room, and"
    with pytest.raises(UserError, match=message):
        checkpoint.save(tmp_path, large)
    assert not checkpoint.exists(tmp_path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"<html>")
    with pytest.raises(UserError, match="is a web page"):
        checkpoint.load(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load(tmp_path / "y.pt")


class _Marker:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_malicious_file_runs_nothing(tmp_path: Path) -> None:
    torch.save({"format": checkpoint.PRETRAIN, "version": 1, "model": _Marker(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="nothing of it was run"):
        checkpoint.load(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_exported_encoder_loads_into_torchvision_and_timm(tmp_path: Path) -> None:
    import timm
    import torchvision

    encoder = build_encoder("resnet18", "imagenet").eval()
    path = tmp_path / "encoder.safetensors"
    checkpoint.export_encoder(path, encoder, {"architecture": "resnet18"})
    tensors = safetensors.torch.load_file(path)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for other in (torchvision.models.resnet18(), timm.create_model("resnet18", num_classes=0)):
        other.fc = nn.Identity()
        other.load_state_dict(tensors)
        torch.testing.assert_close(other.eval()(images), encoder(images), rtol=1e-5, atol=1e-5)


def test_exported_encoder_is_the_same_file_in_every_process(tmp_path: Path) -> None:
    path, tensors = tmp_path / "encoder.safetensors", {"weight": torch.arange(3.0), "steps": torch.tensor(7)}
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    about = {key: f'"{key}", Größe' for key in "hgfedcba"}
    checkpoint.export_encoder(path, module, about)
    header = json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert list(header["__metadata__"]) == sorted([*about, "format"])
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "corinfomax-encoder", **about}
    assert all(torch.equal(tensor, safetensors.torch.load_file(path)[name]) for name, tensor in tensors.items())


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    tensors = build_encoder("resnet18", "cifar").state_dict()
    with pytest.raises(UserError, match=r"1 of another shape \(conv1.weight"):
        checkpoint.fill(build_encoder("resnet18", "imagenet"), tensors, tmp_path)
    with pytest.raises(UserError, match="absent"):
        checkpoint.fill(build_encoder("resnet34", "imagenet"), tensors, tmp_path)
