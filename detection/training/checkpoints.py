"""The checkpoints of a run: complete or absent, recognised when damaged, with an earlier one to fall back to.

A checkpoint is a file `model_NNNNNNN.pth` or `model_final.pth` directly in the run's folder. `model_best.pth` holds the
weights with the best metric, and `model_ema.pth` the average of the weights; a run is never resumed from these two.
`last_checkpoint` names the newest checkpoint, as Detectron2's tools expect. The newest is found by the number of its
iteration: a process that is killed before it writes `last_checkpoint` leaves an older name there. Files are read with
`weights_only`, so that a run folder of unknown origin cannot run code.

Detectron2 writes straight into the file under its final name and loads the last one without a check: a process that is
killed while it saves loses the run, and a flipped bit goes unnoticed. Here a file is written under a temporary name,
synced, read back and renamed, and `NAME.sha256` holds its digest. A checkpoint without a digest (of another program, or
of a process that was killed at that very moment) counts as intact if it can be read.
"""

import contextlib
import logging
import math
import os
import re
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from convert.reader import load_tree, read_checkpoint
from foundation import files
from foundation.errors import UserError

LAST = "last_checkpoint"
NUMBERED = re.compile(r"model_(\d{7,})\.pth")
FINAL = "model_final.pth"
BEST = "model_best.pth"
AVERAGE = "model_ema.pth"
logger = logging.getLogger(__name__)


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with the guarantees of this module.

    Args:
        model: whose weights are saved.
        folder: of the run.
        keep: how many of the newest numbered checkpoints stay, besides `model_final`; 0: all.
        checkpointables: what else is saved, by name.
    """

    def __init__(self, model: torch.nn.Module, folder: str, *, keep: int, **checkpointables: Any) -> None:
        super().__init__(model, folder, **checkpointables)
        self._keep = keep
        self._newest: tuple[Path, Any] | None = None  # what this process has saved last, and its iteration

    def save(self, name: str, **kwargs: Any) -> None:
        """Save model, checkpointables and `kwargs` as `name`.pth, and remove numbered checkpoints that are too old.

        `model_final` becomes a hard link to the numbered checkpoint of the same iteration, where the file system can.

        Raises:
            UserError: the disk is full or cannot be written; earlier checkpoints are untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path, iteration = Path(self.save_dir) / f"{name}.pth", kwargs.get("iteration")
        logger.info("Saving %s", path)
        source = self._newest[0] if self._newest and self._newest[1] == iteration else path
        if path.name != FINAL or source == path or not _link(source, path):
            state = {"model": self.model.state_dict()}
            state |= {key: value.state_dict() for key, value in self.checkpointables.items()} | kwargs
            write(path, state)
        self._newest = (path, iteration)
        _write_tag(path)
        if self._keep:
            remove_old(path.parent, self._keep)

    def mark_changed(self) -> None:
        """The model is no longer what was last saved or loaded."""
        self._newest = None

    def save_final(self, iteration: int) -> None:
        """Save the end of the training as `model_final`, unless that is what this process has last saved or loaded.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        if self._newest != (Path(self.save_dir) / FINAL, iteration):
            self.save(Path(FINAL).stem, iteration=iteration)

    def save_iteration(self, iteration: int) -> None:
        """Save a numbered checkpoint, unless this process has last saved that iteration.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        if not self._newest or self._newest[1] != iteration:
            self.save(f"model_{iteration:07d}", iteration=iteration)

    def save_best(self, iteration: int, metric: str, value: float, dataset: str) -> None:
        """Save the weights alone as `model_best.pth`, with iteration, metric, value and dataset of their evaluation.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        if self.save_to_disk:
            state = {"model": self.model.state_dict(), "iteration": iteration, "metric": metric, "value": value}
            state["dataset"] = dataset
            write(Path(self.save_dir) / BEST, state)

    def resume(self, path: Path) -> None:
        """Load everything that `save` has saved.

        Raises:
            UserError: the file is not a checkpoint of this command, or of another model.
        """
        state = read(path)
        try:
            self.model.load_state_dict(state["model"])
            for name, each in self.checkpointables.items():
                each.load_state_dict(state[name])
            self._newest = (path, state["iteration"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{path} is not a checkpoint of this run ({type(error).__name__}: {reason}): choose another --output;"
                " --weights starts a new run from its weights"
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        """What the inherited `load` reads by: no pickle runs code here either."""
        return read(Path(filename))


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint and its digest. Whenever the process is killed, `path` holds the old or the new content.

    Raises:
        UserError: it cannot be written, or not be read back; `path` is untouched.
    """

    def save(file: IO[bytes]) -> None:
        torch.save(state, file)

    try:
        files.write_with_digest(path, save)
    except OSError as error:
        said = files.describe_unsaved(error, path.parent, save, exists(path.parent))
        raise UserError(f"{path} cannot be saved: {said}") from error


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. No code in it is run.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    state = load_tree(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path} is not a checkpoint: it has no entry 'model'")
    return state


def read_best(folder: Path, metric: str, dataset: str) -> tuple[int, float] | None:
    """Iteration and value of `model_best.pth`, if it is there, is intact and is the best by `metric` on `dataset`."""
    path = folder / BEST
    if not path.is_file():
        return None
    if damage(path) is None:
        state = read(path)
        if state.get("metric") == metric and state.get("dataset", dataset) == dataset:  # earlier versions: no dataset
            return int(state["iteration"]), float(state["value"])
    logger.warning(
        "%s is damaged or the best by another metric or on another dataset: the next evaluation replaces it", path
    )
    return None


def remove_old(folder: Path, keep: int) -> None:
    """Remove numbered checkpoints that are older than the newest `keep` intact ones. Other files are left alone."""
    intact = 0
    for path in _numbered(folder):
        if intact >= keep:
            path.unlink(missing_ok=True)
            files.digest_file(path).unlink(missing_ok=True)
        elif damage(path) is None:
            intact += 1


def remove_drafts(folder: Path) -> None:
    """Remove what killed processes have left half written. Only for the process that holds the run's lock."""
    for path in folder.iterdir():
        name, dot, suffix = path.name.rpartition(".")
        checkpoint = name.replace(".sha256", ".pth")
        if dot and suffix in ("tmp", "new") and (_is_checkpoint(checkpoint) or checkpoint in (BEST, AVERAGE)):
            path.unlink(missing_ok=True)


def exists(folder: Path) -> bool:
    """Whether a run has left a checkpoint here, intact or not."""
    return (folder / LAST).exists() or (folder / FINAL).is_file() or bool(_numbered(folder))


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint that is intact; damaged ones are reported and passed over. None: there is none.

    Raises:
        UserError: there are checkpoints, but all are damaged. Training does not silently begin anew.
    """
    if not exists(folder):
        return None
    for path in _newest_first(folder):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is damaged (%s): trying the checkpoint before it", path, problem)
    raise UserError(f"{folder} holds no intact checkpoint: move the folder away to start again")


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is as it was saved."""
    try:
        wanted = files.digest_file(path).read_text().partition(" ")[0].strip()  # sha256sum writes the name after it
        return None if files.sha256_of(path) == wanted else "its content does not match its sha256"
    except FileNotFoundError:
        try:
            load_tree(path)
        except UserError as error:
            return str(error)
        return None
    except (OSError, UnicodeDecodeError) as error:
        return f"it or its digest cannot be read: {error}"


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints by falling iteration; of two of one iteration, `last_checkpoint` names the first."""
    found: dict[Path, float] = {path: iterations_of(path) - 1 for path in _numbered(folder)}
    if (folder / FINAL).is_file():
        found[folder / FINAL] = _iteration_in(folder / FINAL)
    named = _tagged(folder)
    return sorted(found, key=lambda path: (found[path], path.name == named), reverse=True)


def _tagged(folder: Path) -> str:
    """The name in `last_checkpoint`; empty where there is none."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if (folder / LAST).is_file():
            with (folder / LAST).open() as file:
                return file.read(100).strip()
    return ""


def _iteration_in(path: Path) -> float:
    """The iteration that a checkpoint notes; -1 if it notes none. A damaged one comes first, so that it is reported."""
    try:
        content = read_checkpoint(path).content
    except UserError:
        return math.inf
    iteration = content.get("iteration") if isinstance(content, dict) else None
    return iteration if isinstance(iteration, int) else -1


def iterations_of(path: Path) -> int:
    """How many iterations a numbered checkpoint has."""
    return int(path.stem.removeprefix("model_")) + 1


def _is_checkpoint(name: str) -> bool:
    return name == FINAL or NUMBERED.fullmatch(name) is not None


def _numbered(folder: Path) -> list[Path]:
    """The numbered checkpoints, the newest first."""
    numbers = {path: NUMBERED.fullmatch(path.name) for path in folder.glob("model_*.pth")}
    return sorted((path for path, match in numbers.items() if match), key=lambda path: int(path.stem[6:]), reverse=True)


def _link(source: Path, path: Path) -> bool:
    """Make `path` a hard link to a checkpoint, with its digest; False where that cannot be done."""
    draft = path.with_name(f"{path.name}.tmp")
    try:
        digest = files.digest_file(source).read_bytes()
        draft.unlink(missing_ok=True)
        os.link(source, draft)
        files.digest_file(path).unlink(missing_ok=True)
        draft.replace(path)  # where both are the same file already, this leaves the draft
        draft.unlink(missing_ok=True)
        files.write_atomic(files.digest_file(path), digest)
        files.sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        return False
    return True


def _write_tag(path: Path) -> None:
    """Name the newest checkpoint in `last_checkpoint`."""
    try:
        files.write_atomic(path.parent / LAST, path.name.encode())
    except OSError as error:
        raise UserError(
            f"{path.parent / LAST} cannot be written: {error.strerror or error}; {path.name} is saved, --resume"
            " continues from there"
        ) from error
