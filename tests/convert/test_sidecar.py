"""What a user of Detectron2's own configurations has to set, as the converter prints it."""

import json

import numpy as np
import pytest
import torch
import torchvision
import yaml

from convert import to_d2
from convert.sidecar import lazy_settings, yaml_settings
from foundation.errors import UserError
from tests.convert.conftest import sidecar_of, tiny_resnet

try:
    import foundation.detectron2_compat  # noqa: F401
except UserError:
    pytest.skip("Detectron2 is not installed", allow_module_level=True)


@pytest.mark.parametrize(
    ("name", "zoo", "place", "head"),
    [
        ("resnet18", "mask_rcnn_fpn", "model.backbone.bottom_up", ""),
        ("resnet50", "mask_rcnn_c4", "model.backbone", "roi_heads.res5"),
    ],
)
def test_a_lazy_config_with_these_lines_is_the_source_network(name, zoo, place, head, convert):
    """Detectron2's model of the zoo, changed by the lines, loads the weights and gives torchvision's features."""
    from detectron2 import model_zoo
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import instantiate
    from omegaconf import OmegaConf

    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(weights=None).eval()
    output = convert(network.state_dict())
    config = model_zoo.get_config(f"common/models/{zoo}.py")
    config.dataloader = OmegaConf.create({part: {"mapper": {"image_format": "BGR"}} for part in ("train", "test")})
    lines = "\n".join(line.strip() for line in lazy_settings(sidecar_of(output), place))
    exec(lines.replace("SyncBN", "BN"), {"model": config.model, "dataloader": config.dataloader})  # BN: on a CPU
    detector = instantiate(config.model).eval()
    DetectionCheckpointer(detector).load(str(output))
    assert detector.input_format == config.dataloader.test.mapper.image_format == "RGB"
    levels = torch.rand(1, 3, 64, 64) * 255
    given = (levels - detector.pixel_mean.cpu()) / detector.pixel_std.cpu()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(given, (levels / 255 - mean) / std, rtol=1e-4, atol=1e-4)
    backbone = detector.backbone if head else detector.backbone.bottom_up
    with torch.no_grad():
        features = network.maxpool(network.relu(network.bn1(network.conv1(given))))
        features = network.layer3(network.layer2(network.layer1(features)))
        torch.testing.assert_close(backbone(given)["res4"], features, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_yaml_lines_are_keys_of_detectron2(convert):
    from detectron2.config import get_cfg

    sidecar = sidecar_of(convert(tiny_resnet(0).state_dict()))
    cfg = get_cfg()
    for line in yaml_settings(sidecar):
        key, value = line.split(": ", 1)
        cfg.merge_from_list([key.strip(), yaml.safe_load(value)])
    assert (cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM, cfg.INPUT.FORMAT) == (8, "SyncBN", "RGB")
    assert np.allclose(cfg.MODEL.PIXEL_MEAN, [123.675, 116.28, 103.53])


def test_the_command_prints_them(convert, capsys):
    output = convert(torchvision.models.resnet18(weights=None).state_dict())
    printed = capsys.readouterr().out
    sidecar = json.loads(output.with_suffix(".json").read_text())
    assert all(line in printed for line in (*yaml_settings(sidecar), *lazy_settings(sidecar)))
    assert "stages.depth = 18" in printed
    to_d2.main([str(output), str(output.with_name("x.pth")), "--to", "torchvision"])
    assert "LazyConfig" not in capsys.readouterr().out


def test_other_widths_have_no_default_stages(convert):
    assert "make_stage" in lazy_settings(sidecar_of(convert(tiny_resnet(0).state_dict())))[0]
