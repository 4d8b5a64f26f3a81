"""The install step on source distributions made here; pip reads them from a folder, as it would offline."""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile

import pytest

from detection import install
from foundation.errors import UserError

TREE = {
    "setup.py": "from setuptools import setup\nsetup(name='pb1-detectron2', version='0.6', packages=[])\n",
    "PKG-INFO": "Metadata-Version: 2.1\nName: pb1-detectron2\nVersion: 0.6\n",
    "LICENSE": "a licence\n",
    "README.md": "not installed\n",
    "tools/train_net.py": "not installed\n",
    "detectron2/__init__.py": "__version__ = '0.6'\n",
    "detectron2/layers/__init__.py": "x = 1\n",
    "detectron2/model_zoo/configs/Base.yaml": "VERSION: 2\n",
    "projects/PointRend/point_rend/__init__.py": "y = 2\n",
}


def write_sdist(folder, tree):
    path = folder / "pb1-detectron2-0.6.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in tree.items():
            entry = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A folder that is all pip can see."""
    folder = tmp_path / "links"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_wheel_holds_the_python_tree_and_is_reproducible(tmp_path):
    sdist = write_sdist(tmp_path, TREE)
    wheel = install.build_wheel(sdist, tmp_path)
    first = wheel.read_bytes()
    assert install.build_wheel(sdist, tmp_path).read_bytes() == first
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert names == {
            "detectron2/__init__.py",
            "detectron2/layers/__init__.py",
            "detectron2/model_zoo/configs/Base.yaml",
            "detectron2/projects/point_rend/__init__.py",
            *(f"detectron2-0.6.dist-info/{name}" for name in
              ("LICENSE", "METADATA", "RECORD", "WHEEL", "top_level.txt")),
        }  # fmt: skip
        record = archive.read("detectron2-0.6.dist-info/RECORD").decode()
    assert {line.split(",")[0] for line in record.splitlines()} == names


def test_pip_installs_lists_and_removes_the_wheel(tmp_path):
    wheel = install.build_wheel(write_sdist(tmp_path, TREE), tmp_path)
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", "--target", target, wheel], check=True)
    listed = subprocess.run([*pip, "list", "--path", target], check=True, capture_output=True, text=True)
    assert "detectron2 0.6" in " ".join(listed.stdout.split())


def test_a_sdist_without_the_package_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no package detectron2"):
        install.build_wheel(write_sdist(tmp_path, {"setup.py": ""}), tmp_path)


def test_a_damaged_sdist_is_refused(tmp_path):
    sdist = write_sdist(tmp_path, TREE)
    sdist.write_bytes(sdist.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read as a source distribution"):
        install.build_wheel(sdist, tmp_path)


def test_fetching_takes_the_file_with_the_right_digest(offline, tmp_path):
    digest = hashlib.sha256(write_sdist(offline, TREE).read_bytes()).hexdigest()
    assert install.fetch_sdist(tmp_path, sha256=digest).name == "pb1-detectron2-0.6.tar.gz"


def test_fetching_refuses_another_file(offline, tmp_path):
    write_sdist(offline, TREE)
    with pytest.raises(UserError, match="does not have the expected sha256, 5d2e9e51"):
        install.fetch_sdist(tmp_path)


def test_fetching_says_when_there_is_nothing_to_fetch(offline, tmp_path):
    with pytest.raises(UserError, match=r"cannot be downloaded .*No matching distribution"):
        install.fetch_sdist(tmp_path)


def test_nothing_happens_when_it_is_there(monkeypatch, capsys):
    monkeypatch.setattr(install, "installed", lambda: True)
    monkeypatch.setattr(install, "_pip", lambda *_: pytest.fail("pip was called"))
    install.main([])
    assert "already installed" in capsys.readouterr().out
