"""Wrong configurations, made systematically from every key: each is one line that names it, and nothing is started."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from foundation.config import keys
from foundation.errors import UserError
from pretrain import train
from pretrain.config import get_defaults

# Values just outside of each key's range. Keys that are not here take any value of their type.
OUTSIDE: dict[str, list[str]] = {
    "SEED": ["-1", str(2**32)],
    "DATA.NAME": ["imagenet", "Shapes", "''"],
    "DATA.CLASSES": ["no_such_list"],
    "DATA.ROOT": ["/no/such/folder"],
    "DATA.WINDOW": ["-1", "2"],  # of a folder, which has no tars
    "DATA.CACHE_GB": ["-1", "0"],
    "DATA.WORKERS": ["-1", "100000"],
    "DATA.IMAGE_SIZE": ["0", "-32", "1000000"],
    "DATA.DECODE": ["fast", "Exact", "''"],
    "DATA.MEAN": ["[0.5, 0.5]", "[]", "[0.5, 0.5, 1.5]", "[0.5, 0.5, -0.1]", "[0.5, 0.5, 1e999]"],
    "DATA.STD": ["[0.5, 0.5]", "[0.5, 0.5, 0.0]", "[0.5, 0.5, 2.0]"],
    "DATA.MAX_UNREADABLE": ["-0.1", "1.1"],
    "DATA.WORKER_TIMEOUT": ["0", "-5"],
    "AUGMENT.REGION": ["[0.15]", "[0.0, 1.0]", "[0.9, 0.1]"],
    "AUGMENT.CROP_SCALE": ["[0.08]", "[0.0, 1.0]", "[0.08, 1.5]", "[0.9, 0.1]", "[0.1, 0.2, 0.3]"],
    "AUGMENT.FLIP": ["-0.1", "1.1"],
    "AUGMENT.JITTER": ["-0.1", "1.1"],
    "AUGMENT.BRIGHTNESS": ["-0.1"],
    "AUGMENT.CONTRAST": ["-0.1"],
    "AUGMENT.SATURATION": ["-0.1"],
    "AUGMENT.HUE": ["-0.1", "0.6"],
    "AUGMENT.GRAY": ["-0.1", "1.1"],
    "AUGMENT.BLUR": ["[1.0]", "[1.0, 1.1]", "[-0.1, 1.0]"],
    "AUGMENT.BLUR_SIGMA": ["[0.1]", "[0.0, 2.0]", "[0.1, 3.0]", "[2.0, 0.1]"],
    "AUGMENT.SOLARIZE": ["[0.2]", "[0.0, 1.2]", "[-0.1, 0.2]"],
    "ENCODER.NAME": ["resnet", "ResNet18", "vit_b_16", "''"],
    "ENCODER.STEM": ["ImageNet", "''"],
    "ENCODER.WEIGHTS": ["/no/such/file", "random"],
    "PROJECTOR.DIMS": ["[]", "[8, 0]", "[-8]", "[8, 1.5]", "[8, '8']"],
    "OBJECTIVE.NAME": ["moco", "''"],
    "OBJECTIVE.ATTRACTION": ["-1"],
    "OBJECTIVE.FORGETTING": ["-0.1", "1", "1.5"],
    "OBJECTIVE.EPS": ["-0.1"],
    "TRAIN.EPOCHS": ["0", "-1"],
    "TRAIN.BATCH_SIZE": ["0", "1", "-8"],
    "TRAIN.LR": ["0", "-0.1"],
    "TRAIN.MIN_LR": ["-0.1", "100"],
    "TRAIN.LR_PER_256": ["-0.1"],
    "TRAIN.WARMUP_EPOCHS": ["-1", "10", "1000"],
    "TRAIN.WARMUP_LR": ["-0.1"],
    "TRAIN.MOMENTUM": ["-0.1", "1"],
    "TRAIN.WEIGHT_DECAY": ["-0.1"],
    "TRAIN.OPTIMIZER": ["adam", "LARS"],
    "TRAIN.PRECISION": ["float16", "bf16", "''"],
    "TRAIN.CUDA_GRAPH": ["True", "yes", "''"],
    "TRAIN.MICRO_BATCH": ["-1"],
    "TRAIN.MAX_STEPS": ["-1"],
    "TRAIN.MAX_SKIPPED": ["-1"],
    "TRAIN.PEER_TIMEOUT": ["0", "-1"],
    "CHECKPOINT.MINUTES": ["-1"],
    "CHECKPOINT.STEPS": ["-1"],
    "LOG.PERIOD": ["0", "-1"],
    "PROBE.KIND": ["svm", "''"],
    "PROBE.EVERY": ["-1"],
    "PROBE.K": ["0", "-1"],
    "PROBE.ROOT": ["/no/such/folder"],
    "PROBE.MAX_TRAIN": ["0", "-1"],
}


def misspelt(key: str) -> list[str]:
    group, _, name = key.rpartition(".")
    prefix = f"{group}." if group else ""
    return [f"{prefix}{name[:-1]}", f"{prefix}{name.lower()}", f"{prefix}{name}S"]


def wrong_types(default: Any) -> list[str]:
    if isinstance(default, bool):
        return ["yes please", "2"]
    if isinstance(default, int):
        return ["many", "1.5", "True", "[1]"]
    if isinstance(default, float):
        return ["many", "True", "nan", "inf", "[1.0]"]
    if isinstance(default, list):
        return ["many", "3", "True"]
    return []  # any value is text; `OUTSIDE` has the texts that are wrong


def wrong_overrides(group: str) -> Iterator[list[str]]:
    """For each key of a group of the configuration."""
    defaults = get_defaults()
    for key in keys(defaults):
        if key.partition(".")[0] != group:
            continue
        value: Any = defaults
        for part in key.split("."):
            value = value[part]
        yield from ([wrong, str(value)] for wrong in misspelt(key))
        yield from ([key, text] for text in wrong_types(value))
        yield from ([key, text] for text in OUTSIDE.get(key, ()))
        yield [key]
        yield [f"{key}.X", "1"]
    if not isinstance(defaults[group], int):
        yield [group, "1"]


TOGETHER = [  # each value is allowed, but not with the other
    ["TRAIN.EPOCHS", "5", "TRAIN.WARMUP_EPOCHS", "5"],
    ["TRAIN.LR", "0.01", "TRAIN.MIN_LR", "0.02"],
    ["DATA.NAME", "cifar10", "DATA.CLASSES", "imagenet100"],
    ["DATA.NAME", "imagenet100", "DATA.CLASSES", "imagenet100"],  # none of its classes is there
    ["TRAIN.BATCH_SIZE", "1000"],  # more than there are images
]


def test_every_key_is_covered() -> None:
    free = {"DATA.CACHE", "ENCODER.ZERO_INIT_RESIDUAL", "TRAIN.COMPILE", "LOG.WANDB"}
    free |= {"PROJECTOR.NORM", "PROJECTOR.LAST_BIAS"}
    assert set(OUTSIDE) | free == set(keys(get_defaults()))


@pytest.fixture
def refusal(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[str]], str]]:
    """The message that a configuration is refused with; empty where it is accepted. Nothing may be written."""
    monkeypatch.chdir(tmp_path)
    base = ["DATA.NAME", "folder", "DATA.ROOT", str(photos), "TRAIN.BATCH_SIZE", "8", "DATA.WORKERS", "0"]

    def message(overrides: list[str]) -> str:
        try:
            train.main(["--dry-run", *base, *overrides])
        except UserError as error:
            return str(error)
        return ""

    yield message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("group", list(get_defaults()))
def test_a_wrong_value_is_refused_by_the_name_of_its_key(group: str, refusal: Callable[[list[str]], str]) -> None:
    for overrides in wrong_overrides(group):
        message = refusal(overrides)
        assert message, f"{overrides} is accepted"
        assert "\n" not in message
        if len(overrides) == 2:
            assert overrides[0].rpartition(".")[2].lower()[:-1] in message.lower(), f"{overrides} is not named"


@pytest.mark.parametrize("overrides", TOGETHER, ids=lambda overrides: overrides[0])
def test_values_that_contradict_each_other_are_refused(
    overrides: list[str], refusal: Callable[[list[str]], str]
) -> None:
    message = refusal(overrides)
    assert any(key in message for key in (*overrides[::2], "TRAIN.BATCH_SIZE"))
