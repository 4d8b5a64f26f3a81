"""The checkpoints of a run: each whole or not there, recognised when damaged, and the one before at hand.

Detectron2 writes straight into the file under its final name, and takes the last one whatever is in it: a process that
is killed in a save has lost its run, and a flipped bit is loaded without notice. Here a checkpoint is written aside,
synced, read back and renamed; `NAME.sha256` beside `NAME.pth` holds its digest; `last_checkpoint` names the newest, as
Detectron2's tools expect. A checkpoint without a digest (of another program, or of a process that was killed at that
very moment) counts as intact if it can be read.
"""

import contextlib
import hashlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from foundation import files
from foundation.errors import UserError

LAST = "last_checkpoint"
NUMBERED = "model_[0-9]*.pth"
FINAL = "model_final.pth"
logger = logging.getLogger(__name__)


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with saving and finding as this module's text says.

    Args:
        model: whose weights are saved.
        folder: of the run.
        keep: so many of the newest numbered checkpoints stay, besides `model_final`; 0: all.
        checkpointables: what else is saved, by name.
    """

    def __init__(self, model: torch.nn.Module, folder: str, *, keep: int, **checkpointables: Any) -> None:
        super().__init__(model, folder, **checkpointables)
        self._keep = keep

    def save(self, name: str, **kwargs: Any) -> None:
        """Save model, checkpointables and `kwargs` as `name`.pth, and drop numbered checkpoints that are too old.

        Raises:
            UserError: the disk is full or cannot be written; earlier checkpoints are untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        state = {"model": self.model.state_dict()}
        state |= {key: value.state_dict() for key, value in self.checkpointables.items()} | kwargs
        path = Path(self.save_dir) / f"{name}.pth"
        logger.info("Saving %s", path)
        write(path, state)
        files.write_atomic(path.parent / LAST, path.name.encode())
        if self._keep:
            for old in _numbered(path.parent)[self._keep :]:
                old.unlink(missing_ok=True)
                digest_file(old).unlink(missing_ok=True)


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint and its digest. Whenever the process is killed, `path` holds the old or the new content.

    Raises:
        UserError: it cannot be written, or not be read back; `path` is untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    digest = hashlib.sha256(content).hexdigest()
    draft = path.with_name(f"{path.name}.new")
    try:
        files.write_synced(draft, content)
        if _digest(draft) != digest:
            raise OSError("what was read back is not what was written")
        digest_file(path).unlink(missing_ok=True)  # for a moment none, rather than another content's
        os.replace(draft, path)
        files.write_atomic(digest_file(path), f"{digest}\n".encode())
        files.sync_folder(path.parent)  # before older checkpoints are dropped
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be saved: {error.strerror or error} (it needs {len(content) / 1e6:.0f} MB); earlier"
            " checkpoints are untouched, --resume goes on from there"
        ) from error


def exists(folder: Path) -> bool:
    """Whether a run has left a checkpoint here, intact or not."""
    return (folder / LAST).exists() or bool(_candidates(folder))


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint that is intact; damaged ones are reported and passed over. None: there is none.

    Raises:
        UserError: there are checkpoints, but all are damaged. Training does not silently begin anew.
    """
    if not exists(folder):
        return None
    for path in _candidates(folder):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is damaged (%s): trying the checkpoint before it", path, problem)
    raise UserError(f"{folder} holds no checkpoint that is intact: move the folder away to begin anew")


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is as it was saved."""
    try:
        wanted = digest_file(path).read_text().partition(" ")[0].strip()  # sha256sum writes the name behind it
    except FileNotFoundError:
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen kinds for files that are no checkpoints
            return str(error).partition("\n")[0] or type(error).__name__
        return None
    except (OSError, UnicodeDecodeError) as error:
        return f"its digest cannot be read: {error}"
    return None if _digest(path) == wanted else "its content does not match its sha256"


def digest_file(path: Path) -> Path:
    """Where the digest of a checkpoint is."""
    return path.with_suffix(".sha256")


def _candidates(folder: Path) -> list[Path]:
    """The checkpoints that are there: the one named as the last, then by falling number."""
    named = []
    with contextlib.suppress(OSError, UnicodeDecodeError):
        named = [folder / (folder / LAST).read_text().strip()]
    return [path for path in dict.fromkeys([*named, *_numbered(folder), folder / FINAL]) if path.is_file()]


def _numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob(NUMBERED), reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
