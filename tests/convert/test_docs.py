"""The commands in the documentation run as they stand there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision

from convert import from_d2, to_d2
from convert.families import FAMILIES
from convert.sidecar import lazy_settings
from tests.convert.checkpoints import moco, own, under
from tests.convert.conftest import load_pickle

TEXT = (Path(__file__).parents[2] / "docs" / "converter.md").read_text()


def test_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = torchvision.models.resnet18(weights=None)
    Path("run/checkpoints").mkdir(parents=True)
    torch.save(own(network, network), "run/checkpoints/last.pt")
    torch.save(moco(network, network), "moco_v2_800ep_pretrain.pth.tar")
    commands = [shlex.split(line) for line in re.findall(r"^python (convert/.*)$", TEXT, re.MULTILINE)]
    assert len(commands) == 7
    try:
        import foundation.detectron2_compat  # noqa: F401
    except Exception:
        commands = [[word for word in command if word != "--verify"] for command in commands]
    for script, *arguments in commands:
        if script.endswith("from_d2.py"):
            model = {name: torch.from_numpy(value) for name, value in load_pickle(Path("moco_v2.pkl"))["model"].items()}
            torch.save({"model": under("backbone.bottom_up.", model)}, "model_final.pth")
            Path("config.yaml").write_text(
                "INPUT: {FORMAT: RGB}\nMODEL:\n  PIXEL_MEAN: [123.675, 116.28, 103.53]\n"
                "  PIXEL_STD: [58.395, 57.12, 57.375]\n  RESNETS: {STRIDE_IN_1X1: false}\n"
            )
            from_d2.main(arguments)
        else:
            to_d2.main(arguments)
    assert {"corinfomax.pkl", "moco_v2.pth", "momentum.json", "encoder.safetensors"} <= {
        path.name for path in Path().iterdir()
    }


def blocks():
    return re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_lazy_config_is_what_the_command_prints():
    pytest.importorskip("detectron2")
    import foundation.detectron2_compat  # noqa: F401

    found = {}
    exec(blocks()[0], found)
    assert found["train"].init_checkpoint == "moco_v2.pkl"
    assert found["dataloader"].train.mapper.image_format == "RGB"
    sidecar = {
        "depth": 50,
        "resnets": {"STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 256, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64},
        "norm": "SyncBN",
        "freeze_at": 0,
        "stride_in_1x1": False,
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
        "format": "RGB",
    }
    assert "\n".join(line.strip() for line in lazy_settings(sidecar)) in blocks()[0]


def test_the_lines_of_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = torchvision.models.resnet18(weights=None)
    torch.save(moco(network, network), "moco_v2_800ep_pretrain.pth.tar")
    found = {}
    exec(blocks()[1], found)
    assert torch.equal(found["network"].layer4[1].conv2.weight, network.layer4[1].conv2.weight)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_in_the_table(family):
    """By the first word of its name; the last row of the code's table is no family."""
    if family.name != "torchvision names, wrapped":
        assert re.split(r"[ ,(]", family.name)[0].lower() in TEXT.lower()
