"""Paths and config keys mixed on one command line."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from foundation.command_line import split_paths
from foundation.errors import run


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


def test_what_exists_is_a_path_in_capitals_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PHOTOS").mkdir()
    (tmp_path / "IMG.2024").mkdir()
    (tmp_path / "PHOTOS.tar").touch()
    names = ["PHOTOS", "IMG.2024", "PHOTOS.tar"]
    assert split_paths([*names, "TRAIN.LR", "0.1"]) == (names, ["TRAIN.LR", "0.1"])


@pytest.mark.usefixtures("as_a_command")
def test_standard_output_takes_names_that_are_not_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="utf-8"))
    with pytest.raises(SystemExit) as leaving:
        run(lambda argv: print("\udcff.jpg"))
    assert (leaving.value.code, content.getvalue()) == (0, b"\\udcff.jpg\n")


def test_help_of_every_command_of_pretrain_imports_nothing_heavy() -> None:
    folder = Path(__file__).parents[2] / "pretrain"
    scripts = [str(path) for path in sorted(folder.glob("*.py")) if "def cli()" in path.read_text()]
    code = f"""
import runpy, sys
for script in {scripts!r}:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        assert leaving.code in (None, 0), script
    loaded = {{"torch", "torchvision", "numpy", "matplotlib", "sklearn", "fvcore"}} & set(sys.modules)
    assert not loaded, (script, loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("train", "linear", "finetune", "transfer", "sweep", "figures"):
        assert f"usage: pretrain/{name}.py" in done.stdout
    assert "--hours" in done.stdout
