"""How a model is laid out in memory."""

import pytest
import torch

pytest.importorskip("detectron2")

from detection import config as configs
from detection.training import model as modeling
from detection.training.proposals import BatchedRPN, BatchedSampling

# isort: split
from detectron2.structures import Boxes


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


def test_regions_of_c4_are_converted_once_to_the_layout_of_the_features():
    changes = ["MODEL.DEVICE", "cpu", "SOLVER.PRECISION", "float32", "MODEL.WEIGHTS", ""]
    config, _ = configs.for_one_process(configs.load("shapes_R50_C4", changes))
    heads = modeling.build(config).roi_heads
    seen = []
    heads.res5.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = torch.rand(1, heads.res5[0].in_channels, 6, 8)
    boxes = [Boxes(torch.tensor([[0.0, 0, 50, 60], [9, 9, 90, 80]]))]
    results = [
        heads._shared_roi_transform([features.contiguous(memory_format=layout)], boxes)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert [each.is_contiguous(memory_format=torch.channels_last) for each in seen] == [False, True]


@pytest.mark.parametrize("norm", ["", "BN"])
def test_parts_for_a_gpu(norm, monkeypatch):
    """The mask head sees added regions only where no norm's statistics would contain them."""
    changes = [
        "MODEL.DEVICE",
        "cpu",
        "SOLVER.PRECISION",
        "float32",
        "MODEL.WEIGHTS",
        "",
        "MODEL.ROI_MASK_HEAD.NORM",
        norm,
    ]
    config, _ = configs.for_one_process(configs.load("shapes_R18_FPN", changes))
    detector = modeling.modeling.build_model(config)
    monkeypatch.setattr(modeling.modeling, "build_model", lambda _: detector)
    config.MODEL.DEVICE = "cuda"
    modeling.build(config)
    assert type(detector.proposal_generator) is BatchedRPN
    assert isinstance(detector.roi_heads, BatchedSampling)
    assert type(detector.roi_heads.mask_head) is (
        modeling.MaskRCNNConvUpsampleHead if norm else modeling.PaddedMaskHead
    )


@pytest.mark.parametrize("count", [0, 5, 128, 130])
def test_added_regions_change_neither_masks_nor_gradients(count):
    changes = ["MODEL.DEVICE", "cpu", "SOLVER.PRECISION", "float32", "MODEL.WEIGHTS", ""]
    config, _ = configs.for_one_process(configs.load("shapes_R18_FPN", changes))
    head = modeling.build(config).roi_heads.mask_head
    regions = torch.rand(count, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    results, sizes = [], []
    head[0].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for kind in (modeling.MaskRCNNConvUpsampleHead, modeling.PaddedMaskHead):
        head.__class__ = kind
        inputs = regions.clone().requires_grad_()
        logits = head.layers(inputs)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), [inputs, *head.parameters()])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    head.eval().layers(regions)
    assert sizes == [count, -(-count // 128) * 128, count]
