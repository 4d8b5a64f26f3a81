"""Images with labels: the labelled splits of a dataset, and fractions of them."""

import contextlib
import hashlib
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from foundation.errors import UserError
from foundation.files import write_atomic
from foundation.images import OpenImage
from foundation.names import counted
from pretrain.images.files import FileSource
from pretrain.images.sources import Source, build_source
from pretrain.images.stream import Streaming
from pretrain.images.tars import LABEL, UNLABELED, TarSource

LIST_CACHE = Path.home() / ".cache" / "corinfomax" / "lists"


@dataclass(frozen=True)
class Subset:
    """Some images of a source. `indices` are indices of that source; classes and their numbers stay."""

    source: Source
    indices: np.ndarray
    labels: np.ndarray = field(init=False)
    classes: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", np.asarray(self.source.labels)[self.indices])
        object.__setattr__(self, "classes", self.source.classes)

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> OpenImage:
        """The image, which is decoded when its pixels are asked for. Raises `UnreadableImage`."""
        return self.source.open(int(self.indices[index]))

    def name(self, index: int) -> str:
        """The name of this image in the source."""
        return self.source.name(int(self.indices[index]))


def build_labelled_source(
    name: str, root: str, split: str, streaming: Streaming | None = None, origin: str = "DATA.ROOT"
) -> Source:
    """The `train` or `val` images of a dataset; see `build_source`. Raises UserError where they have no labels."""
    source = build_source(name, root, split, streaming=streaming, origin=origin)
    if (np.asarray(source.labels) == UNLABELED).any():
        expected = (
            f"each needs a {LABEL} member with the number of its class"
            if isinstance(source, TarSource)
            else ("one folder per class is expected")
        )
        raise UserError(f"{split} images of {name} {root} have no labels: {expected}")
    return source


def build_labelled_splits(
    name: str, root: str, streaming: Streaming | None = None, origin: str = "DATA.ROOT"
) -> tuple[Source, Source]:
    """The `train` and `val` images of a dataset; see `build_source`.

    Raises:
        UserError: as `build_source`; no labels; or the two splits differ in their classes.
    """
    train, val = (build_labelled_source(name, root, split, streaming, origin) for split in ("train", "val"))
    if list(train.classes) != list(val.classes):
        odd = sorted(set(train.classes) ^ set(val.classes))
        in_train, in_val = (counted(len(split.classes), "class") for split in (train, val))
        raise UserError(
            f"train ({in_train}) and val ({in_val}) of {name} {root} differ: "
            f"{', '.join(map(repr, odd[:3]))} {'is' if len(odd) == 1 else 'are'} in one of them only; check {origin}"
        )
    if len(train.classes) < 2:
        raise UserError(f"{name} {root} has one class only, {train.classes[0]!r}; a classifier needs two or more")
    return train, val


def split_labelled_folder(root: str) -> tuple[Source, Source]:
    """Reference and query images of any labelled folder: its train/ and val/, or else 4/5 and 1/5 of each class.

    Raises:
        UserError: as `build_labelled_splits`; or there are no images left for queries.
    """
    try:
        if (Path(root) / "val").is_dir():
            return build_labelled_splits("folder", root, origin="the path")
        source = build_labelled_source("folder", root, "pretrain", origin="the path")
    except UserError as error:
        raise UserError(f"PROBE.ROOT: {error}") from error
    if len(source.classes) < 2:
        raise UserError(f"PROBE.ROOT {root} has one class only, {source.classes[0]!r}; kNN needs two or more")
    reference = class_balanced(source.labels, 0.8, seed=0)
    queries = np.setdiff1d(np.arange(len(source)), reference)
    if not len(queries):
        raise UserError(f"PROBE.ROOT {root} has {counted(len(source), 'image')}; kNN needs a class of three or more")
    return Subset(source, reference), Subset(source, queries)


def class_balanced(labels: Sequence[int] | np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Indices (M,) of a random fraction of each class, sorted: round(fraction x size) images, but at least one.

    With the same seed, a smaller fraction is a part of a larger one.
    """
    every = np.asarray(labels)
    chosen = []
    for label in np.unique(every):
        (places,) = np.nonzero(every == label)
        rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, int(label)]))
        count = max(1, int(fraction * len(places) + 0.5))
        chosen.append(rng.permutation(places)[:count])
    return np.sort(np.concatenate(chosen))


def listed(source: Source, names: Sequence[str], origin: str) -> np.ndarray:
    """Indices (M,) of the files that a list names, in the order of the source.

    Args:
        source: of files.
        names: file names without folders, such as `n01440764_10074.JPEG`.
        origin: of the list, for messages.

    Raises:
        UserError: the source has no files, the list is empty or names one twice, some of it are missing, or a name is
            that of several.
    """
    if not isinstance(source, FileSource):
        raise UserError(f"{origin} names files, but this dataset has none; use --fraction")
    if not names:
        raise UserError(f"{origin} names no file; give one file name a line, or use --fraction")
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated:
        raise UserError(f"{origin} names {repeated} more than once; remove the lines that repeat a name")
    place = {path.name: i for i, path in enumerate(source.paths)}
    if len(place) < len(source):
        counts = Counter(path.name for path in source.paths)
        twice = next((name for name in names if counts[name] > 1), None)
        if twice:
            raise UserError(f"{origin} names {twice}, but {counts[twice]} training images are called so; rename them")
    absent = [name for name in names if name not in place]
    if absent:
        raise UserError(
            f"{origin} names {counted(len(absent), 'file')}, of {len(names)} in all, not found among the {len(source)} "
            f"training images, for example {absent[0]}; check DATA.ROOT"
        )
    return np.sort([place[name] for name in names])


def read_list(path: str, url: str, sha256: str) -> list[str]:
    """The lines of a text file, from a path or from a URL, which is fetched once and kept.

    Args:
        path: of the file; empty: fetch it.
        url: where it is published.
        sha256: of its content; empty: not checked.

    Raises:
        UserError: it does not exist, cannot be fetched, or has another content.
    """
    file = Path(path) if path else LIST_CACHE / f"{sha256[:16]}.txt"
    if path and not file.is_file():
        raise UserError(f"DATA.LIST {file} does not exist" + (f"; it is published at {url}" if url else ""))
    content = file.read_bytes() if file.is_file() else b""
    fetches = not path and (not content or not _is_expected(content, sha256))  # what is kept may be damaged
    if fetches:
        content = _fetch(url)
    if not _is_expected(content, sha256):
        raise UserError(f"{path or url} is not the file expected: its sha256 is not {sha256}")
    if fetches:
        _keep(content, file)
    return [line.strip() for line in content.decode("utf-8", "replace").splitlines() if line.strip()]


def _is_expected(content: bytes, sha256: str) -> bool:
    return not sha256 or hashlib.sha256(content).hexdigest() == sha256


def _keep(content: bytes, file: Path) -> None:
    """Keep a file for the next time. One that cannot be kept, or that another process disturbs, is fetched again."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, content)


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read()
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UserError(f"cannot fetch {url} ({error}); download it, and name the file with DATA.LIST") from error
