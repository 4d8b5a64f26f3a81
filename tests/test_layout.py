"""The layout that CONTRIBUTING asks for. The directions of imports are checked by `lint-imports`."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "convert", "detection", "foundation", "pretrain", "reporting", "shapes")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_no_folder_holds_more_modules_than_a_reader_can_survey() -> None:
    folders = {path.parent for path in MODULES}
    crowded = {str(folder): count for folder in folders if (count := len(list(folder.glob("*.py")))) > 20}
    assert not crowded


def test_every_folder_of_modules_is_a_package_that_says_what_it_is_for() -> None:
    for folder in {path.parent for path in MODULES}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_every_module_says_its_job_in_its_first_line() -> None:
    silent = [str(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_names_say_what_a_module_holds() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    assert not [path for path in MODULES if path.stem in vague]


def test_every_package_is_under_the_import_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert {*contracts["root_packages"], "configs"} == set(PACKAGES)
    rooms = {path.parent.name for path in MODULES if path.parent.parent.name in ("pretrain", "detection")}
    listed = " ".join(layer for contract in contracts["contracts"] for layer in contract["layers"])
    assert all(room in listed for room in rooms)
