"""The commands in the documents: each is taken by its entry point's parser, with recipes and keys that exist."""

import argparse
import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fvcore.common.config import CfgNode

from foundation.config import load_config

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = (
    "benchmarks",
    "configs",
    "convert",
    "detection",
    "docs",
    "foundation",
    "pretrain",
    "reporting",
    "shapes",
    "tests",
)
# Words that stand for something of the reader's. "..." stands for what the command above it has.
PLACEHOLDERS = {
    "CONFIG": "imagenet1k_R50",
    "RUN/config.yaml": "coco_R50_C4",
    "output/coco_R50_C4/config.yaml": "coco_R50_C4",
}


def commands() -> list[str]:
    """The lines of all code blocks that call Python, with continued lines joined and remarks cut off."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        blocks = "\n".join(line.strip() for line in text.splitlines() if line.startswith("    "))
        lines = re.findall(r"^(?:\w+=\S+ )*((?:python|torchrun) .*)$", blocks, flags=re.MULTILINE)
        found += [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return sorted(set(found))


def pretraining_keys(command: str) -> Callable[[], CfgNode]:
    """The defaults of an entry point of `pretrain`."""
    from pretrain import config
    from pretrain.evaluation import config as protocol
    from pretrain.evaluation import sweep

    names = {
        "train": config.get_defaults,
        "linear": protocol.get_linear_defaults,
        "finetune": protocol.get_finetune_defaults,
        "sweep": sweep.get_defaults,
    }
    return names[command]


def check(arguments: argparse.Namespace, package: str, command: str) -> None:
    """See that the recipe exists and takes the overrides."""
    overrides = [*getattr(arguments, "rest", ()), *arguments.overrides]
    if package == "detection":
        from detection import config as recipes

        recipes.load(arguments.config or "coco_R50_FPN_1x_moco", overrides)  # the default for own data
    else:
        folder = "pretrain" if command == "train" else command
        config = load_config(pretraining_keys(command)(), arguments.config, folder, overrides)
        if command == "sweep":
            from pretrain.evaluation import sweep

            sweep.plan(config)  # which takes the keys of its runs


@pytest.mark.parametrize("command", commands())
def test_a_command_is_taken(command: str) -> None:
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    script = next(word for word in words if word.endswith(".py") or word == "-m")
    arguments = [word for word in words[words.index(script) + 1 :] if word != "..."]
    package, _, file = script.rpartition("/")
    if package not in ("pretrain", "detection", "convert"):
        assert script == "-m" or (ROOT / script).is_file(), f"{script} is not there"
        return
    if package == "detection":
        pytest.importorskip("detectron2")
    command_name = file.removesuffix(".py")
    entry = importlib.import_module(f"{package}.{command_name}")
    if "--keys" in arguments:  # prints and ends, as --help does
        with pytest.raises(SystemExit) as left:
            entry.build_parser().parse_args(arguments)
        assert left.value.code == 0
        return
    parsed = entry.build_parser().parse_args(arguments)
    if getattr(parsed, "overrides", None) is not None and getattr(parsed, "config", None):
        check(parsed, package, command_name)


def test_documents_have_commands() -> None:
    found = " ".join(commands())
    assert all(script in found for script in ("pretrain/train.py", "convert/to_d2.py", "detection/train_net.py"))


def test_files_that_documents_name_exist() -> None:
    pattern = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`")
    missing = {
        f"{document.name}: {name}"
        for document in DOCUMENTS
        for name in pattern.findall(document.read_text())
        if not (ROOT / name).exists()
    }
    assert not missing


def test_commands_of_the_readme_can_be_pasted() -> None:
    blocks = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")]
    assert not [line for line in blocks if "..." in line or "/path/to" in line]


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            path = (document.parent / name) if name else document
            if not path.exists() or (anchor and anchor not in headings(path)):
                broken.append(f"{document.name}: {target}")
    assert not broken


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_index() -> None:
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "index.md").read_text()))


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision
    from safetensors.torch import save_file

    folder = tmp_path / "output" / "quick" / "pretrain"
    folder.mkdir(parents=True)
    encoder = {name: value for name, value in torchvision.models.resnet18().state_dict().items() if name[:3] != "fc."}
    save_file(encoder, folder / "encoder.safetensors")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["z"].grad.isfinite().all()
    assert names["z"].grad.count_nonzero()
