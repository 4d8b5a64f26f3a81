"""What this project builds on has other signatures in Detectron2's main branch: stand-ins that have them."""

import importlib.util

import numpy
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from torch import nn

pytest.importorskip("detectron2")

from detection import config as configs
from detection.data.loading import ProcessBatch
from detection.data.training_data import training_mapper
from detection.training import accumulation

# isort: split
import detectron2.engine
from detectron2.data import transforms
from detectron2.engine import TrainerBase
from detectron2.utils.events import EventStorage, get_event_storage


class TrainerOfMain(TrainerBase):
    """`SimpleTrainer` as main has it: no iterator at the start, three more arguments, metrics of a given iteration."""

    def __init__(
        self, model, data_loader, optimizer, gather_metric_period=1, zero_grad_before_forward=False,
        async_write_metrics=False,
    ):  # fmt: skip
        super().__init__()
        model.train()
        self.model, self.data_loader, self.optimizer = model, data_loader, optimizer
        self._data_loader_iter_obj = None
        self.gather_metric_period = gather_metric_period

    def _write_metrics(self, loss_dict, data_time, prefix="", iter=None):
        iteration = self.iter if iter is None else iter
        if (iteration + 1) % self.gather_metric_period == 0:
            total = sum(loss.item() for loss in loss_dict.values())
            if total != total:
                raise FloatingPointError(f"Loss became infinite or NaN at iteration={iteration}!")
            get_event_storage().put_scalar(f"{prefix}total_loss", total)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, values):
        return {"loss": (self.weight * torch.tensor(values)).mean()}


class Batches:
    def __init__(self, *passes):
        self.passes = passes

    def __iter__(self):
        raise AssertionError("where to begin is not known yet")
        yield

    def starting(self, iteration):
        yield from self.passes


def step(kind, *passes):
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = kind(model, Batches(*passes), optimizer, ProcessBatch(passes=len(passes)), seed=0)
    trainer.iter = 7
    with EventStorage(7) as storage:
        trainer.run_step()
    return model.weight.item(), storage.latest()["total_loss"]


@pytest.fixture(params=["installed", "main"])
def kind(request, monkeypatch):
    """The training step, with either `SimpleTrainer`: the module is executed anew with the one of main."""
    if request.param == "installed":
        return accumulation.AccumulatingTrainer
    monkeypatch.setattr(detectron2.engine, "SimpleTrainer", TrainerOfMain)
    spec = importlib.util.spec_from_file_location("accumulation_on_main", accumulation.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert issubclass(module.AccumulatingTrainer, TrainerOfMain)
    return module.AccumulatingTrainer


def test_a_step_in_two_passes_by_hand(kind):
    """The loss is 3 times the mean of means 2 and 6, 12; its gradient 4, and half of that the step."""
    assert step(kind, [1.0, 3.0], [6.0]) == (1.0, (12.0, 7))


def test_a_loss_that_is_not_finite_is_refused(kind):
    with pytest.raises(FloatingPointError, match="iteration=7"):
        step(kind, [float("nan")])


class FixedSizeCropOfMain(transforms.FixedSizeCrop):
    """As main has it: masks are padded with a value of their own."""

    def __init__(self, crop_size, pad=True, pad_value=128.0, seg_pad_value=255):
        super().__init__(crop_size, pad, pad_value)
        self.seg_pad_value = seg_pad_value

    def _get_pad(self, image):
        pad = super()._get_pad(image)
        pad.seg_pad_value = self.seg_pad_value
        return pad


@pytest.mark.parametrize("crop", [transforms.FixedSizeCrop, FixedSizeCropOfMain])
def test_the_padding_of_large_scale_jitter_belongs_to_no_mask(crop, tmp_path, monkeypatch):
    """An image of 40 x 80 pixels, with half of the scale, has 16 x 32 of the square's 64 x 64."""
    monkeypatch.setattr(transforms, "FixedSizeCrop", crop)
    Image.new("RGB", (80, 40)).save(tmp_path / "a.png")
    mask = numpy.zeros((40, 80), numpy.uint8, order="F")
    mask[10:30, 20:60] = 1
    annotation = {"bbox": [20.0, 10.0, 40.0, 20.0], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    record = {
        "file_name": str(tmp_path / "a.png"), "height": 40, "width": 80,
        "annotations": [{**annotation, "segmentation": coco_masks.encode(mask)}],
    }  # fmt: skip
    jitter = ["ENABLED", "True", "SIZE", "64", "MIN_SCALE", "0.5", "MAX_SCALE", "0.5"]
    pairs = [f"INPUT.LSJ.{each}" if index % 2 == 0 else each for index, each in enumerate(jitter)]
    pairs += ["INPUT.MASK_FORMAT", "bitmask", "INPUT.RANDOM_FLIP", "none"]
    found = training_mapper(configs.load("shapes_R18_FPN", pairs))(record)["instances"]
    assert found.gt_masks.tensor.shape == (1, 64, 64)
    assert found.gt_masks.tensor.sum() == 8 * 16
    assert found.gt_boxes.tensor.tolist() == [[8, 4, 24, 12]]
