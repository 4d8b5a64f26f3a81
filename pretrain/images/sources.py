"""Where images come from: folders of files, local and remote tars, and sets that torchvision can read.

A `Source` gives an image as uint8 RGB by index. Everything after it (views, batches) is the same for all sources.
"""

import gzip
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torchvision
from filelock import FileLock

from foundation.config import config_folder
from foundation.errors import UserError
from foundation.images import EXTENSIONS, OpenImage
from pretrain.distributed import group
from pretrain.images.fetch import stall_of
from pretrain.images.files import FileSource, PathList, find_images
from pretrain.images.joined import JoinedSource
from pretrain.images.paths import split_roots, training_tars
from pretrain.images.shards import is_listing, list_shards
from pretrain.images.stream import StreamedTars, Streaming
from pretrain.images.tars import UNLABELED, TarSource, local_tars
from shapes import ensure_rendered

DATASETS = (
    "shapes",
    "folder",
    "cifar10",
    "cifar100",
    "fashion_mnist",
    "tiny_imagenet",
    "imagenet100",
    "imagenet1k",
    "webdataset",
)
FOLDERS = ("folder", "tiny_imagenet", "imagenet100", "imagenet1k")  # sets that are class folders on disk
logger = logging.getLogger("pretrain")
FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


class Source(Protocol):
    """Images by index, with their labels, which are `UNLABELED` where there are none."""

    @property
    def labels(self) -> Sequence[int] | np.ndarray:
        """The class of each image, as an index of `classes`, (N,)."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """Class names."""
        ...

    def __len__(self) -> int: ...

    def open(self, index: int) -> OpenImage:
        """The image, which is decoded when its pixels are asked for. Raises `UnreadableImage`."""
        ...

    def name(self, index: int) -> str:
        """The name of this image in a message."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """Images in memory: (N, H, W, 3) or, for grey ones, (N, H, W), uint8."""

    images: np.ndarray
    labels: Sequence[int]
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> OpenImage:
        """The image."""
        image = self.images[index]
        return OpenImage.of(image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2))

    def name(self, index: int) -> str:
        """The image's number."""
        return f"image {index}"


def build_source(
    name: str,
    root: str,
    split: str,
    classes: str = "",
    streaming: Streaming | None = None,
    together: bool = False,
    origin: str = "DATA.ROOT",
) -> Source:
    """The images of a dataset.

    Args:
        name: one of `DATASETS`.
        root: the dataset's folder; empty for the embedded set, and for the small sets' default folder. `folder` also
            takes several, in braces: `{/a,/b}`. `webdataset` also takes what names tars one by one, as in `shards.py`.
        split: `pretrain` (labels are not used), `train` or `val`.
        classes: a list of class folders to use, as in `read_class_list`; empty: all of them. `imagenet100` uses its own
            list in a folder that holds more than its classes.
        streaming: how to keep remote tars; by default as `Streaming` says.
        together: whether every process of the run calls this. Then a folder is listed once on each machine.
        origin: the option or key that `root` comes from, for messages.

    Raises:
        UserError: unknown name; the folder is missing, empty or not laid out as expected; a class is absent; or tars
            cannot be fetched.
    """
    if classes and name not in FOLDERS:
        raise UserError(f"DATA.CLASSES chooses among class folders, but {name} has none; leave it empty")
    if name == "shapes":
        folder = ensure_rendered(Path(root) if root else None)
        return _folder(folder / {"pretrain": "unlabeled", "train": "objects/train", "val": "objects/val"}[split], split)
    if name in ("cifar10", "cifar100", "fashion_mnist"):
        return _from_torchvision(name, root, train=split != "val")
    if name not in DATASETS:
        raise UserError(f"DATA.NAME {name!r} is not one of {', '.join(DATASETS)}")
    if not root:
        raise UserError(
            f"DATA.ROOT is empty: DATA.NAME {name} needs the folder of its images (DATA.ROOT /path/to/images)"
        )
    if name == "folder" and len(roots := split_roots(root)) > 1:
        return JoinedSource([build_source(name, one, split, classes, streaming, together, origin) for one in roots])
    if name == "webdataset" and is_listing(root) and not Path(root).is_dir():
        return _listed_tars(root, split, streaming or Streaming())
    if name == "tiny_imagenet" and split == "val" and not classes:
        return _tiny_imagenet_val(Path(root))
    folder = Path(root)
    subfolder = folder / ("val" if split == "val" else "train")
    if name in ("folder", "webdataset") and split == "pretrain" and not subfolder.is_dir():
        subfolder = folder
    if name == "webdataset":
        tars = training_tars(folder) if split == "pretrain" else sorted(subfolder.glob("[!.]*.tar"))
        return local_tars(tars, str(subfolder), split != "pretrain", origin)
    chosen = read_class_list(classes) if classes else ()
    if name == "imagenet100" and not classes and subfolder.is_dir():
        own = read_class_list(name)
        chosen = own if set(own) < {entry.name for entry in subfolder.iterdir()} else ()
    return _folder(subfolder, split, chosen, together, origin)


def read_class_list(classes: str) -> Sequence[str]:
    """Names of class folders from a text file, one a line; `#` begins a comment.

    Args:
        classes: a path, or the name of a list in `configs/classes` (`imagenet100`).

    Raises:
        UserError: there is no such list, it is empty, or names a class twice.
    """
    shipped = config_folder("classes")
    path = next((path for path in (Path(classes), shipped / f"{classes}.txt") if path.is_file()), None)
    if path is None:
        known = ", ".join(sorted(path.stem for path in shipped.glob("*.txt")))
        raise UserError(f"DATA.CLASSES {classes!r} is neither a file nor a list of this project ({known})")
    try:
        names = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"DATA.CLASSES {path} cannot be read: {error}") from error
    names = [name for name in names if name]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise UserError(f"DATA.CLASSES {path} " + (f"names {twice[0]!r} twice" if twice else "names no class"))
    return names


def _folder(
    root: Path, split: str, chosen: Sequence[str] = (), together: bool = False, origin: str = "DATA.ROOT"
) -> FileSource:
    """Every image file below a folder. The first folder level names the classes, if no image lies beside it.

    `chosen`: the class folders to use; empty: all.
    """
    if not root.is_dir():
        raise UserError(f"the image folder {root} does not exist; check {origin}")
    absent = [name for name in chosen if not (root / name).is_dir()]
    if absent:
        raise UserError(
            f"{len(absent)} of the {len(chosen)} classes of DATA.CLASSES are not below {root}: "
            f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}"
        )
    paths = group.once_on_each_machine(lambda: find_images(root, chosen)) if together else find_images(root, chosen)
    unread = ", ".join(f"{count:,} {extension}" for extension, count in paths.left_out.unread.most_common())
    if not len(paths):
        advice = f"convert its files to JPEG or PNG: {unread}" if unread else f"check {origin}"
        raise UserError(f"there is no image below {root} (looked for {' '.join(EXTENSIONS)}); {advice}")
    if unread and group.is_main():
        _warn_of_unread(root, unread)
    classes, labels = paths.top_folders()
    if "" not in classes:
        return FileSource(paths, labels, classes)
    if len(classes) > 1 and split != "pretrain":
        loose = paths[int((labels == 0).argmax())]
        raise UserError(f"{loose} lies beside the class folders of {root}; move it into one of them, or away")
    return FileSource(paths, np.broadcast_to(np.int32(UNLABELED), len(paths)), [])


@lru_cache
def _warn_of_unread(root: Path, unread: str) -> None:
    """Warn once in a process, which may list a folder several times."""
    logger.warning("%s: files of kinds that are not read are left out (%s); convert them to JPEG", root, unread)


def hidden_in(source: Source) -> tuple[int, int]:
    """The images and folders whose names begin with a dot, found while the folders of a source were listed."""
    parts = source.sources if isinstance(source, JoinedSource) else [source]
    lists = [part.paths for part in parts if isinstance(part, FileSource)]
    found = [paths.left_out for paths in lists if isinstance(paths, PathList)]
    return sum(one.hidden_images for one in found), sum(one.hidden_folders for one in found)


def _listed_tars(root: str, split: str, streaming: Streaming) -> TarSource:
    """Tars that are named one by one, local or remote."""
    shards = list_shards(root, split, stall_of(streaming.patience))
    if shards[0].is_local:
        return local_tars([Path(shard.url) for shard in shards], root, split != "pretrain")
    return StreamedTars(shards, streaming, root, labelled=split != "pretrain")


def _tiny_imagenet_val(root: Path) -> FileSource:
    """Tiny ImageNet's validation images are in one folder, and their classes in a text file."""
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return _folder(root / "val", "val")  # the images are often moved into class folders
    classes = sorted(entry.name for entry in (root / "train").iterdir() if entry.is_dir())
    number = {name: i for i, name in enumerate(classes)}
    rows = [line.split("\t") for line in annotations.read_text().splitlines() if line]
    try:
        labels = [number[row[1]] for row in rows]
    except (KeyError, IndexError) as error:
        raise UserError(f"{annotations}: {error} is not a class folder of {root / 'train'}") from error
    return FileSource([root / "val" / "images" / row[0] for row in rows], labels, classes)


def _from_torchvision(name: str, root: str, train: bool) -> ArraySource:
    """CIFAR and Fashion-MNIST, from files on disk; if there are none, they are downloaded."""
    if name == "fashion_mnist":
        idx_folder = Path(root) if root else FASHION_MNIST_DEBIAN
        if (idx_folder / "train-images-idx3-ubyte.gz").is_file():
            return _fashion_mnist_idx(idx_folder, train)
    folder = Path(root) if root else Path.home() / ".cache" / "torchvision"
    build = {
        "cifar10": torchvision.datasets.CIFAR10,
        "cifar100": torchvision.datasets.CIFAR100,
        "fashion_mnist": torchvision.datasets.FashionMNIST,
    }[name]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            dataset = build(root=folder, train=train)
        except RuntimeError:  # not there, or damaged. One process downloads, the others wait and find it
            with FileLock(folder / f".{name}.lock"):
                dataset = build(root=folder, train=train, download=True)
    except (OSError, RuntimeError) as error:
        hint = ", or install the Debian package dataset-fashion-mnist" if name == "fashion_mnist" else ""
        raise UserError(
            f"{name} is not in {folder} and could not be downloaded ({error}); put its files there in "
            f"torchvision's layout, or set DATA.ROOT to their folder{hint}"
        ) from error
    return ArraySource(np.asarray(dataset.data), [int(label) for label in dataset.targets], dataset.classes)


def _fashion_mnist_idx(folder: Path, train: bool) -> ArraySource:
    """Gzipped IDX files, as published and as in the Debian package. torchvision reads only unpacked ones."""
    stem, count = ("train", 60000) if train else ("t10k", 10000)
    arrays = {}
    for kind, header, shape in (("images-idx3", 16, (-1, 28, 28)), ("labels-idx1", 8, (-1,))):
        path = folder / f"{stem}-{kind}-ubyte.gz"
        try:
            with gzip.open(path) as file:
                content = file.read(header + count * 28 * 28)
            arrays[kind] = np.frombuffer(content, np.uint8, offset=header).reshape(shape)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"{path} is damaged: {error}") from error
    images, labels = arrays["images-idx3"], arrays["labels-idx1"]
    if len(images) != len(labels):
        raise UserError(f"{folder} has {len(images)} images and {len(labels)} labels of {stem}")
    return ArraySource(images, labels.tolist(), torchvision.datasets.FashionMNIST.classes)
