"""`python -m shapes`: the folder on stdout, the sheet as a picture, errors as UserError."""

import pytest
from PIL import Image

from foundation.errors import UserError
from shapes import __main__ as command


@pytest.fixture(autouse=True)
def _small_by_default(monkeypatch, rendered):
    monkeypatch.setattr(command, "ensure_rendered", lambda root, seed, recipe: rendered)


def test_it_prints_the_folder_and_draws_a_sheet(rendered, tmp_path, capsys):
    command.main(["--sheet", str(tmp_path / "sheet.png")])
    assert capsys.readouterr().out.strip() == str(rendered)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 600
        assert sheet.height > 600


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "-1"],
        ["--sheet", "/nowhere/x.png"],
        ["--sheet", "x.nope"],
        ["--fraction", "0"],
        ["--fraction", "0.1"],
    ],
)
def test_what_cannot_work_is_an_error(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=arguments[0]):
        command.main(arguments)


def test_a_fraction_of_the_pictures(tmp_path, monkeypatch):
    recipes = []
    monkeypatch.setattr(command, "ensure_rendered", lambda root, seed, recipe: recipes.append(recipe) or root)
    command.main(["--root", str(tmp_path), "--fraction", "0.001"])
    assert (recipes[0].unlabeled, recipes[0].objects_train, recipes[0].scenes_val) == (6, 1, 1)
    assert recipes[0].object_side == 96
