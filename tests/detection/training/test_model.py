"""How a model is laid out in memory."""

import pytest
import torch

pytest.importorskip("detectron2")

from detection import config as configs
from detection.training import model as modeling


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(("device", "precision"), [("cuda", "bfloat16"), ("cuda", "float32"), ("cpu", "bfloat16")])
def test_channels_lie_together_where_a_gpu_computes_in_bfloat16(device, precision, monkeypatch):
    monkeypatch.setattr(modeling.modeling, "build_model", lambda _: torch.nn.Conv2d(3, 4, 3))
    config = configs.load("shapes_R18_FPN", ["MODEL.DEVICE", device, "SOLVER.PRECISION", precision])
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    weight = modeling.build(config).weight
    together = weight.is_contiguous(memory_format=torch.channels_last)
    assert together == (device == "cuda" and precision == "bfloat16")


def test_the_layout_does_not_change_losses_or_detections():
    changes = ["MODEL.DEVICE", "cpu", "SOLVER.PRECISION", "float32", "MODEL.WEIGHTS", ""]
    config, _ = configs.for_one_process(configs.load("shapes_R18_FPN", changes))
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8, generator=generator)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        detector = modeling.build(config).to(memory_format=layout)
        features = detector.backbone(detector.preprocess_image([{"image": image}]).tensor)
        with torch.no_grad():
            (found,) = detector.eval()([{"image": image}])
        results.append([*features.values(), found["instances"].scores, found["instances"].pred_boxes.tensor])
    for expected, other in zip(*results, strict=True):
        torch.testing.assert_close(other, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("recipe", ["shapes_R18_FPN", "shapes_R50_C4"])
def test_regions_are_not_rounded_to_bfloat16(recipe):
    changes = ["MODEL.DEVICE", "cpu", "SOLVER.PRECISION", "bfloat16", "MODEL.WEIGHTS", ""]
    config, _ = configs.for_one_process(configs.load(recipe, changes))
    poolers = [module for module in modeling.build(config).modules() if isinstance(module, modeling.ROIAlign)]
    assert poolers
    features = torch.rand(1, 3, 50, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    for pooler in poolers:
        region = torch.tensor([[0.0, 60.3, 40.7, 66.9, 45.1]]) / torch.tensor([1.0, *[pooler.spatial_scale] * 4])
        with torch.autocast("cpu", torch.bfloat16):
            found = pooler(features, region)
        assert torch.equal(found, pooler(features.float(), region).bfloat16())
