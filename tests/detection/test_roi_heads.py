import pytest
import torch

pytest.importorskip("detectron2")

from detection import config as configs
from detection.training import trainer

# isort: split
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes


@pytest.fixture(scope="module")
def heads():
    torch.manual_seed(0)
    config, _ = configs.for_one_process(configs.load("shapes_R50_C4"))
    config.MODEL.DEVICE = "cpu"
    return trainer.TransferTrainer.build_model(config).roi_heads


def test_the_norm_is_the_last_layer_behind_res5(heads):
    assert type(heads) is ROI_HEADS_REGISTRY.get("Res5ROIHeadsExtraNorm")
    assert [name for name, _ in heads.res5.named_children()] == ["0", "1", "2", "norm"]
    assert isinstance(heads.res5.norm, torch.nn.BatchNorm2d)
    assert heads.res5.norm.num_features == 2048


def test_box_and_mask_branch_see_normalised_features(heads):
    """Both read `_shared_roi_transform`. Its output has mean 0 and variance 1, so nothing, no ReLU, follows."""
    heads.train()
    box = Boxes(torch.tensor([[0.0, 0.0, 64.0, 64.0], [16.0, 16.0, 80.0, 80.0]]))
    with torch.no_grad():
        features = heads._shared_roi_transform([torch.randn(1, 1024, 6, 6)], [box])
    assert features.shape == (2, 2048, 7, 7)
    assert features.mean((0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(features.var((0, 2, 3), unbiased=False), torch.ones(2048), atol=1e-2)
    assert heads.mask_head.deconv.in_channels == heads.box_predictor.cls_score.in_features == 2048


def test_the_norm_is_of_the_kind_of_the_backbones():
    config = configs.load("shapes_R50_C4", ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DEVICE", "cpu"])
    heads = trainer.TransferTrainer.build_model(config).roi_heads
    assert type(heads.res5.norm).__name__ == "FrozenBatchNorm2d"
