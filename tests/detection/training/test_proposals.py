"""Proposals that are selected for a whole batch equal Detectron2's."""

import copy
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("detectron2")

from detection import config as configs
from detection.training import model as modeling
from detection.training import proposals

# isort: split
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

SIZES = [(96, 128), (80, 100), (64, 128)]


@pytest.fixture(params=["shapes_R18_FPN", "shapes_R50_C4"])
def generators(request):
    """Detectron2's RPN and ours, with the same settings."""
    config, _ = configs.for_one_process(configs.load(request.param, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]))
    theirs = modeling.modeling.build_model(config).proposal_generator
    theirs.pre_nms_topk, theirs.post_nms_topk = {True: 150, False: 100}, {True: 60, False: 30}
    ours = copy.deepcopy(theirs)
    ours.__class__ = proposals.BatchedRPN
    return theirs, ours


def predictions(generator, dtype=torch.float32, spread=1.0):
    """Anchors, logits and deltas of each level for features of some sizes."""
    torch.manual_seed(0)
    levels = len(generator.anchor_generator.strides)
    features = [torch.zeros(len(SIZES), 1, 24 >> level, 32 >> level) for level in range(levels)]
    anchors = generator.anchor_generator(features)
    logits = [torch.randn(len(SIZES), len(each)).to(dtype) for each in anchors]
    deltas = [spread * torch.randn(len(SIZES), len(each), 4).to(dtype) for each in anchors]
    return anchors, logits, deltas


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.image_size == theirs.image_size
        assert isinstance(ours.proposal_boxes, Boxes)
        assert torch.equal(ours.proposal_boxes.tensor, theirs.proposal_boxes.tensor)
        assert torch.equal(ours.objectness_logits, theirs.objectness_logits)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.1, 3.0])  # boxes near their anchors, and boxes that are outside of the image
def test_proposals_equal_those_of_detectron2(generators, training, dtype, spread):
    theirs, ours = (each.train(training) for each in generators)
    inputs = predictions(theirs, dtype, spread)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = theirs.predict_proposals(*copy.deepcopy(inputs), SIZES)
        found = ours.predict_proposals(*inputs, SIZES)
    assert all(len(each) > 0 for each in expected)
    assert_same(found, expected)


def objects(boxes):
    return Instances((96, 128), gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))


SCENES = [
    [objects([[5.0, 5, 60, 70], [3, 4, 20, 30], [70, 10, 120, 90]]), objects([]), objects([[0.0, 0, 9, 9]])],
    [objects([]), objects([]), objects([])],
    [objects([[500.0, 500, 501, 501]]), objects([[8.0, 8, 40, 40]] * 5), objects([[1.0, 1, 2, 90]])],
]


@pytest.mark.parametrize("scene", range(len(SCENES)))
@pytest.mark.parametrize("drawn", [16, 4000])  # fewer than there are, and more
def test_labels_losses_and_gradients_equal_those_of_detectron2(generators, scene, drawn):
    results = []
    for generator in generators:
        generator.batch_size_per_image = drawn
        anchors, logits, deltas = predictions(generator)
        learned = [each.requires_grad_() for each in (*logits, *deltas)]
        torch.manual_seed(1)
        labels, boxes = generator.label_and_sample_anchors(anchors, SCENES[scene])
        after = torch.rand(1)  # as many random numbers have been drawn
        with EventStorage() as storage:
            losses = generator.losses(anchors, logits, labels, deltas, boxes)
        scalars = {name: value for name, (value, _) in storage.latest().items()}
        gradients = torch.autograd.grad(sum(losses.values()), learned)
        results.append(([*labels, *boxes, after, *losses.values(), *gradients], scalars, list(losses)))
    (expected, *others), (found, *own) = results
    assert others == own
    assert all(len(labels) > 0 for labels in found[: len(SIZES)])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("changes", [{"anchor_boundary_thresh": 0}, {"box_reg_loss_type": "giou"}])
def test_settings_that_are_detectron2s_own(generators, changes):
    results = []
    for generator in generators:
        vars(generator).update(changes)
        anchors, logits, deltas = predictions(generator)
        torch.manual_seed(1)
        labels, boxes = generator.label_and_sample_anchors(anchors, SCENES[0])
        with EventStorage():
            results.append(generator.losses(anchors, logits, labels, deltas, boxes))
    assert results[0] == results[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_ends_training_and_is_left_out_in_evaluation(generators, value):
    theirs, ours = generators
    inputs = predictions(theirs)
    inputs[2][0][1, :, 0] = value
    if value > 0:
        inputs[1][0][0, 3] = value
    with pytest.raises(FloatingPointError, match="Training has diverged"):
        ours.train().predict_proposals(*inputs, SIZES)
    assert_same(
        ours.eval().predict_proposals(*inputs, SIZES),
        theirs.eval().predict_proposals(*copy.deepcopy(inputs), SIZES),
    )


@pytest.mark.parametrize(("images", "streams"), [(5, 2), (2, 4)])
def test_streams_return_what_belongs_to_each_image(images, streams, monkeypatch):
    """With stand-ins for a GPU's streams and tensors."""
    current, used, waited = object(), [], []

    class Stream:
        wait_stream = waited.append

        def synchronize(self):
            used.append(self)

    def tensor(number):
        return types.SimpleNamespace(
            number=number, device=types.SimpleNamespace(type="cuda"), record_stream=seen.append
        )

    seen = []
    available = [Stream() for _ in range(streams)]
    monkeypatch.setattr(proposals, "_streams", lambda _: (ThreadPoolExecutor(streams), available))
    monkeypatch.setattr("torch.cuda.current_stream", lambda _: current)
    monkeypatch.setattr("torch.cuda.stream", lambda _: nullcontext())
    found = proposals.suppress([(tensor(number),) for number in range(images)], lambda image: tensor(-image.number))
    assert [each.number for each in found] == [-number for number in range(images)]
    assert seen == [current] * images
    assert waited == [current] * min(images, streams)
    assert {*used} == {*available[:images]}
