"""Verify a conversion: torchvision's and Detectron2's networks give the same features for the same images.

The detectors are built and loaded as a user would do it, from the written file with Detectron2's own loader. This is
the only module of the package that needs Detectron2.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import foundation.detectron2_compat  # noqa: F401  makes Detectron2 importable on today's libraries
from convert.architecture import Architecture
from convert.naming import to_detectron2
from convert.pixels import Pixels
from foundation.errors import UserError

TOLERANCE = 1e-4  # float32; relative to features larger than 1
STAGES = ("res2", "res3", "res4", "res5")
_SIZES = ((224, 224), (97, 131))  # the second is odd, so that padding at the borders is compared as well


def verify(path: Path, tensors: Mapping[str, np.ndarray], architecture: Architecture, pixels: Pixels) -> list[str]:
    """Compare the network of `tensors` with the detectors that load `path`.

    Args:
        path: the converted file, ending in `.pkl`.
        tensors: the source's tensors, by canonical name.
        architecture: which ResNet they are.
        pixels: what the source expects of its images.

    Returns:
        One line for each detector, with the largest difference of each stage.

    Raises:
        UserError: Detectron2 is not installed, a tensor was not loaded, or a stage differs by more than 1e-4.
    """
    source = build_source_network(architecture, tensors, pixels.stride_in_1x1)
    expected = {to_detectron2(name): torch.from_numpy(np.array(array)) for name, array in tensors.items()}
    lines = []
    for target in ("FPN", "C4") if architecture.bottleneck else ("FPN",):  # C4's head is built of bottlenecks
        detector = _load_detector(target, path, architecture, pixels)
        _check_tensors(target, detector, expected)
        lines.append(_compare(target, source, detector, pixels))
    return lines


def build_source_network(architecture: Architecture, tensors: Mapping[str, np.ndarray], stride_in_1x1: bool) -> ResNet:
    """Torchvision's ResNet in evaluation mode, with exactly these tensors (and no classifier)."""
    block = Bottleneck if architecture.bottleneck else BasicBlock
    per_group = 64 * architecture.width // (architecture.groups * architecture.stem)
    if architecture.groups > 1:
        per_group = architecture.width // architecture.groups
    network = ResNet(
        block, list(architecture.blocks), num_classes=1, groups=architecture.groups, width_per_group=per_group
    )
    if architecture.stem != 64:
        _widen(network, architecture)
    if stride_in_1x1:
        for stage in (network.layer2, network.layer3, network.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    network.fc = nn.Identity()
    state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise UserError(f"torchvision's network does not have the same tensors: {(missing + unexpected)[:4]}")
    return network.eval()


def _widen(network: ResNet, architecture: Architecture) -> None:
    """Rebuild the layers in a width that torchvision's constructor does not have (2x and 4x of SimCLR and BYOL)."""
    stem = network.inplanes = architecture.stem
    network.conv1 = nn.Conv2d(3, stem, kernel_size=7, stride=2, padding=3, bias=False)
    network.bn1 = nn.BatchNorm2d(stem)
    for stage, count in enumerate(architecture.blocks):
        layer = network._make_layer(Bottleneck, stem << stage, count, stride=1 if stage == 0 else 2)
        setattr(network, f"layer{stage + 1}", layer)


def _load_detector(target: str, path: Path, architecture: Architecture, pixels: Pixels) -> Any:
    """A detector with random heads and the backbone of `path`, by Detectron2's own loader."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.merge_from_other_cfg(type(cfg)(architecture.detectron2))
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = pixels.stride_in_1x1
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4"]
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = list(pixels.mean), list(pixels.std)
    if target == "FPN":
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = list(STAGES)
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 8  # the heads are not compared
    detector = build_model(cfg).eval()
    with _quiet("fvcore", "detectron2"):
        DetectionCheckpointer(detector).load(str(path))
    return detector


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence loggers: the loader would list the heads, which are not in the file; `_check_tensors` checks the rest."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_tensors(target: str, detector: Any, expected: Mapping[str, Tensor]) -> None:
    """Check that every tensor of the backbone, and of C4's res5, equals the one that was converted."""
    roots = ("backbone.bottom_up.",) if target == "FPN" else ("backbone.", "roi_heads.")
    found = {}
    for name, tensor in detector.state_dict().items():
        root = next((root for root in roots if name.startswith(root)), None)
        if root is None or name.endswith("num_batches_tracked"):
            continue
        short = name.removeprefix(root)
        if short.startswith(("stem.", *(f"{stage}." for stage in STAGES))):
            found[short] = tensor
    wrong = [name for name in found if name not in expected or not torch.equal(found[name], expected[name])]
    lost = sorted(expected.keys() - found.keys())
    if wrong or lost:
        raise UserError(f"{target}: {len(wrong) + len(lost)} tensors were not loaded: {', '.join((wrong + lost)[:4])}")


def _compare(target: str, source: ResNet, detector: Any, pixels: Pixels) -> str:
    """One line with the largest difference of each stage over all test images."""
    largest = dict.fromkeys(STAGES, 0.0)
    scale = dict.fromkeys(STAGES, 1.0)
    for size in _SIZES:
        images = _images(size)
        with torch.no_grad():
            for stage, (one, other) in _features(target, source, detector, images, pixels).items():
                if one.shape != other.shape:
                    raise UserError(f"{target}: {stage} is of shape {tuple(other.shape)}, not {tuple(one.shape)}")
                largest[stage] = max(largest[stage], float((one - other).abs().max()))
                scale[stage] = max(scale[stage], float(one.abs().max()))
    text = "  ".join(f"{stage} {value:.1e}" for stage, value in largest.items())
    # Written so that NaN fails, too.
    failed = [stage for stage in STAGES if not largest[stage] < TOLERANCE * scale[stage]]
    if failed:
        raise UserError(
            f"{target}: {', '.join(failed)} differ from the source network by more than {TOLERANCE}: {text}"
        )
    return f"{target:3}  largest difference  {text}"


def _images(size: tuple[int, int]) -> Tensor:
    """Two smooth images with noise, RGB levels 0..255, (2, 3, H, W) float32; the same on every call."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 7, 9, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (255 * (0.8 * smooth + 0.2 * torch.rand(2, 3, *size, generator=generator))).round()


def _features(
    target: str, source: ResNet, detector: Any, images: Tensor, pixels: Pixels
) -> dict[str, tuple[Tensor, Tensor]]:
    """(source's, detector's) features of each stage, (2, C, h, w)."""
    ordered = images.flip(1) if pixels.format == "BGR" else images
    given = (ordered - detector.pixel_mean) / detector.pixel_std
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) / 255 for values in (pixels.mean, pixels.std))
    if not torch.allclose(given, (ordered / 255 - mean) / std, rtol=1e-5, atol=1e-4):
        raise UserError(f"{target}: the detector and the source normalise images differently")
    features = source.maxpool(source.relu(source.bn1(source.conv1(given))))
    own = {}
    for stage, layer in zip(STAGES, (source.layer1, source.layer2, source.layer3, source.layer4), strict=True):
        features = own[stage] = layer(features)
    if target == "FPN":
        made = detector.backbone.bottom_up(given)
    else:
        made = detector.backbone(given)
        made["res5"] = detector.roi_heads.res5(made["res4"])
    return {stage: (own[stage], made[stage]) for stage in STAGES}
