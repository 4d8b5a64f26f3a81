"""The sidecar: a JSON file beside converted weights, with all that a detector's configuration must agree with.

It is `NAME.json` beside `NAME.pkl`, and `NAME.pth.json` beside `NAME.pth`. Its fields:

    source          name of the file that was converted
    sha256          its digest
    weights_sha256  digest of the weights beside it; readers compare it, so that the two always belong together
    family          which project's format it was recognised as
    trained_by      what trained it, in a word: as this project's own files or the sidecar of the source say it
                    (`corinfomax`), else `family`
    begun_from      weights that its training began from, as the run named them; "" for random ones, or where unknown
    branch          which encoder of it was taken
    architecture    torchvision's name, such as `resnet50`
    depth           18, 34, 50, 101 or 152 (MODEL.RESNETS.DEPTH)
    stem            "imagenet": 7x7 with stride 2, then max-pooling. "cifar": 3x3 with stride 1, never for Detectron2
    resnets         the further keys of MODEL.RESNETS that describe it: STEM_OUT_CHANNELS, RES2_OUT_CHANNELS,
                    NUM_GROUPS, WIDTH_PER_GROUP
    pixel_mean      per channel in the order of `format`, in levels 0..255 (MODEL.PIXEL_MEAN)
    pixel_std       likewise (MODEL.PIXEL_STD)
    pixel_origin    how the two are known
    format          "RGB" or "BGR" (INPUT.FORMAT)
    norm            norm to fine-tune it with (MODEL.RESNETS.NORM): "SyncBN" as in MoCo's protocol; "FrozenBN" for the
                    networks of Caffe2, whose files have no statistics
    freeze_at       stages to freeze (MODEL.BACKBONE.FREEZE_AT): 0 as in MoCo's protocol, 2 for Caffe2's networks
    stride_in_1x1   where blocks take their stride (MODEL.RESNETS.STRIDE_IN_1X1)
    tensors         number of tensors written
    dropped         {part of the source: number of tensors left out}
    warnings        what a user has to know, possibly nothing
    tool            name and version of the converter

`detection/train_net.py` compares its configuration with these fields. Users of Detectron2's own tools have to set them:
`yaml_settings` and `lazy_settings` print how. A detector with wrong pixel statistics or strides trains without an error
and is less accurate.
"""

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from convert.pixels import Pixels
from convert.reader import Source
from convert.selection import Selection
from convert.sidecar_files import read_sidecar
from foundation.names import legible

_CHANNELS = {True: (64, 256, 1, 64), False: (64, 64, 1, 64)}  # of `make_default_stages`: bottlenecks, basic blocks


def describe(source: Source, selection: Selection, pixels: Pixels) -> dict[str, Any]:
    """The sidecar's fields but `weights_sha256`; see the module's docstring."""
    architecture = selection.architecture
    resnets = architecture.detectron2
    # Of files other than the project's own, `find_pixels` has compared the digest.
    known = {} if selection.candidate.family.pixels == "own" else read_sidecar(source.path, check=False)
    caffe2 = pixels.format == "BGR" and (pixels.stride_in_1x1 or architecture.groups > 1)
    return {
        "source": source.path.name,
        "sha256": source.sha256,
        "family": selection.candidate.family.name,
        "trained_by": _trained_by(source) or _text(known, "trained_by") or selection.candidate.family.name,
        "begun_from": _begun_from(source) or _text(known, "begun_from"),
        "branch": selection.candidate.branch,
        "architecture": architecture.name,
        "depth": resnets.pop("DEPTH"),
        "stem": architecture.stem_kind,
        "resnets": resnets,
        "pixel_mean": list(pixels.mean),
        "pixel_std": list(pixels.std),
        "pixel_origin": pixels.origin,
        "format": pixels.format,
        "norm": "FrozenBN" if caffe2 else "SyncBN",
        "freeze_at": 2 if caffe2 else 0,
        "stride_in_1x1": pixels.stride_in_1x1,
        "tensors": len(selection.tensors),
        "dropped": selection.dropped,
        "warnings": [text for text in (selection.candidate.family.warning, unfinished(source)) if text],
        "tool": f"corinfomax {_version()}",
    }


def _text(known: Mapping[str, Any], field: str) -> str:
    """A field of the sidecar beside the source, where the source is an output of the converter itself."""
    value = known.get(field)
    return value if isinstance(value, str) else ""


def unfinished(source: Source) -> str:
    """A warning if the file is a checkpoint of this project from before the end of its run; else empty."""
    content = source.content if isinstance(source.content, dict) else {}
    position, train = content.get("position"), _at(content, "config", "TRAIN")
    if not str(content.get("format")).startswith("corinfomax-") or not isinstance(position, dict) or not train:
        return ""
    epoch, step, epochs, most = position.get("epoch"), position.get("step"), train.get("EPOCHS"), train.get("MAX_STEPS")
    if not isinstance(epoch, int) or not isinstance(epochs, int) or epoch >= epochs:
        return ""
    if isinstance(step, int) and isinstance(most, int) and 0 < most <= step:
        return ""
    return f"the run was not finished: this is its state after {epoch} of {epochs} epochs"


def _at(content: Any, *keys: str) -> dict[str, Any]:
    """The dictionary below these keys; empty where a file has another thing there."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def _trained_by(source: Source) -> str:
    """`corinfomax`, say, where the file says so: an encoder in its metadata, a checkpoint in itself or its config."""
    if source.metadata:
        return source.metadata.get("objective", "")
    content = source.content if isinstance(source.content, dict) else {}
    known: Any = ""
    if content.get("format") == "corinfomax-finetune":
        known = content.get("trained_by")
    elif content.get("format") == "corinfomax-pretrain":
        known = _at(content, "config", "OBJECTIVE").get("NAME")
    return known if isinstance(known, str) else ""


def _begun_from(source: Source) -> str:
    """The weights that pretraining began from: by an encoder's metadata, or by the config of a checkpoint."""
    if source.metadata:
        return source.metadata.get("begun_from", "")
    content = source.content if isinstance(source.content, dict) else {}
    known = _at(content, "config", "ENCODER").get("WEIGHTS") if content.get("format") == "corinfomax-pretrain" else ""
    return legible(known) if isinstance(known, str) else ""


def _version() -> str:
    try:
        return metadata.version("corinfomax")
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return "unknown"


def encode(sidecar: dict[str, Any]) -> bytes:
    """The sidecar as JSON text, the same bytes for the same fields.

    In names of files, bytes that are not UTF-8 become escapes such as \\udcff, which JSON has too.
    """
    text = json.dumps(sidecar, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def yaml_settings(sidecar: Mapping[str, Any]) -> list[str]:
    """`KEY: value` lines for a yaml config; each key can differ from Detectron2's default."""
    keys = {
        "MODEL.RESNETS.DEPTH": sidecar["depth"],
        **{f"MODEL.RESNETS.{key}": value for key, value in sidecar["resnets"].items()},
        "MODEL.RESNETS.NORM": sidecar["norm"],
        "MODEL.RESNETS.STRIDE_IN_1X1": sidecar["stride_in_1x1"],
        "MODEL.BACKBONE.FREEZE_AT": sidecar["freeze_at"],
        "MODEL.PIXEL_MEAN": sidecar["pixel_mean"],
        "MODEL.PIXEL_STD": sidecar["pixel_std"],
        "INPUT.FORMAT": sidecar["format"],
    }
    return [f"  {key}: {value}" for key, value in keys.items()]


def lazy_settings(sidecar: Mapping[str, Any], bottom_up: str = "model.backbone.bottom_up") -> list[str]:
    """Python statements for a `LazyConfig` whose `model` and `dataloader` are those of Detectron2's `common/`.

    Args:
        sidecar: of the weights.
        bottom_up: where the ResNet is: `model.backbone` for C4, whose head takes the same norm and strides.
    """
    basic = sidecar["depth"] < 50
    order = ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "NUM_GROUPS", "WIDTH_PER_GROUP")
    if tuple(sidecar["resnets"][key] for key in order) != _CHANNELS[not basic]:
        return ["  (the stages that LazyConfigs build by default have other widths; use ResNet.make_stage)"]
    strides = f"{bottom_up}.stages"
    lines = [
        f"{bottom_up}.stem.norm = {bottom_up}.stages.norm = {json.dumps(sidecar['norm'])}",
        f"{bottom_up}.stages.depth = {sidecar['depth']}",
        f'{strides}.pop("stride_in_1x1")' if basic else f"{strides}.stride_in_1x1 = {sidecar['stride_in_1x1']}",
        f"{bottom_up}.freeze_at = {sidecar['freeze_at']}",
        f"model.pixel_mean, model.pixel_std = {sidecar['pixel_mean']}, {sidecar['pixel_std']}",
        f"model.input_format = {json.dumps(sidecar['format'])}",
        f"dataloader.train.mapper.image_format = dataloader.test.mapper.image_format = {json.dumps(sidecar['format'])}",
    ]
    return [f"  {line}" for line in lines]
