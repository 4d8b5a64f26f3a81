"""`--keys`: what the comments beside the defaults say."""

import inspect
from collections.abc import Callable

import pytest

from foundation.config import keys
from foundation.config_keys import describe_keys, key_meanings
from foundation.errors import UserError
from pretrain import config, train

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
"""


def test_meanings_are_the_comments_of_the_assignments() -> None:
    assert key_meanings(SOURCE) == {
        "SEED": "of everything",
        "TRAIN": "the optimisation",
        "TRAIN.DIMS": "of the # layers",
    }


def test_every_key_of_pretraining_is_explained() -> None:
    meanings = key_meanings(inspect.getsource(config))
    assert [key for key in keys(config.get_defaults()) if key not in meanings] == []


def test_keys_are_printed_by_pattern(capsys: pytest.CaptureFixture, error_of: Callable) -> None:
    train.main(["--keys", "train.w*"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["TRAIN.WARMUP_EPOCHS", "TRAIN.WARMUP_LR", "TRAIN.WEIGHT_DECAY"]
    assert lines[1].split()[1] == "0.003"
    assert "no config key matches 'EPOCH'; try '*EPOCH*'" in error_of(train.main, ["--keys", "EPOCH"])
    with pytest.raises(UserError):
        next(describe_keys(config.get_defaults(), SOURCE, "x"))
