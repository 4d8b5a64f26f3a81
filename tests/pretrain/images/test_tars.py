"""Images in tars: the same as in a folder, whoever reads them; and what is said of tars that are not as expected."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from foundation.errors import UserError
from foundation.images import UnreadableImage
from pretrain.batches.loader import build_loader, read_batches
from pretrain.batches.sampler import SequentialBatches
from pretrain.batches.views import ViewDataset
from pretrain.images.sources import UNLABELED, build_source


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def write_shards(root: Path, files: list[Path], labels: list[str] | None = None) -> Path:
    """Two tars of half of the files each, with labels as WebDataset names them."""
    root.mkdir(parents=True, exist_ok=True)
    half = (len(files) + 1) // 2
    for shard in range(2):
        with tarfile.open(root / f"shard-{shard}.tar", "w") as tar:
            for i in range(shard * half, min((shard + 1) * half, len(files))):
                add(tar, f"part/{i:04d}.jpg", files[i].read_bytes())
                add(tar, f"part/{i:04d}.json", b"{}")
                if labels:
                    add(tar, f"part/{i:04d}.cls", labels[i].encode())
    return root


def test_a_tar_gives_what_a_folder_gives(photos: Path, tmp_path: Path) -> None:
    folder = build_source("folder", str(photos), "train")
    files = [Path(folder.name(i)) for i in range(len(folder))]
    write_shards(tmp_path / "train", files, [str(label) for label in folder.labels])
    source = build_source("webdataset", str(tmp_path), "train")
    assert list(source.labels) == list(folder.labels)
    assert source.classes == ["0", "1"]
    assert all(np.array_equal(source.read(i), folder.read(i)) for i in range(len(folder)))
    assert source.name(13) == f"{tmp_path}/train/shard-1.tar:part/0013.jpg"
    loader = build_loader(ViewDataset(source, 16, []), SequentialBatches(np.arange(24), 8), 2, torch.device("cpu"))
    in_workers = torch.cat([batch.images for batch in read_batches(loader)], dim=1)
    own = ViewDataset(folder, 16, [])
    assert torch.equal(in_workers, torch.stack([own[0, i].images for i in range(24)], dim=1))


def test_without_labels_and_with_a_bad_image(photos: Path, tmp_path: Path) -> None:
    files = sorted((photos / "train" / "circle").iterdir())[:3]
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(files[0].read_bytes()[:200])
    source = build_source("webdataset", str(write_shards(tmp_path / "flat", [*files, bad])), "pretrain")
    assert list(source.labels) == [UNLABELED] * 4
    with pytest.raises(UnreadableImage, match=r"shard-1.tar:part/0003.jpg"):
        source.read(3)


def test_wrong_tars_are_named(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .tar in"):
        build_source("webdataset", str(tmp_path), "pretrain")
    files = sorted((photos / "train" / "circle").iterdir())[:2]
    write_shards(tmp_path, files, ["0", "one"])
    with pytest.raises(UserError, match=r"shard-1.tar: part/0001.cls is not the number of a class"):
        build_source("webdataset", str(tmp_path), "pretrain")
    write_shards(tmp_path, files)
    whole = (tmp_path / "shard-1.tar").read_bytes()
    for content in (b"not a tar" * 100, whole[:700]):
        (tmp_path / "shard-1.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"shard-1.tar cannot be read as an uncompressed tar"):
            build_source("webdataset", str(tmp_path), "pretrain")
    with tarfile.open(tmp_path / "shard-1.tar", "w") as tar:
        add(tar, "1.cls", b"1")
        add(tar, "1.jpg", files[0].read_bytes())
    with pytest.raises(UserError, match=r"some have not: .*shard-0.tar:part/0000.jpg"):
        build_source("webdataset", str(tmp_path), "pretrain")
