"""The messages about a GPU that cannot be used, or whose memory runs out."""

import warnings
from pathlib import Path

import pytest
import torch

from foundation import devices
from foundation.errors import UserError


def unusable(patch: pytest.MonkeyPatch, folder: Path, said: str = "") -> None:
    """A machine with a GPU, which PyTorch cannot use."""

    def is_available() -> bool:
        if said:
            warnings.warn(said, stacklevel=1)
        return False

    (folder / "nvidia0").touch()
    patch.setattr(devices, "DEVICES", folder)
    patch.setattr(torch.cuda, "is_available", is_available)
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("build", "said", "reason"),
    [
        (None, "", "is built without CUDA; install a build that has it"),
        ("13.0", "The NVIDIA driver on your system\nis too old", "The NVIDIA driver on your system is too old"),
        ("13.0", "", "the driver does not answer; see nvidia-smi"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_said_with_the_reason(
    build: str | None,
    said: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    unusable(monkeypatch, tmp_path, said)
    monkeypatch.setattr(torch.version, "cuda", build)
    assert not devices.is_usable()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the GPU of this machine cannot be used; computing on the CPU. ")
    assert line.endswith(reason)


def test_a_gpu_that_is_hidden_or_not_there_is_not_spoken_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    unusable(monkeypatch, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not devices.is_usable()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia0").unlink()
    assert not devices.is_usable()
    assert capsys.readouterr().err == ""


FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.06 GiB is "
    "free. Including non-PyTorch memory, this process has 22.58 GiB in use."
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError(FULL),
            r"the GPU .*: lower X \(CUDA out of memory. Tried .* of which 1.06 GiB is free.\)$",
        ),
        (
            RuntimeError("CUDA error: out of memory\nCompile with"),
            r"the GPU .*: lower X \(CUDA error: out of memory\)$",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), r"the GPU .*: lower X \(.*ALLOC_FAILED"),
        (MemoryError(), r"this machine is out of memory: lower X \(MemoryError\)$"),
    ],
)
def test_memory_that_runs_out_is_said_with_what_to_do(error: Exception, said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}"), devices.report_out_of_memory("lower X"):
        raise error
    assert devices.is_out_of_memory(error)


def test_memory_of_the_host_that_runs_out_is_told_from_that_of_a_gpu() -> None:
    said = r"^this machine is out of memory: lower Y \(DefaultCPUAllocator: can't allocate memory: you tried "
    with pytest.raises(UserError, match=said), devices.report_out_of_memory("lower X", on_host="lower Y"):
        torch.empty(2**50)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), devices.report_out_of_memory("lower X"):
        raise RuntimeError("shapes do not match")
    assert not devices.is_out_of_memory(ValueError("CUDA error: out of memory"))
