"""A malicious file never runs code, and a damaged one is one line of error that leaves the output alone."""

import gzip
import io
import os
import pickle
import pickletools
import struct
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from convert.archives import STREAM_MAGIC
from convert.reader import read_checkpoint
from convert.to_d2 import main
from foundation.errors import UserError
from tests.convert.conftest import assert_holds, encoder_of, load_pickle, values_of


class Evil:
    """Makes a marker file when it is unpickled by an ordinary loader."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


class Builtin(Evil):
    """Likewise, hidden behind a call of a builtin."""

    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({self.marker!r})",)


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


STREAM = {"_use_new_zipfile_serialization": False}
MALICIOUS = {
    "zip": ("evil.pth", lambda state, evil: saved({**state, "x": evil})),
    "stream": ("evil.pth.tar", lambda state, evil: saved({**state, "x": evil}, **STREAM)),
    "lightning": ("evil.ckpt", lambda state, evil: saved({"state_dict": state, "hyper_parameters": [evil]})),
    "renamed": ("evil.safetensors", lambda state, evil: saved({**state, "x": evil})),
    "pickle": ("evil.pkl", lambda state, evil: pickle.dumps({"model": {}, "x": evil})),
    "old pickle": ("evil.pkl", lambda state, evil: pickle.dumps({"model": {}, "x": evil}, protocol=0)),
}


@pytest.mark.parametrize("kind", MALICIOUS)
@pytest.mark.parametrize("make", [Evil, Builtin], ids=["system call", "builtin"])
def test_malicious_files_run_nothing(kind, make, query, convert, tmp_path):
    marker = tmp_path / "marker"
    name, build = MALICIOUS[kind]
    data = build(encoder_of(query), make(marker))
    # The file does what it claims to: an ordinary loader runs it.
    pickle.loads(data) if name.endswith(".pkl") else torch.load(io.BytesIO(data), weights_only=False)
    marker.rmdir()
    with pytest.raises(UserError, match=r"nothing of it was run.*--allow-unknown"):
        convert(data, name=name)
    if name.endswith(".pkl"):
        with pytest.raises(UserError, match="holds no tensors"):
            convert(data, "--allow-unknown", name=name)
    else:
        assert_holds(convert(data, "--allow-unknown", name=name), values_of(query))
    assert not marker.exists()


def test_archives_are_not_opened_for_what_is_in_them(convert, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("inner.pth", saved({"x": Evil(tmp_path / "marker")}))
    with pytest.raises(UserError, match="zip archive"):
        convert(buffer.getvalue(), "--allow-unknown", name="evil.zip")
    assert not (tmp_path / "marker").exists()


def test_the_option_had_another_name(query, convert, foreign_class):
    content = {"state_dict": encoder_of(query), "settings": foreign_class("somebody.code", "Settings")(lr=0.1)}
    assert_holds(convert(content, "--trust"), values_of(query))


def test_unknown_classes_are_records_if_allowed(query, convert, foreign_class):
    content = {"state_dict": encoder_of(query), "settings": foreign_class("somebody.code", "Settings")(lr=0.1)}
    with pytest.raises(UserError, match=r"asks for somebody\.code\.Settings.*--allow-unknown"):
        convert(content)
    assert_holds(convert(content, "--allow-unknown"), values_of(query))


def test_known_records_need_no_option(query, convert, foreign_class):
    buffer = foreign_class("mmengine.logging.history_buffer", "HistoryBuffer", object)()
    buffer.values = np.arange(5.0)
    config = foreign_class("yacs.config", "CfgNode")(a=1)
    content = {"state_dict": encoder_of(query), "message_hub": {"loss": buffer}, "config": config}
    assert_holds(convert(content), values_of(query))


def test_omegaconf_and_sets_and_paths(query, convert, tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    hyper = omegaconf.OmegaConf.create({"lr": 0.1, "layers": [1, 2], "name": "${lr}"})
    content = {"state_dict": encoder_of(query), "hyper_parameters": hyper, "paths": {tmp_path}, "best": np.float32(3.0)}
    assert_holds(convert(content), values_of(query))


def test_a_pickle_that_holds_itself(query, convert):
    loop = {"state_dict": encoder_of(query)}
    loop.update({f"self{index}": loop for index in range(20)})
    assert_holds(convert(loop), values_of(query))


def flip(data, position):
    changed = bytearray(data)
    changed[position] ^= 0xFF
    return bytes(changed)


def damaged():
    """(name, bytes, what the message says) of files that are no checkpoints, or were once."""
    state = {"conv1.weight": torch.ones(64, 3, 7, 7), "bn1.weight": torch.ones(64)}
    whole, stream, safe = (
        saved(state),
        saved(state, **STREAM),
        safetensors.torch.save(state),
    )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as plain:
        plain.writestr("readme.txt", "hello")
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    yield "empty.pth", b"", "is empty"
    yield "page.pth", b"<!DOCTYPE html><html><body>404</body></html>", "web page"
    yield "page2.pth", b"\n  <html lang=en>", "web page"
    yield "photo.pth", b"\xff\xd8\xff\xe0" + bytes(100), "JPEG"
    yield "photo.pkl", b"\x89PNG\r\n\x1a\n" + bytes(100), "PNG"
    yield "archive.pth", archive.getvalue(), "zip archive"
    yield "packed.pth", gzip.compress(whole), "gzip"
    yield "script.pth", script.getvalue(), "TorchScript"
    yield "keras.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"
    yield "lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"
    yield "config.json", b'{"architectures": ["ResNet"]}', "JSON"
    yield "text.pth", b"hello world, this is text\n", "not a checkpoint"
    yield "number.pkl", pickle.dumps(5), "no tensors"
    yield "zeros.pth", bytes(5000), "zeros"
    for share in (0.01, 0.5, 0.999):
        for name, data in (("zip.pth", whole), ("stream.pth", stream), ("safe.safetensors", safe)):
            yield f"{share}-{name}", data[: int(share * len(data))], None
    yield "short.safetensors", struct.pack("<Q", 10**7) + b'{"a":', "safetensors"


@pytest.mark.parametrize(("name", "data", "message"), damaged(), ids=[row[0] for row in damaged()])
def test_damaged_files(name, data, message, tmp_path):
    source, target = tmp_path / name, tmp_path / "out.pkl"
    source.write_bytes(data)
    target.write_bytes(b"old")
    with pytest.raises(UserError, match=message) as caught:
        main([str(source), str(target), "--overwrite"])
    assert name in str(caught.value)
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out.pkl"])


@pytest.mark.parametrize("name", ["layer3.0.conv2.weight", "conv1.weight"])
def test_a_flipped_bit_in_a_weight(name, query, convert):
    state = encoder_of(query)
    data = saved(state)
    position = data.index(state[name].numpy().tobytes()) + 1000
    with pytest.raises(UserError, match="checksum"):
        convert(flip(data, position))


def test_an_archive_without_checksums(query, convert):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(encoder_of(query))
    finally:
        torch.serialization.set_crc32_options(before)
    assert {info.CRC for info in zipfile.ZipFile(io.BytesIO(data)).infolist()} == {0}
    assert_holds(convert(data), values_of(query))


def test_folders_missing_files_and_pipes(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo(tmp_path / "pipe.pth")
    expected = {"folder.pth": "is a folder", "missing.pth": "does not exist", "pipe.pth": "not a regular file"}
    for name, message in expected.items():
        with pytest.raises(UserError, match=message):
            main([str(tmp_path / name), str(tmp_path / "out.pkl")])


@pytest.mark.parametrize("head", [b"", b"PK\x03\x04", STREAM_MAGIC, b"\x80\x04", b"\xff"])
def test_ten_gigabytes_of_nothing(head, tmp_path):
    """A sparse file is refused by its beginning or its end, without being read."""
    path = tmp_path / "sparse.pth"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(10 << 30)
    with pytest.raises(UserError):
        read_checkpoint(path)


def bad_tensors():
    """Pickled tensors whose description lies."""
    tensor = torch.arange(6.0)
    data = saved({"x": tensor})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickled = archive.read("archive/data.pkl")
    assert any(opcode.name == "BININT1" and argument == 6 for opcode, argument, _ in pickletools.genops(pickled))
    yield data, pickled, pickled.replace(b"K\x06", b"K\x99")  # more elements than the record holds
    yield data, pickled, pickled.replace(b"K\x06\x85", b"K\x07\x85")  # a shape beyond the storage


@pytest.mark.parametrize(("data", "pickled", "changed"), bad_tensors(), ids=["storage", "shape"])
def test_tensors_that_reach_beyond_their_data(data, pickled, changed, tmp_path):
    path = tmp_path / "bad.pth"
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, changed if info.filename.endswith("data.pkl") else old.read(info))
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(path)


def test_repacked_and_compressed_archive(query, convert):
    data, buffer = saved(encoder_of(query)), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert_holds(convert(buffer.getvalue()), values_of(query))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(protocol, query, convert):
    output = convert(saved(encoder_of(query), pickle_protocol=protocol))
    assert_holds(output, values_of(query))
    copy = {"model": load_pickle(output)["model"], "__author__": "x", "matching_heuristics": True}
    again = convert(pickle.dumps(copy, protocol=protocol), name="copy.pkl", output="again.pkl")
    assert load_pickle(again)["model"].keys() == copy["model"].keys()
    assert_holds(again, values_of(query))
