"""A run's config.yaml, written with Detectron2's main branch or with v0.6, is read with either."""

import json

import pytest

pytest.importorskip("detectron2")

from detection import config as configs
from foundation.errors import UserError


@pytest.fixture
def written_with_main(tmp_path, monkeypatch):
    """Writes the config.yaml of a run whose Detectron2 had the newer keys, with these values."""
    real = configs.get_cfg

    def get_cfg_of_main():
        config = real()
        for key, value in configs.NEWER_KEYS.items():
            *groups, last = key.split(".")
            group = config
            for name in groups:
                group = group[name]
            group[last] = value
        return config

    def write(*overrides):
        with monkeypatch.context() as main:
            main.setattr(configs, "get_cfg", get_cfg_of_main)
            config = configs.load("shapes_R18_FPN", ["SEED", "7", *overrides])
        path = tmp_path / "config.yaml"
        path.write_text(config.dump())
        return path

    return write


def test_a_run_of_main_is_read_as_the_same_run_of_this_detectron2(written_with_main):
    path = written_with_main()
    assert all(key.rpartition(".")[2] in path.read_text() for key in configs.NEWER_KEYS)
    assert json.dumps(configs.load(str(path))) == json.dumps(configs.load("shapes_R18_FPN", ["SEED", "7"]))


def test_what_only_main_can_do_is_refused_without_it(written_with_main):
    if "USE_FED_LOSS" in configs.default_config().MODEL.ROI_BOX_HEAD:
        pytest.skip("this Detectron2 has the key")
    path = written_with_main("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", "True")
    with pytest.raises(UserError, match=r"MODEL.ROI_BOX_HEAD.USE_FED_LOSS True needs Detectron2's main branch"):
        configs.load(str(path))


def test_a_precision_that_pytorch_does_not_know_is_refused(written_with_main):
    with pytest.raises(UserError, match=r"FLOAT32_PRECISION must be one of \('highest', .* not 'tf32'"):
        written_with_main("FLOAT32_PRECISION", "tf32")
