"""Install Detectron2: `python -m detection.install`.

Where a `detectron2` can already be imported, nothing is done. Otherwise its Python tree is taken from a source
distribution with a known digest, and installed as the distribution `detectron2`, which `pip list` shows and
`pip uninstall` removes. Nothing is compiled: the operators that the detectors here need come from torchvision. The tree
is that of upstream's tag v0.6, without its C++ sources.

The file is found and downloaded as pip is configured: index, mirror, proxy, certificates, offline folder.
"""

import argparse
import base64
import hashlib
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NoReturn

from foundation.errors import ArgumentParser, UserError, run

SDIST = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
VERSION = "0.6"
WHEEL = f"detectron2-{VERSION}-py3-none-any.whl"
DIST_INFO = f"detectron2-{VERSION}.dist-info"

# What the tree imports. The sdist's own upper bounds (iopath < 0.1.10, black == 21.4b2) are left out: newer versions
# work too.
REQUIREMENTS = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "matplotlib",
    "pycocotools",
    "termcolor",
    "yacs",
    "tabulate",
    "cloudpickle",
    "tqdm",
    "tensorboard",
    "fvcore",
    "iopath",
    "omegaconf",
    "hydra-core",
    "packaging",
)

# Source folders that upstream installs under another name.
PROJECTS = {
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab": "detectron2/projects/panoptic_deeplab",
}


def installed() -> bool:
    """Whether `import detectron2` would find a package (a mere folder of that name does not count)."""
    spec = importlib.util.find_spec("detectron2")
    return spec is not None and spec.origin is not None


def fetch_sdist(folder: Path, requirement: str = SDIST, sha256: str = SHA256) -> Path:
    """Download the source distribution into `folder` by pip, which checks the digest.

    Raises:
        UserError: it cannot be fetched, or its digest differs.
    """
    wanted = folder / "detectron2.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    name = requirement.partition("==")[0]
    # Its setup.py asks torch for the version of the compiler, hence no build isolation.
    done = _pip(
        "download", "--no-deps", "--no-build-isolation", "--no-binary", name,
        "--require-hashes", "--requirement", str(wanted), "--dest", str(folder),
    )  # fmt: skip
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise UserError(
            f"{requirement}: the downloaded file does not have the expected sha256, {sha256}; check pip's index, or"
            " install Detectron2 from source"
        )
    archives = sorted(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        raise UserError(
            f"{requirement} cannot be downloaded ({_reason(done.stderr)}); configure pip for an index or a folder"
            " (--find-links) that has it, or install Detectron2 from source"
        )
    return archives[0]


def build_wheel(sdist: Path, folder: Path) -> Path:
    """Write a wheel of the sdist's Python tree into `folder`; the same sdist gives the same bytes.

    Raises:
        UserError: the archive cannot be read, or has no package `detectron2`.
    """
    try:
        with tarfile.open(sdist) as archive:
            files = dict(sorted(_tree(archive)))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{sdist} cannot be read as a source distribution: {error}") from error
    if "detectron2/__init__.py" not in files:
        raise UserError(f"{sdist} holds no package detectron2; install Detectron2 from source")
    files[f"{DIST_INFO}/METADATA"] = _metadata().encode()
    files[f"{DIST_INFO}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: corinfomax\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{DIST_INFO}/top_level.txt"] = b"detectron2\n"
    record = "".join(f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items())
    files[f"{DIST_INFO}/RECORD"] = f"{record}{DIST_INFO}/RECORD,,\n".encode()
    path = folder / WHEEL
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)  # dated 1980, not now
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            wheel.writestr(entry, content)
    return path


def install(wheel: Path) -> None:
    """Install the wheel into this Python, without dependencies.

    Raises:
        UserError: pip refuses, for instance because the folder cannot be written.
    """
    # By name from its folder: `pip freeze` would list a wheel given by path with that path.
    found = ("--no-index", "--find-links", str(wheel.parent))
    done = _pip("install", "--no-deps", *found, f"detectron2=={VERSION}")
    if done.returncode:
        raise UserError(f"pip cannot install {wheel.name}: {_reason(done.stderr)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Install Detectron2 unless it is installed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(prog="python -m detection.install", description=__doc__, formatter_class=raw)
    parser.parse_args(argv)
    if installed():
        print("Detectron2 is already installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        install(build_wheel(fetch_sdist(Path(folder)), Path(folder)))
    print(f"Detectron2 {VERSION} installed")


def cli() -> NoReturn:
    """The command as a process: errors as one line, exit status 2."""
    run(main)


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _reason(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line.partition("ERROR:")[2].strip() for line in lines if "ERROR:" in line]
    return (errors or lines or ["pip gave no reason"])[-1]


def _tree(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Files of the package by their name in the wheel, and the licence."""
    for member in archive:
        path = PurePosixPath(member.name)
        inside = path.relative_to(path.parts[0]).as_posix()
        target = f"{DIST_INFO}/LICENSE" if inside == "LICENSE" else _installed_name(inside)
        content = archive.extractfile(member) if member.isfile() else None
        if target and content:
            yield target, content.read()


def _installed_name(inside: str) -> str:
    """Where a file of the sdist belongs, "" for one that is not installed."""
    for source, target in {**PROJECTS, "detectron2": "detectron2"}.items():
        if inside.startswith(f"{source}/"):
            return target + inside.removeprefix(source)
    return ""


def _metadata() -> str:
    return "".join(
        [
            f"Metadata-Version: 2.1\nName: detectron2\nVersion: {VERSION}\n",
            "Summary: Detectron2's Python tree, without its C++ operators\n",
            "Home-page: https://github.com/facebookresearch/detectron2\n",
            "Author: FAIR\nLicense: Apache-2.0\nLicense-File: LICENSE\nRequires-Python: >=3.7\n",
            *(f"Requires-Dist: {name}\n" for name in REQUIREMENTS),
        ]
    )


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    cli()
