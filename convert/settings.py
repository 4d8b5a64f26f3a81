"""What a configuration of Detectron2 has to set for converted weights: yaml and `LazyConfig`.

`detection/train_net.py` compares its configuration with the sidecar. Users of Detectron2's own tools have to set the
fields themselves: a detector with wrong pixel statistics or strides trains without an error and is less accurate.
"""

import json
from collections.abc import Mapping
from typing import Any

_CHANNELS = {True: (64, 256, 1, 64), False: (64, 64, 1, 64)}  # of `make_default_stages`: bottlenecks, basic blocks


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
