"""Packing images into tars: resized once, in blocks that are written, verified and named one by one."""

import hashlib
import io
import json
import logging
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from foundation.errors import UserError
from foundation.files import report_disk_errors, write_atomic
from foundation.images import UnreadableImage, decode_rgb, read_file
from foundation.json_files import read_json
from foundation.locks import end_with_parent
from foundation.names import counted
from pretrain.images.files import FileSource
from pretrain.images.sources import build_source
from pretrain.images.tars import UNLABELED, index_tar
from pretrain.runs.metrics import Progress

STATE = "packing.json"  # what is packed, and the tars that are finished
MAX_SIDE = 65500  # pixels of a JPEG, as the encoder counts
logger = logging.getLogger("pretrain")


@dataclass(frozen=True)
class Form:
    """How images are packed.

    Args:
        side: pixels of the shorter side at most; images are never enlarged.
        quality: of the JPEGs that are written, 1 to 100.
        images: in a tar.
    """

    side: int
    quality: int
    images: int


@dataclass(frozen=True)
class Packed:
    """A finished tar."""

    nsamples: int
    filesize: int
    md5sum: str
    damaged: Sequence[str]  # images that could not be read, with the reason


def pack(source: Path, target: Path, form: Form, workers: int) -> str:
    """Pack a folder of images, or its train/ and val/, into tars below `target`. Returns what they hold, in a line.

    Raises:
        UserError: no images, another packing in `target`, a full disk, or a tar that does not read back.
    """
    has_splits = (source / "train").is_dir()
    splits = [split for split in ("train", "val") if (source / split).is_dir()] if has_splits else ["images"]
    sources = {name: _open_source(source, name if has_splits else "pretrain") for name in splits}
    if len({tuple(files.classes) for files in sources.values()}) > 1:
        raise UserError(f"{source}: train/ and val/ differ in their class folders; their numbers would not agree")
    names = {name: _list_names(files, source) for name, files in sources.items()}
    state = _open_state(target, source, form, {name: len(files) for name, files in sources.items()}, names)
    with report_disk_errors(target):
        write_atomic(target / STATE, json.dumps(state).encode())  # from now on the folder is known as a packing's
        for name, files in sources.items():
            folder = target / name if has_splits else target
            folder.mkdir(exist_ok=True)
            _pack_split(name, files, target, folder, form, workers, state)
            _write_lists(name, files, target, folder, form, state)
            write_atomic(folder / "names.tsv", names[name])
    damaged = [line for tar in state["tars"].values() for line in tar["damaged"]]
    write_atomic(target / "damaged.txt", os.fsencode("".join(f"{line}\n" for line in damaged)))
    if damaged:
        logger.warning("%d damaged images are left out; they are listed in %s", len(damaged), target / "damaged.txt")
    count, size = (sum(tar[key] for tar in state["tars"].values()) for key in ("nsamples", "filesize"))
    return f"{counted(count, 'image')}, {size / 1e6:.1f} MB, {counted(len(state['tars']), 'tar')} in {target}"


def check_target(folder: Path) -> None:
    """See that a folder to pack into is new, empty, or of an interrupted packing.

    Raises:
        UserError: it holds other files, such as a run.
    """
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(found - {".lock", "log.txt", f"{STATE}.tmp"})  # what a packing has that was killed at its start
    if others and STATE not in found:
        raise UserError(f"{folder} holds {others[0]}, which is not of a packing; choose a new folder for the tars")


def resize_to(pixels: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 with the shorter side at most `side` pixels, bicubic with antialiasing; never enlarged."""
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    if scale >= 1:
        return pixels
    size = max(side, round(width * scale)), max(side, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def encode(data: bytes, name: str, form: Form) -> bytes:
    """The content of an image file as it is packed: a JPEG that is small enough as it is, others resized and encoded.

    Raises:
        UnreadableImage: it is damaged, not an image, or too long for a JPEG.
    """
    pixels = decode_rgb(data, name)
    small = resize_to(pixels, form.side)
    if small is pixels and data[:2] == b"\xff\xd8":
        return data
    if max(small.shape) > MAX_SIDE:
        raise UnreadableImage(
            f"{name}: a JPEG holds {MAX_SIDE} pixels a side, not {max(small.shape)}; cut it in pieces"
        )
    return simplejpeg.encode_jpeg(np.ascontiguousarray(small), form.quality, "RGB", "420")


def pack_block(tar: Path, start: int, files: FileSource, form: Form) -> Packed:
    """Write a tar of the images from `start` on, read it back, and give it its name.

    Raises:
        UserError: what was written does not read back.
    """
    draft = _draft(tar)
    try:
        packed = _write_block(draft, start, files, form)
    except BaseException:
        draft.unlink(missing_ok=True)  # on a full disk it would take the room that is needed
        raise
    draft.replace(tar)
    return packed


def _draft(tar: Path) -> Path:
    return tar.with_suffix(".new")


def _write_block(tar: Path, start: int, files: FileSource, form: Form) -> Packed:
    """Write a tar of the images from `start` on, and read it back. Raises UserError as `pack_block`."""
    damaged = []
    labels = []
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index in range(start, min(start + form.images, len(files))):
            try:
                content = encode(read_file(files.paths[index]), files.name(index), form)
            except UnreadableImage as error:
                damaged.append(str(error))
                continue
            _add(archive, f"{index:09d}.jpg", content)
            label = int(files.labels[index])
            labels.append(label)
            if label != UNLABELED:
                _add(archive, f"{index:09d}.cls", str(label).encode())
    _verify(tar, labels)
    digest = hashlib.md5(usedforsecurity=False)
    with tar.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
        os.fsync(file.fileno())
    return Packed(len(labels), tar.stat().st_size, digest.hexdigest(), damaged)


def _verify(tar: Path, labels: Sequence[int]) -> None:
    """Read a tar back: every image decodes, in its order and with its label."""
    found = index_tar(tar, str(tar))
    with tar.open("rb") as file:
        for row in range(len(found)):
            file.seek(int(found.offsets[row]))
            try:
                decode_rgb(file.read(int(found.sizes[row])), f"{tar}:{found.name(row)}")
            except UnreadableImage as error:
                raise UserError(f"what was written does not read back: {error}; check the disk") from error
    if found.labels.tolist() != list(labels):
        raise UserError(f"{tar} does not read back with its {len(labels)} images and labels; check the disk")


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _open_source(folder: Path, split: str) -> FileSource:
    """The images of a folder, see `build_source`."""
    files = build_source("folder", str(folder), split, origin="PHOTOS")
    assert isinstance(files, FileSource)  # of several folders it would be another source
    return files


def _list_names(files: FileSource, source: Path) -> bytes:
    """The number of each image with the file that it was, one a line."""
    return b"".join(
        b"%09d\t%s\n" % (i, os.fsencode(os.path.relpath(path, source))) for i, path in enumerate(files.paths)
    )


def _open_state(
    target: Path, source: Path, form: Form, counts: dict[str, int], names: dict[str, bytes]
) -> dict[str, Any]:
    """The state of an interrupted packing, or a new one.

    Args:
        target, source, form: as in `pack`.
        counts: images of each split.
        names: their names, as `_list_names` gives them.

    Raises:
        UserError: `target` holds another packing.
    """
    digests = {name: hashlib.sha256(lines).hexdigest() for name, lines in names.items()}
    asked = {"source": str(source.resolve()), "form": asdict(form), "images": counts, "names": digests}
    file = target / STATE
    if file.is_file():
        try:
            state = {"names": digests, **read_json(file)}  # earlier versions kept no digest of the names
            found = {key: state[key] for key in asked}
            if not isinstance(state["tars"], dict):
                raise TypeError
        except (UserError, KeyError, TypeError) as error:
            raise UserError(f"{file} cannot be read; choose another folder") from error
        changed = [key for key in asked if found[key] != asked[key]]
        if changed == ["names"]:
            raise UserError(f"files in {source} have other names than when {target} was begun; choose another folder")
        if changed:
            raise UserError(f"{target} holds another packing ({found}, now {asked}); choose another folder")
        return state
    return {**asked, "tars": {}}


def _tar_names(name: str, count: int, form: Form) -> Iterator[tuple[str, int]]:
    """(name, first image) of each tar of a split."""
    for number, start in enumerate(range(0, count, form.images)):
        yield f"{name}-{number:06d}.tar", start


def _pack_split(
    name: str, files: FileSource, target: Path, folder: Path, form: Form, workers: int, state: dict[str, Any]
) -> None:
    """Pack the tars of a split that are not finished yet."""
    blocks = list(_tar_names(name, len(files), form))
    open_blocks = [(tar, start) for tar, start in blocks if tar not in state["tars"] or not (folder / tar).is_file()]
    done = len(blocks) - len(open_blocks)
    logger.info("%s: %d images, %d of %d tars are packed", name, len(files), done, len(blocks))
    progress = Progress(len(blocks), done, unit="tar")
    try:
        for tar, packed in _run([(folder / tar, start) for tar, start in open_blocks], files, form, workers):
            state["tars"][tar.name] = asdict(packed)
            write_atomic(target / STATE, json.dumps(state).encode())
            progress.advance(tar.name)
    finally:
        progress.close()


def _run(
    blocks: Sequence[tuple[Path, int]], files: FileSource, form: Form, workers: int
) -> Iterator[tuple[Path, Packed]]:
    """Pack blocks in this process or in several, in their order."""
    work = partial(pack_block, files=files, form=form)
    tars, starts = [tar for tar, _ in blocks], [start for _, start in blocks]
    if not workers:
        yield from ((tar, work(tar, start)) for tar, start in blocks)
        return
    try:
        with ProcessPoolExecutor(workers, initializer=_begin_worker, initargs=(os.getpid(),)) as pool:
            try:
                yield from zip(tars, pool.map(work, tars, starts), strict=True)
            except BaseException:  # what is being packed would not be recorded
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise
            finally:
                pool.shutdown(cancel_futures=True)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that packs has died; memory that ran out is the usual reason: lower --workers. The same command "
            "continues"
        ) from error
    finally:
        for tar in tars:  # of workers that were ended
            _draft(tar).unlink(missing_ok=True)


def _begin_worker(parent: int) -> None:
    """Leave Ctrl-C and SIGUSR1, which may come to all processes of a job, to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    end_with_parent(parent)


def _write_lists(name: str, files: FileSource, target: Path, folder: Path, form: Form, state: dict[str, Any]) -> None:
    """The index of the tars, and the names of the classes."""
    prefix = f"{folder.name}/" if folder != target else ""
    shards = []
    for tar, _ in _tar_names(name, len(files), form):
        known = state["tars"][tar]
        shards.append({"url": prefix + tar, **{key: known[key] for key in ("nsamples", "filesize", "md5sum")}})
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": target.name, "shardlist": shards}
    write_atomic(target / f"{name}.json", json.dumps(index, indent=1).encode())
    if len(files.classes):
        write_atomic(target / "classes.txt", os.fsencode("".join(f"{one}\n" for one in files.classes)))
