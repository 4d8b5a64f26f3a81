"""Cores and memory, by files as the kernel writes them."""

import os
from pathlib import Path

import pytest

from foundation import machine


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the system's files; none is there at first."""
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("quota", "cores"), [("", 8), ("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)]
)
def test_cores_are_those_of_the_affinity_and_the_quota(system: Path, quota: str, cores: int) -> None:
    (system / "cpu.max").write_text(quota)
    assert machine.usable_cores() == cores


def test_memory_is_what_the_kernel_and_the_container_leave(system: Path) -> None:
    assert machine.available_memory() is None
    (system / "meminfo").write_text("MemTotal:  1000 kB\nMemAvailable:  500 kB\n")
    assert machine.available_memory() == 500 * 1024
    (system / "memory.max").write_text("max\n")
    (system / "memory.current").write_text("400000\n")
    assert machine.available_memory() == 500 * 1024
    (system / "memory.max").write_text("450000\n")
    assert machine.available_memory() == 50000
    (system / "memory.stat").write_text("anon 1000\nfile 100000\nfile_mapped 5\n")  # cached files can be dropped
    assert machine.available_memory() == 150000
