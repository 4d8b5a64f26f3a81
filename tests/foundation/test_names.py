"""Names of runs, and counts."""

from pathlib import Path

import pytest

from foundation.names import counted, short_names


def test_counts() -> None:
    nouns = [
        (0, "image"),
        (1, "image"),
        (2500, "image"),
        (1, "process"),
        (2, "process"),
        (3, "batch"),
        (4, "epoch"),
        (1.0, "hour"),
    ]
    assert [counted(*one) for one in nouns] == [
        *("0 images", "1 image", "2,500 images", "1 process", "2 processes", "3 batches", "4 epochs", "1 hour")
    ]
    assert counted(1.5, "hour") == "1.5 hours"


def test_names_are_as_short_as_tells_apart() -> None:
    assert short_names([Path("/a/b/low"), Path("/a/c/high")]) == ["low", "high"]
    assert short_names([Path("/a/seed0/pretrain"), Path("/a/seed1/pretrain")]) == ["seed0", "seed1"]
    assert short_names([Path("/a/x/seed0/run"), Path("/a/y/seed0/run")]) == ["x", "y"]
    assert short_names([Path("/a/x/1/run"), Path("/a/y/2/run"), Path("/a/y/1/run")]) == ["x/1", "y/2", "y/1"]
    assert short_names([Path("/a/x/run"), Path("/a/x/y/run")]) == ["run", "y/run"]


def test_a_link_keeps_its_name_and_a_dot_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("seed0", "seed1"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "mine").symlink_to(tmp_path / "runs" / "seed0")
    monkeypatch.chdir(tmp_path / "runs" / "seed1")
    assert short_names([tmp_path / "mine", Path(), Path("../seed0")]) == ["mine", "seed1", "seed0"]
