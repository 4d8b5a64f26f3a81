"""Paths and config keys mixed on one command line."""

import subprocess
import sys
from pathlib import Path

import pytest

from foundation.command_line import split_paths


@pytest.mark.parametrize(
    ("tokens", "paths", "overrides"),
    [
        (["photos"], ["photos"], []),
        (["a", "TRAIN.LR", "0.1", "b/c"], ["a", "b/c"], ["TRAIN.LR", "0.1"]),
        (["DATA.ROOT=/x y", "SEED", "3", "SEED=4"], [], ["DATA.ROOT=/x y", "SEED", "3", "SEED=4"]),
        (["AUGMENT.BLUR", "[0.5, 0.1]", "./PHOTOS"], ["./PHOTOS"], ["AUGMENT.BLUR", "[0.5, 0.1]"]),
        (["TRAIN.LR"], [], ["TRAIN.LR"]),  # has no value, which load_config says
        (["/a=b"], ["/a=b"], []),
    ],
)
def test_paths_are_told_from_keys(tokens: list[str], paths: list[str], overrides: list[str]) -> None:
    assert split_paths(tokens) == (paths, overrides)


def test_help_imports_nothing_heavy() -> None:
    script = Path(__file__).parents[2] / "pretrain" / "train.py"
    code = (
        f"import runpy, sys; sys.argv = ['train.py', '--help']\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'fvcore', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--hours" in done.stdout
