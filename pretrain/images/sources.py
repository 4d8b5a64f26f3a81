"""Where images come from: folders of files, tars here or elsewhere, and sets that torchvision knows how to read.

A `Source` gives an image as uint8 RGB by index. Everything after it (views, batches) is the same for all.
"""

import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torchvision

from foundation.config import config_folder
from foundation.errors import UserError
from foundation.images import EXTENSIONS, read_rgb
from pretrain.images.fetch import stall_of
from pretrain.images.joined import JoinedSource
from pretrain.images.paths import split_roots
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
FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


class Source(Protocol):
    """Images by index, with their labels: `UNLABELED` where there are none."""

    @property
    def labels(self) -> Sequence[int]:
        """The class of each image, as an index of `classes`."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """Class names."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """The image as (H, W, 3) uint8 RGB."""
        ...

    def name(self, index: int) -> str:
        """What to call this image in a message."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Image files, decoded when read."""

    paths: Sequence[Path]
    labels: Sequence[int]
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> np.ndarray:
        """The image as (H, W, 3) uint8 RGB. Raises `UnreadableImage`."""
        return read_rgb(self.paths[index])

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.paths[index])


@dataclass(frozen=True)
class ArraySource:
    """Images in memory: (N, H, W, 3) or, for grey ones, (N, H, W), uint8."""

    images: np.ndarray
    labels: Sequence[int]
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        """The image as (H, W, 3) uint8 RGB."""
        image = self.images[index]
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)

    def name(self, index: int) -> str:
        """The image's number."""
        return f"image {index}"


def build_source(name: str, root: str, split: str, classes: str = "", streaming: Streaming | None = None) -> Source:
    """The images of a dataset.

    Args:
        name: one of `DATASETS`.
        root: the dataset's folder; empty for the embedded set, and for the small sets' default place. Of `folder` also
            several, in braces: `{/a,/b}`. Of `webdataset` also what names tars one by one, as in `shards.py`.
        split: `pretrain` (labels are not used), `train` or `val`.
        classes: a list of class folders to take, as in `read_class_list`; empty: all of them. Of `imagenet100`, in a
            folder that holds more than its classes: those.
        streaming: how to keep tars that are elsewhere; by default as `Streaming` says.

    Raises:
        UserError: unknown name, the folder is missing, empty or not laid out as expected, or a class is absent; tars
            cannot be had.
    """
    if classes and name not in FOLDERS:
        raise UserError(f"DATA.CLASSES chooses among class folders, and {name} has none; leave it empty")
    if name == "shapes":
        folder = ensure_rendered(Path(root) if root else None)
        return _folder(folder / {"pretrain": "unlabeled", "train": "objects/train", "val": "objects/val"}[split])
    if name in ("cifar10", "cifar100", "fashion_mnist"):
        return _from_torchvision(name, root, train=split != "val")
    if name not in DATASETS:
        raise UserError(f"DATA.NAME {name!r} is not one of {', '.join(DATASETS)}")
    if not root:
        raise UserError(f"DATA.ROOT is empty; set it to the folder of {name} (DATA.ROOT /path/to/images)")
    if name == "folder" and len(roots := split_roots(root)) > 1:
        return JoinedSource([build_source(name, one, split, classes, streaming) for one in roots])
    if name == "webdataset" and is_listing(root):
        return _listed_tars(root, split, streaming or Streaming())
    if name == "tiny_imagenet" and split == "val" and not classes:
        return _tiny_imagenet_val(Path(root))
    folder = Path(root)
    subfolder = folder / ("val" if split == "val" else "train")
    if name in ("folder", "webdataset") and split == "pretrain" and not subfolder.is_dir():
        subfolder = folder
    if name == "webdataset":
        return local_tars(sorted(subfolder.glob("*.tar")), str(subfolder))
    chosen = read_class_list(classes) if classes else ()
    if name == "imagenet100" and not classes and subfolder.is_dir():
        own = read_class_list(name)
        chosen = own if set(own) < {entry.name for entry in subfolder.iterdir()} else ()
    return _folder(subfolder, chosen)


def read_class_list(classes: str) -> Sequence[str]:
    """Names of class folders from a text file, one a line, without what follows a `#`.

    Args:
        classes: a path, or the name of a list in `configs/classes` (`imagenet100`).

    Raises:
        UserError: there is no such list, it is empty, or names a class twice.
    """
    shipped = config_folder("classes")
    path = next((path for path in (Path(classes), shipped / f"{classes}.txt") if path.is_file()), None)
    if path is None:
        known = ", ".join(sorted(path.stem for path in shipped.glob("*.txt")))
        raise UserError(f"DATA.CLASSES {classes!r} is neither a file nor a list that comes with this project ({known})")
    try:
        names = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"DATA.CLASSES {path} cannot be read: {error}") from error
    names = [name for name in names if name]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise UserError(f"DATA.CLASSES {path} " + (f"names {twice[0]!r} twice" if twice else "names no class"))
    return names


def _folder(root: Path, chosen: Sequence[str] = ()) -> FileSource:
    """Every image file below a folder, sorted. The first folder level names the classes, if all images are in one.

    `chosen`: the class folders to take, all where it is empty.
    """
    if not root.is_dir():
        raise UserError(f"the image folder {root} does not exist; check DATA.ROOT")
    absent = [name for name in chosen if not (root / name).is_dir()]
    if absent:
        raise UserError(
            f"{len(absent)} of the {len(chosen)} classes of DATA.CLASSES are not below {root}: "
            f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}"
        )
    paths = sorted(
        Path(folder) / file
        for top in ([root / name for name in chosen] or [root])
        for folder, _, files in os.walk(top, followlinks=True)
        for file in files
        if file.lower().endswith(EXTENSIONS)
    )
    if not paths:
        raise UserError(f"there is no image below {root} (looked for {' '.join(EXTENSIONS)}); check DATA.ROOT")
    first_levels = [path.relative_to(root).parts[0] for path in paths]
    if any(path.parent == root for path in paths):
        return FileSource(paths, [UNLABELED] * len(paths), [])
    classes = sorted(set(first_levels))
    number = {name: i for i, name in enumerate(classes)}
    return FileSource(paths, [number[name] for name in first_levels], classes)


def _listed_tars(root: str, split: str, streaming: Streaming) -> TarSource:
    """Tars that are named one by one: here, or elsewhere."""
    shards = list_shards(root, split, stall_of(streaming.patience))
    if shards[0].is_local:
        return local_tars([Path(shard.url) for shard in shards], root)
    return StreamedTars(shards, streaming, root, labelled=split != "pretrain")


def _tiny_imagenet_val(root: Path) -> FileSource:
    """Tiny ImageNet ships its validation images in one folder, with their classes in a text file."""
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return _folder(root / "val")  # people often move the images into class folders
    classes = sorted(entry.name for entry in (root / "train").iterdir() if entry.is_dir())
    number = {name: i for i, name in enumerate(classes)}
    rows = [line.split("\t") for line in annotations.read_text().splitlines() if line]
    try:
        labels = [number[row[1]] for row in rows]
    except (KeyError, IndexError) as error:
        raise UserError(f"{annotations}: {error} is not a class folder of {root / 'train'}") from error
    return FileSource([root / "val" / "images" / row[0] for row in rows], labels, classes)


def _from_torchvision(name: str, root: str, train: bool) -> ArraySource:
    """CIFAR and Fashion-MNIST: files on disk are used, else they are downloaded."""
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
        dataset = build(root=folder, train=train, download=True)
    except (OSError, RuntimeError) as error:
        hint = ", or install the Debian package dataset-fashion-mnist" if name == "fashion_mnist" else ""
        raise UserError(
            f"{name} is not in {folder} and could not be downloaded ({error}); put its files there as torchvision "
            f"lays them out, or name their folder with DATA.ROOT{hint}"
        ) from error
    return ArraySource(np.asarray(dataset.data), [int(label) for label in dataset.targets], dataset.classes)


def _fashion_mnist_idx(folder: Path, train: bool) -> ArraySource:
    """Gzipped IDX files as published (and as in the Debian package); torchvision would want them unpacked elsewhere."""
    stem = "train" if train else "t10k"
    arrays = {}
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        path = folder / f"{stem}-{kind}-ubyte.gz"
        try:
            arrays[kind] = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: {error}") from error
    images = arrays["images-idx3"].reshape(-1, 28, 28)
    return ArraySource(images, arrays["labels-idx1"].tolist(), torchvision.datasets.FashionMNIST.classes)
