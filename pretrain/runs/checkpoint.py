"""The checkpoint format, and how checkpoints are kept safe.

A run folder holds `checkpoints/step_000000468.pt`, each with a `.sha256` beside it, and `checkpoints/last.pt`, a link
to the newest. A checkpoint is one dictionary of tensors and plain values that `torch.load` reads with
`weights_only=True`:

    format     "corinfomax-pretrain"; "corinfomax-finetune" for a network trained with labels; "corinfomax-linear" for
               heads on a frozen encoder, which is not in the file
    version    1
    model      tensors by name: `encoder.*` in torchvision's naming, `projector.*` (or `head.*`)
    objective  state of the loss: `mean`, `covariance`, `cross_covariance`
    optimizer  state of the optimizer
    position   {"epoch", "step"}: complete epochs and steps; of pretraining also "skipped", batches without effect
    config     the configuration, as nested dictionaries
    images     of pretraining: the number of images in the dataset

There is no random state: every random number is a function of (seed, epoch, index, view).

Saving: the checkpoint is written under a temporary name, synced and read back; then its digest is written, the file is
renamed, and the link is replaced (`foundation.files`). So a file under its final name is complete and has a digest,
whenever the process is killed. Loading checks the digest, since torch.load does not notice a flipped bit. The newest
two intact checkpoints are kept.
"""

import contextlib
import itertools
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from convert.reader import load_tree
from foundation import files
from foundation.errors import UserError
from foundation.names import legible

VERSION = 1
KEEP = 2
CHECKPOINT = re.compile(r"step_\d{9,}\.pt")
DIGEST = re.compile(r"step_\d{9,}\.sha256")
UNFINISHED = re.compile(r"step_\d{9,}\.(pt\.|sha256\.)?tmp|last\.tmp")  # .tmp: earlier versions'
PRETRAIN = "corinfomax-pretrain"
FINETUNE = "corinfomax-finetune"
LINEAR = "corinfomax-linear"
FORMATS = (PRETRAIN, FINETUNE, LINEAR)
logger = logging.getLogger("pretrain")


def save(run: Path, state: dict[str, Any]) -> Path:
    """Write a checkpoint of a run, point `last.pt` at it, and remove older ones (`_rotate`). Returns its path.

    Raises:
        UserError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    folder = run / "checkpoints"
    path = folder / f"step_{state['position']['step']:09d}.pt"

    def write(file: IO[bytes]) -> None:
        torch.save({"version": VERSION, **state}, file)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_with_digest(path, write)
        _link(path)
        files.sync_folder(folder)
    except OSError as error:
        raise UserError(f"cannot save {path}: {files.describe_unsaved(error, run, write, exists(run))}") from error
    _rotate(run)
    return path


def finish_save(run: Path) -> None:
    """Repair what a process that was killed during a save has left. Only for the process that holds the run's lock.

    Unfinished files of this module are removed, and `last.pt` is pointed at the newest intact checkpoint: a complete
    run that is resumed saves no more.

    Raises:
        OSError: the folder cannot be written.
        UserError: nothing is saved yet, and its file system has no symbolic links: the first save would fail.
    """
    folder = run / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        orphaned = DIGEST.fullmatch(path.name) and not path.with_suffix(".pt").exists()
        if orphaned or UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)
    newest = next(_intact(run), None)
    if newest and (folder / "last.pt").resolve() != newest.resolve():
        _link(newest)
    if not newest:
        _check_links(run)


def load_newest(run: Path) -> dict[str, Any] | None:
    """The newest intact checkpoint of a run; damaged ones are skipped with a warning. None: there is none.

    Raises:
        UserError: there are checkpoints, but all are damaged. Training does not silently start over.
    """
    paths = _saved(run)
    for path in paths:
        try:
            if not files.digest_file(path).is_file():
                raise UserError(f"the sha256 of {path} is missing")
            return load(path)
        except UserError as error:
            logger.warning("%s; trying the previous one", error)
    if paths:
        raise UserError(f"every checkpoint in {run / 'checkpoints'} is damaged; move the folder away to start over")
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
    target = path.resolve()  # the digest is beside the file that last.pt points to
    try:
        if files.digest_file(target).is_file() and not files.matches_digest(target):
            raise UserError(f"{path} is damaged: its content does not match its sha256")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    state = load_tree(path)
    if not isinstance(state, dict) or state.get("format") not in FORMATS:
        raise UserError(f"{path} is not a checkpoint of this project; convert/to_d2.py reads those of others")
    if state.get("version") != VERSION:
        raise UserError(
            f"{path} has format version {state.get('version')}, but this version of the project reads {VERSION}; use "
            "the version that wrote it"
        )
    return state


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
    """Write an encoder as safetensors in torchvision's naming. Metadata: `architecture`, `stem`, `mean`, `std`.

    Names of files in the metadata that are not UTF-8 are escaped.
    """
    metadata = {key: legible(value) for key, value in metadata.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    data = safetensors.torch.save(tensors, {"format": "corinfomax-encoder", **metadata})
    # The library writes the metadata in another order in each process; sorted, the same run gives the same file.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    files.write_atomic(path, len(text).to_bytes(8, "little") + text + data[end:])


def _link(path: Path) -> None:
    """Point `last.pt` at a checkpoint."""
    draft = path.with_name("last.tmp")
    draft.unlink(missing_ok=True)
    draft.symlink_to(path.name)
    draft.replace(path.with_name("last.pt"))


def _check_links(run: Path) -> None:
    draft = run / ".link"
    draft.unlink(missing_ok=True)
    try:
        draft.symlink_to("last.pt")
    except OSError as error:
        raise UserError(
            f"{run}: this file system has no symbolic links ({error.strerror or error}), which mark the last "
            "checkpoint; choose a folder on another file system"
        ) from error
    draft.unlink()


def _rotate(run: Path) -> None:
    """Remove the checkpoints that are older than the newest `KEEP` intact ones.

    Damaged files do not count. So an intact checkpoint is removed only if there are `KEEP` newer intact ones.
    """
    kept = list(itertools.islice(_intact(run), KEEP))
    if len(kept) < KEEP:
        return
    for path in _saved(run):
        if _step(path) < _step(kept[-1]):
            path.unlink(missing_ok=True)
            files.digest_file(path).unlink(missing_ok=True)


def _saved(run: Path) -> list[Path]:
    """The checkpoints of this run, the newest first: files named as `save` names them, and no others."""
    found = [path for path in (run / "checkpoints").glob("step_*.pt") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _intact(run: Path) -> Iterator[Path]:
    """The checkpoints whose content matches their digest, the newest first; those that cannot be read are left out."""
    for path in _saved(run):
        with contextlib.suppress(OSError):
            if files.matches_digest(path):
                yield path


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))
