"""The note beside converted weights, which says all that a detector's configuration must agree with.

It is `NAME.json` beside `NAME.pkl`, and `NAME.pth.json` beside `NAME.pth`. Its fields:

    source          name of the file that was converted
    sha256          its digest
    family          which project's format it was recognised as
    trained_by      what trained it, in a word: as this project's own files say it (`corinfomax`), else `family`
    branch          which encoder of it was taken
    architecture    torchvision's name, such as `resnet50`
    depth           18, 34, 50, 101 or 152 (MODEL.RESNETS.DEPTH)
    stem            "imagenet": 7x7 with stride 2, then max-pooling; nothing else is converted
    resnets         the further keys of MODEL.RESNETS that describe it: STEM_OUT_CHANNELS, RES2_OUT_CHANNELS,
                    NUM_GROUPS, WIDTH_PER_GROUP
    pixel_mean      per channel in the order of `format`, in levels 0..255 (MODEL.PIXEL_MEAN)
    pixel_std       likewise (MODEL.PIXEL_STD)
    pixel_origin    how the two are known
    format          "RGB" or "BGR" (INPUT.FORMAT)
    stride_in_1x1   where blocks take their stride (MODEL.RESNETS.STRIDE_IN_1X1)
    tensors         number of tensors written
    dropped         {part of the source: number of tensors left out}
    notes           what a user has to know, possibly nothing
    tool            name and version of the converter
"""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from convert.pixels import Pixels
from convert.reader import Source
from convert.selection import Selection


def note_path(output: Path) -> Path:
    """Where the note of an output lies. Detectron2's weights come first: theirs is the one that training looks for."""
    return output.with_suffix(".json") if output.suffix == ".pkl" else output.with_name(f"{output.name}.json")


def describe(source: Source, selection: Selection, pixels: Pixels) -> dict[str, Any]:
    """The note's fields; see the module's docstring."""
    architecture = selection.architecture
    resnets = architecture.detectron2
    return {
        "source": source.path.name,
        "sha256": source.sha256,
        "family": selection.candidate.family.name,
        "trained_by": _trained_by(source) or selection.candidate.family.name,
        "branch": selection.candidate.branch,
        "architecture": architecture.name,
        "depth": resnets.pop("DEPTH"),
        "stem": "imagenet",
        "resnets": resnets,
        "pixel_mean": list(pixels.mean),
        "pixel_std": list(pixels.std),
        "pixel_origin": pixels.origin,
        "format": pixels.format,
        "stride_in_1x1": pixels.stride_in_1x1,
        "tensors": len(selection.tensors),
        "dropped": selection.dropped,
        "notes": [note for note in (selection.candidate.family.note,) if note],
        "tool": f"corinfomax {_version()}",
    }


def _trained_by(source: Source) -> str:
    """`corinfomax`, say, where the file says so: an encoder in its metadata, a checkpoint in itself or its config."""
    if source.metadata:
        return source.metadata.get("objective", "")
    if not isinstance(source.content, dict):
        return ""
    if source.content.get("format") == "corinfomax-finetune":
        return str(source.content.get("trained_by") or "")
    if source.content.get("format") != "corinfomax-pretrain":
        return ""
    return str(source.content.get("config", {}).get("OBJECTIVE", {}).get("NAME", ""))


def _version() -> str:
    try:
        return metadata.version("corinfomax")
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return "unknown"


def encode(note: dict[str, Any]) -> bytes:
    """The note as JSON text, the same bytes for the same note."""
    return (json.dumps(note, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
