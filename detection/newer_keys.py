"""Config keys that Detectron2's main branch has and its release v0.6 lacks.

A run's `config.yaml` holds every key there is. So that what was written with one Detectron2 is read with the other,
v0.6 takes the keys of main as well, with the values with which main computes what v0.6 does, and no others.
"""

from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from foundation.errors import UserError

# Source: detectron2/config/defaults.py of both.
DEFAULTS: dict[str, Any] = {
    "DATALOADER.REPEAT_SQRT": True,
    "FLOAT32_PRECISION": "",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": 0.5,
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": 50,
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": False,
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": False,
    "SOLVER.BASE_LR_END": 0.0,
    "SOLVER.NUM_DECAYS": 3,
    "SOLVER.RESCALE_INTERVAL": False,
}


def add(config: CfgNode, path: Path) -> list[str]:
    """Put in the keys that a file names and this Detectron2 lacks, with their defaults; returns them."""
    text = path.read_text(errors="replace")
    added = [key for key in DEFAULTS if _last(key) in text and _last(key) not in _group(config, key)]
    for key in added:
        _group(config, key)[_last(key)] = DEFAULTS[key]
    return added


def remove(config: CfgNode, added: list[str]) -> None:
    """Take out again what `add` put in, when the file has been read.

    Raises:
        UserError: a key has a value that only main knows what to do with.
    """
    for key in added:
        value = _group(config, key).pop(_last(key))
        if value != DEFAULTS[key]:
            raise UserError(
                f"{key} {value} needs Detectron2's main branch, installed from source: the installed Detectron2 lacks"
                f" this key, and does what {DEFAULTS[key]!r} stands for"
            )


def _group(config: CfgNode, key: str) -> CfgNode:
    for part in key.split(".")[:-1]:
        config = config[part]
    return config


def _last(key: str) -> str:
    return key.rpartition(".")[2]
