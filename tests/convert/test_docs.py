"""The commands in the documentation run as they stand there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision

from convert import from_d2, to_d2
from convert.families import FAMILIES
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


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_in_the_table(family):
    """By the first word of its name; the last row of the code's table is no family."""
    if family.name != "torchvision names, wrapped":
        assert re.split(r"[ ,(]", family.name)[0].lower() in TEXT.lower()
