"""Configuration files: unknown keys and wrong types are errors that help."""

import os
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from fvcore.common.config import CfgNode

from foundation.config import config_folder, find_config, load_config
from foundation.errors import UserError
from foundation.yaml_files import read_yaml
from pretrain.config import get_defaults, validate

LETTERS = "abcdefghijklmnopqrst"


def load(*overrides: str, name: str = "shapes_R18") -> CfgNode:
    config = load_config(get_defaults(), name, "pretrain", overrides)
    validate(config)
    return config


@pytest.mark.parametrize("path", sorted(config_folder("pretrain").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_is_valid(path: Path) -> None:
    load(name=path.stem)


def test_overrides_and_conveniences() -> None:
    config = load("TRAIN.LR", "1", "OBJECTIVE.EPS", "1e-6", "DATA.ROOT", "/a b", "PROJECTOR.DIMS", "[8, 4]")
    assert (config.TRAIN.LR, type(config.TRAIN.LR)) == (1.0, float)
    assert config.OBJECTIVE.EPS == 1e-6
    assert config.DATA.ROOT == "/a b"
    assert config.PROJECTOR.DIMS == [8, 4]


def test_key_value_pairs_and_assignments_mix() -> None:
    config = load("TRAIN.LR=0.5", "DATA.ROOT", "/a=b", "TRAIN.EPOCHS=30", "DATA.CLASSES=")
    assert (config.TRAIN.LR, config.DATA.ROOT, config.TRAIN.EPOCHS, config.DATA.CLASSES) == (0.5, "/a=b", 30, "")


def test_a_value_that_looks_like_a_number_is_text_where_text_is_held() -> None:
    config = load("DATA.ROOT", "2024", "ENCODER.WEIGHTS=007", "DATA.CACHE", "None", "LOG.WANDB", "'quoted'")
    assert (config.DATA.ROOT, config.ENCODER.WEIGHTS, config.DATA.CACHE) == ("2024", "007", "None")
    assert config.LOG.WANDB == "quoted"


def test_base_chain_and_strings_that_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("TRAIN:\n  EPOCHS: 30\n  LR: 1e-3\n")
    (tmp_path / "leaf.yaml").write_text("_BASE_: base.yaml\nTRAIN:\n  EPOCHS: 40\n")
    config = load(name=str(tmp_path / "leaf.yaml"))
    assert (config.TRAIN.EPOCHS, config.TRAIN.LR) == (40, 0.001)  # YAML 1.1 reads 1e-3 as a string


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["TRAIN.EPOCH", "3"], "no config key 'TRAIN.EPOCH'; did you mean 'TRAIN.EPOCHS'"),
        (["EPOCHS", "3"], "did you mean 'TRAIN.EPOCHS'"),
        (["train.lr", "3"], "no config key 'train.lr'; did you mean 'TRAIN.LR'"),
        (["TRAIN.WORKERS", "3"], "no config key 'TRAIN.WORKERS'; did you mean 'DATA.WORKERS'?"),  # of another group
        (["TRAIN.LRR", "3"], "did you mean 'TRAIN.LR'?"),
        (["TRAIN.EPOCHS.X", "3"], "TRAIN.EPOCHS must be of type int"),
        (["TRAIN", "3"], "TRAIN is a group of keys"),
        (["TRAIN.EPOCHS", "many"], "TRAIN.EPOCHS must be of type int like 10, not str 'many'"),
        (["TRAIN.EPOCHS", "1.5"], "TRAIN.EPOCHS must be of type int"),
        (["TRAIN.EPOCHS", "True"], "TRAIN.EPOCHS must be of type int"),
        (["TRAIN.LR", "True"], "TRAIN.LR must be of type float"),
        (["TRAIN.LR", "fast"], "TRAIN.LR must be of type float"),
        (["TRAIN.LR", "nan"], "TRAIN.LR must be at least"),
        (["TRAIN.LR", "-1"], "TRAIN.LR must be at least"),
        (["TRAIN.LR", "inf"], "TRAIN.LR must be at least"),
        (["TRAIN.BATCH_SIZE", "0"], "TRAIN.BATCH_SIZE must be at least 2"),
        (["TRAIN.WARMUP_EPOCHS", "99"], "must be below TRAIN.EPOCHS"),
        (["DATA.NAME", "imagenet"], "is not one of shapes, folder"),
        (["ENCODER.NAME", "vit"], "ENCODER.NAME is 'vit', which is not one of resnet18"),
        (["PROJECTOR.DIMS", "[8, 'x']"], "PROJECTOR.DIMS[1] must be of type int"),
        (["PROJECTOR.DIMS", "[8, 0]"], "PROJECTOR.DIMS[1] must be at least 1"),
        (["PROJECTOR.DIMS", "[]"], "PROJECTOR.DIMS must be a list"),
        (["AUGMENT.BLUR", "[1.0]"], "AUGMENT.BLUR must be a list of 2"),
        (["AUGMENT.FLIP", "1.1"], "AUGMENT.FLIP must be between 0 and 1"),
        (["OBJECTIVE.FORGETTING", "1"], "OBJECTIVE.FORGETTING must be between"),
        (["TRAIN.EPOCHS"], "'TRAIN.EPOCHS' has no value"),
    ],
)
def test_wrong_overrides(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(*overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["FOO.BAR", "TRAIN.XYZ", "XYZ"])
def test_no_key_is_suggested_where_none_is_near(key: str) -> None:
    with pytest.raises(UserError, match=rf"there is no config key '{key}'$"):
        load(key, "3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TRAIN: [", "not valid YAML at line"),
        ("TRAIN:\n  EPOHCS: 3\n", "did you mean 'TRAIN.EPOCHS'"),
        ("_BASE_: nowhere.yaml\n", "nowhere.yaml does not exist"),
        ("_BASE_: mine.yaml\n", "leads back to itself"),
        ("_BASE_: [1, 2]\n", "_BASE_ must be the path of one file"),
        ("TRAIN:\n  EPOCHS: " + "9" * 6000, "is not valid YAML"),
        ("TRAIN:\n  EPOCHS: 2024-99-99\n", "is not valid YAML"),
        ("TRAIN:\n  EPOCHS: 2024-01-01\n", "TRAIN.EPOCHS must be of type int"),
        ("TRAIN: " + "[" * 60 + "]" * 60, "is nested more than 50 deep"),
        ("TRAIN: " + "[" * 100_000, "is nested more than 50 deep"),
        (
            "a: &a [0, 0]\n" + "".join(f"{y}: &{y} [*{x}, *{x}]\n" for x, y in pairwise("abcdefghijklmnopqrst")),
            "values",
        ),
        ("TRAIN: &t [*t]\n", "nested more than 50 deep"),
        ("# " + "x" * 300_000, "is too large"),
        ("TRAIN: \udcff", "is not valid YAML"),
        ("just words\n", "cannot be read as a config"),
        ("", "cannot be read as a config"),
        ("TRAIN: 3\n", "TRAIN is a group of keys"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(UserError) as caught:
        load(name=str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_unknown_recipe_names_the_nearest(error_of: Callable) -> None:
    with pytest.raises(UserError, match=r"no config 'imagenet1k_R5'.*imagenet1k_R50"):
        load(name="imagenet1k_R5")


def test_a_wrong_key_is_named_with_the_file_of_the_chain_that_holds_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("TRAIN:\n  EPOHCS: 30\n")
    (tmp_path / "leaf.yaml").write_text("_BASE_: base.yaml\n")
    with pytest.raises(UserError, match=r"base\.yaml: there is no config key 'TRAIN.EPOHCS'"):
        load(name=str(tmp_path / "leaf.yaml"))


def test_a_named_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="is not a file"):
        read_yaml(tmp_path / "pipe.yaml")


@pytest.mark.parametrize("value", ["9" * 6000, "(" * 100_000, "[" * 500 + "]" * 500])
def test_values_that_python_cannot_parse_are_of_the_wrong_type(value: str) -> None:
    with pytest.raises(UserError, match=r"TRAIN\.EPOCHS must be of type int"):
        load("TRAIN.EPOCHS", value)


def test_recipes_are_found_beside_a_folder_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    assert find_config("shapes_R18", "pretrain").is_file()


def test_a_name_that_is_near_no_recipe_gets_the_list_of_them() -> None:
    with pytest.raises(UserError, match=r"there is no config 'xyz'.*; the recipes there are .*demo_R18, .*shapes_R18"):
        find_config("xyz", "pretrain")
