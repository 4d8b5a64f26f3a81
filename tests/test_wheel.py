"""The installed distribution, as a user gets it: an editable installation hides what the wheel lacks."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALL_HELPS = """
import contextlib, io, sys
from importlib.metadata import PathDistribution
from pathlib import Path
site = Path(sys.argv[1])
for script in PathDistribution(next(site.glob("corinfomax-*.dist-info"))).entry_points:
    sys.argv = [f"/bin/{script.name}", "--help"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        script.load()()
    assert f"usage: {script.name} " in out.getvalue(), script.name
    assert sys.modules[script.module].__file__.startswith(str(site)), script.module
    print(script.name)
"""
PREFETCH = """
import sys, time
from pathlib import Path
from pretrain.images.cache import ShardCache
from pretrain.images.prefetch import Prefetcher
from pretrain.images.shards import Shard
content = Path(sys.argv[1])
cache = ShardCache(Path(sys.argv[2]), limit=10**6, patience=10)
shard = Shard(f"pipe:cat {content}")
ahead = Prefetcher(cache, [shard])
ahead.want([0])
end = time.monotonic() + 60
while not cache.has(shard) and time.monotonic() < end:
    time.sleep(0.05)
ahead.close()
assert cache.has(shard)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that are in the repository: a `build` folder of the working tree could add others."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", str(target), str(source)], check=True)
    return next(target.glob("corinfomax-*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, which is all that its installation does to a folder on the path."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def python(site: Path, folder: Path, *arguments: str) -> str:
    """Run Python outside the repository, with nothing of it but the wheel on the path."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def test_the_wheel_holds_every_module_and_every_recipe(wheel: Path) -> None:
    packages = ("configs", "convert", "detection", "foundation", "pretrain", "reporting", "shapes")
    files = subprocess.run(["git", "ls-files", *packages], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    expected = {name for name in files.split() if (ROOT / name).is_file()}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    compiled = {name for name in held if name.endswith(".so")}
    assert held - compiled == {name for name in expected if not name.endswith(".c")}
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC")
    assert len(compiled) == (1 if shutil.which(compiler.split()[0]) else 0)


def test_the_metadata_tells_what_it_is(site: Path) -> None:
    distribution = PathDistribution(next(site.glob("corinfomax-*.dist-info")))
    metadata = Parser().parsestr(distribution.read_text("METADATA") or "")
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert "CorInfoMax" in metadata.get_payload()
    assert metadata["Home-page"] or metadata["Project-URL"]
    assert any("LICENSE" in str(path) for path in distribution.files or ())


def test_every_console_script_answers_help_under_its_own_name(site: Path, tmp_path: Path) -> None:
    assert "corinfomax-pretrain" in python(site, tmp_path, "-c", ALL_HELPS, str(site))


def test_the_prefetching_process_starts_beside_a_folder_that_shadows_the_package(site: Path, tmp_path: Path) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "__init__.py").write_text("raise ImportError('the wrong package')")
    (tmp_path / "image.jpg").write_bytes(b"content")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "image.jpg", "image.jpg")
    python(site, tmp_path, "-c", PREFETCH, str(tmp_path / "shard.tar"), str(tmp_path / "cache"))
