"""`--keys`: what the comments beside the defaults say."""

import inspect
from collections.abc import Callable

import pytest
from fvcore.common.config import CfgNode

from foundation.config import describe_keys, key_meanings, keys, meaning_of
from foundation.errors import UserError
from pretrain import config, train
from pretrain.evaluation import config as evaluation
from pretrain.evaluation import sweep

SOURCE = """
def get_defaults():
    c = CfgNode()
    c.SEED = 0  # of everything
    c.TRAIN = CfgNode()  # the optimisation
    c.TRAIN.LR = 0.2
    c.TRAIN.DIMS = [
        1,
    ]  # of the # layers
    other = 3  # not a key

    # What both keys
    # have in common.
    c.TRAIN.FIRST = 1
    c.TRAIN.SECOND = 2
    c.TRAIN.THIRD = 3  # its own
"""


def test_meanings_are_the_comments_of_the_assignments() -> None:
    assert key_meanings(SOURCE) == {
        "SEED": "of everything",
        "TRAIN": "the optimisation",
        "TRAIN.DIMS": "of the # layers",
        "TRAIN.FIRST": "What both keys have in common.",
        "TRAIN.SECOND": "What both keys have in common.",
        "TRAIN.THIRD": "its own",
    }


@pytest.mark.parametrize(
    "defaults",
    [config.get_defaults, evaluation.get_linear_defaults, evaluation.get_finetune_defaults, sweep.get_defaults],
)
def test_every_key_of_pretraining_is_explained(defaults: Callable[[], CfgNode]) -> None:
    meanings = key_meanings(inspect.getsource(inspect.getmodule(defaults)))
    assert [key for key in keys(defaults()) if key not in meanings] == []


def test_every_own_key_of_detection_is_explained() -> None:
    detector = pytest.importorskip("detection.config")
    from detectron2.config import get_cfg

    meanings = key_meanings(inspect.getsource(detector))
    own = set(keys(detector.default_config())) - set(keys(get_cfg())) - set(detector.NEWER_KEYS)
    assert own
    assert [key for key in sorted(own) if not meaning_of(key, meanings)] == []


def test_keys_are_printed_by_pattern(capsys: pytest.CaptureFixture, error_of: Callable) -> None:
    with pytest.raises(SystemExit) as left:
        train.main(["--keys", "train.w*"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["TRAIN.WARMUP_EPOCHS", "TRAIN.WARMUP_LR", "TRAIN.WEIGHT_DECAY"]
    assert lines[1].split()[1] == "0.003"
    assert "no config key matches 'EPOCH'; try '*EPOCH*'" in error_of(train.main, ["--keys", "EPOCH"])
    with pytest.raises(UserError):
        next(describe_keys(config.get_defaults(), SOURCE, "x"))
