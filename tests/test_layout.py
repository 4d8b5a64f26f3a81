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
    # `lint-imports` then names every module that has no layer.
    assert all(contract["exhaustive"] for contract in contracts["contracts"] if "containers" in contract)


def test_every_command_is_a_console_script() -> None:
    run_as_modules = {"detection.install", "detection.stock"}  # by `python -m`
    commands = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if "\ndef cli(" in path.read_text()
    }
    scripts = (ROOT / "setup.py").read_text()
    assert [each for each in sorted(commands - run_as_modules) if f" = {each}:cli" not in scripts] == []
