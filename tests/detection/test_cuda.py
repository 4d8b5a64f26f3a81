"""A detector on a GPU beside the same on a CPU, and its runs there."""

import copy
import json

import numpy
import pytest
import torch

pytest.importorskip("detectron2")

from detection import config as configs
from detection import train_net
from detection.data.polygons import RegionPolygons
from detection.training import trainer
from detection.training.proposals import BatchedRPN

# isort: split
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Instances, PolygonMasks
from detectron2.utils.events import EventStorage

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")


def picture(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8, generator=generator)}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("recipe", ["shapes_R18_FPN", "shapes_R50_C4"])
def test_features_equal_those_of_a_cpu(recipe, layout):
    config, _ = configs.for_one_process(configs.load(recipe, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]))
    torch.manual_seed(0)
    on_cpu = trainer.TransferTrainer.build_model(config).eval()
    on_gpu = copy.deepcopy(on_cpu).to(CUDA, memory_format=layout)
    torch.backends.cudnn.allow_tf32 = False
    images = on_cpu.preprocess_image([picture(0)]).tensor
    with torch.no_grad():
        expected, found = on_cpu.backbone(images), on_gpu.backbone(images.to(CUDA))
    for name, features in expected.items():
        torch.testing.assert_close(found[name].cpu(), features, rtol=1e-3, atol=1e-3 * features.abs().max().item())


@pytest.mark.parametrize("recipe", ["coco_R50_FPN_1x_moco", "coco_R50_C4_1x"])
def test_proposals_of_a_batch_equal_detectron2s(recipe):
    """As many as the recipes for COCO have: each image's are suppressed in a stream of its own."""
    config, _ = configs.for_one_process(configs.load(recipe, ["MODEL.DEVICE", "cuda", "MODEL.WEIGHTS", ""]))
    ours = trainer.TransferTrainer.build_model(config).proposal_generator
    assert type(ours) is BatchedRPN
    theirs = copy.copy(ours)
    theirs.__class__ = RPN
    generator = torch.Generator(CUDA).manual_seed(0)
    shapes = [(192 // stride, 256 // stride) for stride in ((1, 2, 4, 8, 16) if "FPN" in recipe else (2,))]
    anchors = ours.anchor_generator([torch.zeros(20, 1, *shape, device=CUDA) for shape in shapes])
    logits = [torch.randn(20, len(each), generator=generator, device=CUDA) for each in anchors]
    deltas = [torch.randn(20, len(each), 4, generator=generator, device=CUDA) for each in anchors]
    sizes = [(700 + number, 1000 - number) for number in range(20)]
    for training in (True, False):
        expected = theirs.train(training).predict_proposals(anchors, logits, deltas, sizes)
        for _ in range(3):  # the memory of the streams is used again
            found = ours.train(training).predict_proposals(anchors, logits, deltas, sizes)
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one.proposal_boxes.tensor, other.proposal_boxes.tensor)
                assert torch.equal(one.objectness_logits, other.objectness_logits)


@pytest.mark.parametrize("recipe", ["shapes_R18_FPN", "shapes_R50_C4"])
def test_losses_of_a_batch_equal_those_with_detectron2s_parts(recipe):
    """The same regions are sampled, from the same random numbers."""
    changes = ["MODEL.DEVICE", "cuda", "MODEL.WEIGHTS", "", "SOLVER.PRECISION", "float32"]
    config, _ = configs.for_one_process(configs.load(recipe, changes))
    torch.manual_seed(0)
    ours = trainer.TransferTrainer.build_model(config)
    theirs = build_model(config)
    theirs.load_state_dict(ours.state_dict())
    corners = numpy.array([[8.0, 8], [60, 12], [50, 70], [10, 60]])
    batch, losses = [], []
    for number in range(5):
        outlines = [[(corners / (1 + shrunk) + number).reshape(-1)] for shrunk in range(number)]
        objects = Instances((96, 128), gt_masks=PolygonMasks(outlines), gt_classes=torch.arange(number) % 3)
        objects.gt_boxes = objects.gt_masks.get_bounding_boxes()
        batch.append({**picture(number), "instances": objects})
    for model, polygons in ((theirs, PolygonMasks), (ours, RegionPolygons)):
        for image in batch:
            image["instances"].gt_masks = polygons(image["instances"].gt_masks.polygons)
        torch.manual_seed(0)
        with EventStorage():
            losses.append({name: loss.item() for name, loss in model(batch).items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_mask_targets_of_boxes_on_a_gpu():
    outline = numpy.array([3.0, 3, 90, 10, 60, 80, 9, 70])
    boxes = torch.tensor([[0.0, 0, 50, 50], [10, 20, 95, 90], [5, 5, 7, 7]])
    chosen = torch.tensor([0, 0, 1])
    objects = [[outline], [outline / 9, outline / 5]]
    expected = PolygonMasks(objects)[chosen].crop_and_resize(boxes, 28)
    found = RegionPolygons(objects)[chosen.to(CUDA)][torch.tensor([True] * 3, device=CUDA)]
    assert torch.equal(found.crop_and_resize(boxes.to(CUDA), 28).cpu(), expected)


@pytest.fixture
def train(tiny_overrides, tmp_path):
    def call(folder, *pairs, options=()):
        fixed = ["--config", "shapes_R18_FPN", "--num-gpus", "1", "--output", str(tmp_path / folder)]
        train_net.main([*fixed, *options, *tiny_overrides, "MODEL.DEVICE", "cuda", *map(str, pairs)])
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.json").read_text().splitlines()]
        return [line["total_loss"] for line in lines if "total_loss" in line], tmp_path / folder

    return call


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_a_run_trains_evaluates_and_resumes(train, precision):
    pairs = ("SOLVER.PRECISION", precision, "SOLVER.CHECKPOINT_PERIOD", 1, "LOG.PICTURES", 1)
    losses, folder = train("run", *pairs)
    assert all(loss > 0 for loss in losses)
    assert {"bbox", "segm"} <= json.loads((folder / "results.json").read_text())["results"].keys()
    train("run", "SOLVER.PRECISION", precision, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", "(1,)", options=["--resume"])
    assert json.loads((folder / "results.json").read_text())["iterations"] == 3


def test_a_gpu_without_enough_memory_is_one_line(train, monkeypatch):
    from foundation.errors import UserError

    def fail(*_):
        torch.empty(2**50, dtype=torch.uint8, device=CUDA)

    monkeypatch.setattr(trainer.TransferTrainer, "run_step", fail)
    with pytest.raises(UserError, match="the GPU is out of memory: "):
        train("run")
