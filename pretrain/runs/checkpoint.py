"""The checkpoint format, and its safe keeping.

A run directory holds `checkpoints/step_000000468.pt`, each with a `.sha256` beside it, and `checkpoints/last.pt`, a
link to the newest. A checkpoint is one dictionary of tensors and plain values, and so loads with `weights_only=True`:

    format     "corinfomax-pretrain"; "corinfomax-finetune" for a network trained with labels, "corinfomax-linear" for
               heads on a frozen encoder, which is not in the file
    version    1
    model      tensors by name: `encoder.*` in torchvision's naming, `projector.*` (or `head.*`)
    objective  state of the loss: `mean`, `covariance`, `cross_covariance`
    optimizer  state of the optimizer
    position   {"epoch", "step"}: how many of each are complete; of pretraining also "skipped", batches without effect
    config     the configuration, as nested dictionaries
    images     of pretraining: the number of images in the dataset

No random state: every random number is a function of (seed, epoch, index, view).

Saving: the checkpoint is written aside, synced and read back; then its digest is written, the file renamed, and the
link replaced. So a file under its final name is complete and has a digest, whenever the process is killed. Loading
checks the digest, since torch.load does not notice a flipped bit. The newest two are kept; an older one goes when the
new one has been read back.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from foundation.errors import UserError
from foundation.files import sync_folder, write_atomic

VERSION = 1
KEEP = 2
PRETRAIN = "corinfomax-pretrain"
FINETUNE = "corinfomax-finetune"
LINEAR = "corinfomax-linear"
logger = logging.getLogger("pretrain")


def save(run: Path, state: dict[str, Any]) -> Path:
    """Write a checkpoint of a run, make it the last one, and drop all but the newest two. Returns its path.

    Raises:
        UserError: the disk is full or cannot be written; the earlier checkpoints are untouched.
    """
    folder = run / "checkpoints"
    path = folder / f"step_{state['position']['step']:09d}.pt"
    aside = path.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = _write(aside, {"version": VERSION, **state})
        if _digest(aside) != digest:
            raise OSError("what was read back is not what was written")
        write_atomic(path.with_suffix(".sha256"), f"{digest}\n".encode())
        aside.replace(path)
        _link(path)
        sync_folder(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise UserError(
            f"cannot save {path}: {error} ({_free(run)}); earlier checkpoints are untouched, --resume continues there"
        ) from error
    for old in _saved(run)[KEEP:]:
        old.unlink(missing_ok=True)
        old.with_suffix(".sha256").unlink(missing_ok=True)
    return path


def finish_save(run: Path) -> None:
    """Bring in order what a process that was killed in a save has left. Only for the process that holds the run's lock.

    A checkpoint that had its name, but was not yet the last one, becomes it: a run that this one completes saves no
    more. What had no name yet is removed.
    """
    folder = run / "checkpoints"
    for path in [*folder.glob("*.tmp"), *folder.glob("*.sha256")]:
        if path.suffix == ".tmp" or not path.with_suffix(".pt").exists():
            path.unlink(missing_ok=True)
    for newest in _saved(run)[:1]:
        if (folder / "last.pt").resolve() != newest.resolve():
            _link(newest)


def load_newest(run: Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run that is intact; damaged ones are reported and passed over. None: there is none.

    Raises:
        UserError: there are checkpoints, but all are damaged. Training does not silently begin anew.
    """
    paths = _saved(run)
    for path in paths:
        try:
            if not path.with_suffix(".sha256").is_file():
                raise UserError(f"{path} has lost its sha256")
            return load(path)
        except UserError as error:
            logger.warning("%s; trying the one before", error)
    if paths:
        raise UserError(f"every checkpoint in {run / 'checkpoints'} is damaged; move the folder away to start anew")
    return None


def exists(run: Path) -> bool:
    """Whether a run has saved anything."""
    return bool(_saved(run))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this project, after checking its digest where there is one.

    Raises:
        UserError: not there, damaged, or not a checkpoint of this project.
    """
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist")
    digest = path.resolve().with_suffix(".sha256")
    if digest.is_file() and digest.read_bytes().strip() != _digest(path).encode():
        raise UserError(f"{path} is damaged: its content does not match its sha256")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for files that are no checkpoints
        raise UserError(
            f"{path} is not a checkpoint: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not isinstance(state, dict) or state.get("format") not in (PRETRAIN, FINETUNE, LINEAR):
        raise UserError(f"{path} is not a checkpoint of this project; convert/to_d2.py reads those of others")
    if state["version"] != VERSION:
        raise UserError(f"{path} has format version {state['version']}, but this program reads {VERSION}")
    return state


def load_encoder(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors, in torchvision's naming, from a checkpoint or an `encoder.safetensors`.

    Raises:
        UserError: not there, damaged, or neither of the two.
    """
    if path.is_dir():
        path = path / "encoder.safetensors"
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} cannot be read as safetensors: {error}") from error
    tensors = load(path)["model"]
    return {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}


def fill(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Load tensors into a module, every one of them and no other.

    Raises:
        UserError: names or shapes differ: the file is of another architecture.
    """
    own = module.state_dict()
    wrong = sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    absent, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if absent or unknown or wrong:
        examples = ", ".join((absent + unknown + wrong)[:3])
        raise UserError(
            f"{source} is of another architecture: {len(absent)} tensors absent, {len(unknown)} unknown, {len(wrong)} "
            f"of another shape ({examples}, ...); check ENCODER.NAME and ENCODER.STEM"
        )
    module.load_state_dict(tensors)


def export_encoder(path: Path, encoder: nn.Module, metadata: dict[str, str]) -> None:
    """Write an encoder as safetensors in torchvision's naming. Metadata: `architecture`, `stem`, `mean`, `std`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    data = safetensors.torch.save(tensors, {"format": "corinfomax-encoder", **metadata})
    # The library writes the metadata in another order in each process; sorted, the same run gives the same file.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    write_atomic(path, len(text).to_bytes(8, "little") + text + data[end:])


def _link(path: Path) -> None:
    """Make a checkpoint the last one."""
    aside = path.with_name("last.tmp")
    aside.unlink(missing_ok=True)
    aside.symlink_to(path.name)
    aside.replace(path.with_name("last.pt"))


def _saved(run: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step_*.pt"), reverse=True)


class _Digesting:
    """A file that takes the digest of what is written to it, and keeps the error that torch.save would hide."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()


def _write(path: Path, state: dict[str, Any]) -> str:
    """Write a file and have it on the disk. Returns the digest of what was meant to be written."""
    with path.open("wb") as file:
        target = _Digesting(file)
        try:
            torch.save(state, target)  # type: ignore[arg-type]
        except RuntimeError as error:  # what torch makes of a full disk
            raise target.error or OSError(str(error)) from error
        file.flush()
        os.fsync(file.fileno())
    return target.digest()


def _free(run: Path) -> str:
    """The space that is left, for a message."""
    try:
        return f"{shutil.disk_usage(run).free / 1e6:.0f} MB free"
    except OSError:
        return "the disk does not answer"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
