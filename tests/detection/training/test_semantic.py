import numpy
import pytest
import torch
from PIL import Image
from torch.nn import functional

pytest.importorskip("detectron2")

from detection import config as configs
from detection.data.training_data import LabelMapper, training_mapper
from detection.training.semantic import FCNHead
from foundation.errors import UserError

# isort: split
from detectron2.data import transforms
from detectron2.layers import ShapeSpec


@pytest.fixture
def head():
    pairs = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "4"]
    config, changed = configs.for_one_process(configs.load("voc_semseg_R50_FCN", pairs))
    assert "MODEL.SEM_SEG_HEAD.NORM" in changed
    torch.manual_seed(0)
    return FCNHead(config, {"res5": ShapeSpec(channels=8, stride=16)})


def test_the_head_is_that_of_the_protocol():
    config, _ = configs.for_one_process(configs.load("voc_semseg_R50_FCN"))
    head = FCNHead(config, {"res5": ShapeSpec(channels=2048, stride=16)})
    described = [
        (
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.dilation,
            layer.bias,
            type(layer.norm).__name__,
        )
        for layer in head.convolutions
    ]
    assert described == [
        (2048, 256, (3, 3), (6, 6), None, "BatchNorm2d"),
        (256, 256, (3, 3), (6, 6), None, "BatchNorm2d"),
    ]
    assert (head.predictor.in_channels, head.predictor.out_channels, head.predictor.kernel_size) == (256, 21, (1, 1))


def test_scores_have_the_size_of_the_image(head):
    scores, losses = head.eval()({"res5": torch.randn(1, 8, 4, 5)})
    assert scores.shape == (1, 3, 64, 80)
    assert losses == {}


def test_the_loss_is_cross_entropy_where_labels_count(head):
    """Also where the image ends within a cell of the last stage."""
    features = {"res5": torch.randn(2, 8, 4, 5)}
    targets = torch.randint(3, (2, 61, 75))
    targets[:, :30] = 255
    nothing, losses = head.train()(features, targets)
    assert nothing is None
    coarse = head.predictor(head.convolutions(features["res5"]))
    chosen = functional.interpolate(coarse, size=(64, 80), mode="bilinear")[:, :, 30:61, :75].log_softmax(1)
    expected = -chosen.gather(1, targets[:, None, 30:]).mean()
    assert losses["loss_sem_seg"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.fixture
def record(tmp_path):
    """An image whose grey level is ten times its label, and the labels by a palette of other colours."""
    labels = numpy.random.default_rng(0).integers(0, 9, (40, 50), dtype=numpy.uint8)
    Image.fromarray(numpy.repeat(labels[..., None] * 10, 3, 2)).save(tmp_path / "image.png")
    picture = Image.fromarray(labels, "P")
    picture.putpalette([value * 83 % 256 for value in range(768)])
    picture.save(tmp_path / "labels.png")
    return {
        "file_name": str(tmp_path / "image.png"), "sem_seg_file_name": str(tmp_path / "labels.png"),
        "height": 40, "width": 50,
    }  # fmt: skip


def test_image_and_labels_are_cut_and_flipped_alike(record):
    augmentations = [transforms.RandomCrop("absolute", (30, 30)), transforms.RandomFlip()]
    mapper = LabelMapper(augmentations, "RGB", classes=9, ignored=255)
    seen = set()
    for seed in range(6):
        numpy.random.seed(seed)
        mapped = mapper(record)
        assert torch.equal(mapped["image"][0].long(), mapped["sem_seg"] * 10)
        assert mapped["sem_seg"].shape == (30, 30)
        seen.add(mapped["sem_seg"].numpy().tobytes())
    assert len(seen) == 6
    assert "sem_seg_file_name" in record  # it is used again in the next epoch


def test_the_crop_comes_from_the_resized_image(record):
    pairs = ["INPUT.MIN_SIZE_TRAIN", "(80,)", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice", "INPUT.CROP.SIZE", "[60, 90]"]
    mapped = training_mapper(configs.load("voc_semseg_R50_FCN", pairs))(record)
    assert mapped["image"].shape == (3, 60, 90)  # of 80 x 100; the original has 40 x 50
    assert set(mapped["sem_seg"].unique().tolist()) <= set(range(9))


@pytest.mark.parametrize(("kind", "ignored"), [(bool, 255), (numpy.uint16, 255), (numpy.uint16, 65535)])
def test_labels_of_any_integer_type_are_resized(kind, ignored, record):
    """Of the types that a PNG has. Labels are doubled in size: each pixel becomes four."""
    labels = numpy.random.default_rng(0).integers(0, 2, (40, 50)).astype(kind)
    if kind is not bool:
        labels[7] = ignored
    Image.fromarray(labels).save(record["sem_seg_file_name"])
    pairs = ["INPUT.MIN_SIZE_TRAIN", "(80,)", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice", "INPUT.RANDOM_FLIP", "none"]
    pairs += ["INPUT.CROP.ENABLED", "False", "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", str(ignored)]
    mapped = training_mapper(configs.load("voc_semseg_R50_FCN", pairs))(record)["sem_seg"]
    assert mapped.dtype == torch.int64
    assert mapped.tolist() == labels.repeat(2, axis=0).repeat(2, axis=1).astype(int).tolist()


def test_a_label_that_is_no_class_is_named(record):
    mapper = LabelMapper([], "RGB", classes=8, ignored=255)
    with pytest.raises(UserError, match=r"labels\.png has the label 8: labels must be 0 to 7, or 255"):
        mapper(record)
    Image.fromarray(numpy.full((40, 50), -1, numpy.int32)).save(record["sem_seg_file_name"], format="TIFF")
    with pytest.raises(UserError, match=r"labels\.png has the label -1: labels must be 0 to 7, or 255"):
        mapper(record)
