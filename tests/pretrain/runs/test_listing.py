"""`--list-runs` on runs that pretraining made here; fabricated ones are in tests/foundation/test_run_states.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from foundation.run_states import find_runs
from pretrain import train
from pretrain.runs.weights import read_weights
from pretrain.training import run
from tests.pretrain.tiny_encoder import use_tiny_encoder

TINY = [
    *("DATA.NAME", "folder", "DATA.IMAGE_SIZE", "32", "DATA.WORKERS", "0", "TRAIN.BATCH_SIZE", "8", "LOG.PERIOD", "1"),
    *("PROJECTOR.DIMS", "[16, 8]", "TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.LR", "0.01"),
]


def test_runs_are_listed_with_what_is_left(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.main(["--output", "output/a/whole", *TINY, "DATA.ROOT", str(photos)])
    train.main(["--output", "output/part", *TINY, "DATA.ROOT", str(photos), "TRAIN.MAX_STEPS", "4"])
    (Path("output") / "part" / "encoder.safetensors").unlink()  # as if it had been killed there
    with (Path("output") / "part" / "metrics.json").open("a") as record:  # steps that its checkpoint does not cover
        record.write('{"iteration": 4, "epoch": 1.67}\n')
    (Path("output") / "notes").mkdir()
    (Path("output") / "notes" / "config.yaml").write_text("a: 1")
    whole, part = find_runs(Path("output"))
    assert (whole.folder, whole.kind.name) == (Path("output/a/whole"), "pretrain")
    assert (whole.step, whole.done, whole.outlook) == (6, 2.0, "complete")
    assert (part.step, part.total, part.outlook) == (4, 2, "unfinished: continues with --resume")
    assert part.done == pytest.approx(4 / 3)
    assert part.saved is not None
    capsys.readouterr()
    train.main(["--list-runs"])
    first, second, note = capsys.readouterr().out.splitlines()[2:]
    assert "verified by --resume" in note
    assert first.split()[:6] == ["output/a/whole", "pretrain", "2", "of", "2", "epochs"]
    assert second.split()[:7] == ["output/part", "pretrain", "1.3", "of", "2", "epochs", "4"]


def test_a_complete_run_that_goes_on_is_unfinished_until_its_new_end(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiny_encoder(monkeypatch)
    settings = ["--output", str(tmp_path), *TINY, "DATA.ROOT", str(photos)]
    train.main([*settings, "TRAIN.MAX_STEPS", "2"])
    trial = read_weights(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(run, "export", lambda *_: None)  # as if it had been killed before its end
        train.main([*settings, "--resume", "TRAIN.MAX_STEPS", "4"])
    assert [state.outlook for state in find_runs(tmp_path)] == ["unfinished: continues with --resume"]
    later = read_weights(str(tmp_path))
    assert later.source.endswith("last.pt")
    assert any(not trial.tensors[name].equal(tensor) for name, tensor in later.tensors.items())
    train.main([*settings, "--resume", "TRAIN.MAX_STEPS", "4"])
    train.main([*settings, "--resume", "TRAIN.MAX_STEPS", "4"])  # nothing is left to do
    assert [state.outlook for state in find_runs(tmp_path)] == ["complete"]
    assert all(tensor.equal(later.tensors[name]) for name, tensor in read_weights(str(tmp_path)).tensors.items())


def test_a_folder_that_is_not_there_is_said(tmp_path: Path, error_of: Callable[..., str]) -> None:
    assert "no folder" in error_of(train.main, ["--list-runs", str(tmp_path / "nowhere")])
    assert error_of(train.main, ["--list-runs", ""]).startswith("--list-runs names no folder")
