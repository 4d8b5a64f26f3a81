"""Mutated files of every kind: each is read or refused in one line, within bounds of time and memory."""

import argparse
import io
import json
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from convert.encoders import read_encoder
from convert.pickles import _CODES
from convert.reader import load_tree
from convert.stand_ins import _FUNCTIONS
from convert.to_d2 import list_contents, read_checkpoint
from foundation.errors import UserError
from tests.convert.checkpoints import moco, own
from tests.convert.conftest import encoder_of, tiny_resnet
from tests.convert.hostile import archive, storage, tensor, text
from tests.convert.test_hostile import bounded

INSTRUCTIONS = bytes(_CODES.values())


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def originals():
    """Small files of every kind, with what training leaves beside weights."""
    network = tiny_resnet(0, width=2)
    beside = {"args": argparse.Namespace(lr=0.1, names=["a", "b"]), "best": np.float32(3.0), "epoch": 3}
    arrays = {name: tensor.numpy() for name, tensor in encoder_of(network).items()}
    content = {**moco(network, network), **beside}
    return {
        "zip": saved(content),
        "own": saved(own(network, network)),
        "module": saved(network),
        "stream": saved(content, _use_new_zipfile_serialization=False),
        "safetensors": safetensors.torch.save(
            encoder_of(network), {"format": "corinfomax-encoder", "mean": "0.1,0.2,1"}
        ),
        "detectron2": pickle.dumps({"model": arrays, "__author__": "x", **beside}),
        "old pickle": pickle.dumps({"blobs": {"conv1_w": arrays["conv1.weight"]}, **beside}, protocol=0),
    }


def mutate(data, rng, places):
    """Change a few bytes, cut, repeat or move parts, or put instructions of pickles in."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.choice(places) if places and rng.random() < 0.8 else rng.randrange(len(data))
        place = min(place, len(data) - 1)
        kind = rng.randrange(6)
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            data[place] = rng.choice(INSTRUCTIONS)
        elif kind == 2:
            data[place : place + rng.randint(1, 8)] = b""
        elif kind == 3:
            data[place:place] = bytes(rng.choice(INSTRUCTIONS) for _ in range(rng.randint(1, 6)))
        elif kind == 4:
            start = rng.randrange(len(data))
            data[place:place] = data[start : start + rng.randint(1, 200)]
        else:
            data[place : place + 4] = struct.pack("<I", rng.choice((0, 1, 255, 2**31 - 1, 2**32 - 1)))
        if not data:
            break
    return bytes(data) or b"\x80"


def mutant(kind, data, rng):
    """A changed file; in an archive it is usually the pickle that changes, with its checksum."""
    if kind in ("zip", "own", "module") and rng.random() < 0.8:
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
            for info in old.infolist():
                part = old.read(info)
                new.writestr(info, mutate(part, rng, []) if info.filename.endswith("data.pkl") else part)
        return buffer.getvalue()
    head = len(data) if kind == "old pickle" else min(len(data), 40_000)  # where the structure is
    return mutate(data, rng, range(head))


def read_whole(path):
    """All that the programs of this project do with a file."""
    for use in (lambda: list_contents(read_checkpoint(path)), lambda: read_encoder(path), lambda: load_tree(path)):
        try:
            use()
        except UserError as error:
            message = str(error)
            assert str(path) in message
            assert len(message) < 3000


KINDS = ["zip", "own", "module", "stream", "safetensors", "detectron2", "old pickle"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, pytest.param(150, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_mutated_files_are_read_or_refused(kind, count, originals, tmp_path):
    path = tmp_path / "mutant.pth"
    for seed in range(count):
        rng = random.Random(f"{kind} {seed}")
        path.write_bytes(mutant(kind, originals[kind], rng))
        try:
            bounded(read_whole, path)
        except Exception as error:
            raise AssertionError(f"the mutant of seed {seed}") from error


NAMES = [*_FUNCTIONS, "torch.FloatStorage", "torch.nn.modules.Module", "argparse.Namespace", "builtins.set"]
SHORT = [b"N", b"K\x00", b"K\x02", b"K\xff", b"]", b"}", b")", b"\x88", b"\x89", b"\x8f", b"C\x01a", b"G" + bytes(8)]
STRINGS = [
    "f4",
    "<",
    "model",
    "encoder.layer1.0.conv1.weight",
    "_modules",
    "_parameters",
    "state_dict",
    "config",
    "a" * 5000,
]


def value(rng, depth):
    """Instructions that push one value: an atom, a tensor, a container, a call, a call with state, or an old value."""
    kind = rng.randrange(9) if depth else rng.randrange(3)
    inner = [value(rng, depth - 1) for _ in range(rng.randrange(4))] if depth else []
    if kind == 0:
        return rng.choice(SHORT)
    if kind == 1:
        return text(rng.choice(STRINGS))
    if kind == 2:
        return tensor(storage(2)) if rng.random() < 0.7 else storage(2)
    if kind == 3:
        return b"(" + b"".join(inner) + rng.choice((b"l", b"t"))
    if kind == 4:
        keys = [text(name) for name in rng.sample(STRINGS, len(inner))]
        return b"}(" + b"".join(key + each for key, each in zip(keys, inner, strict=True)) + b"u"
    if kind in (5, 6):
        module, _, name = rng.choice(NAMES).rpartition(".")
        called = f"c{module}\n{name}\n".encode() + b"(" + b"".join(inner) + b"tR"
        return called + value(rng, depth - 1) + b"b" if kind == 6 else called
    return (
        value(rng, depth - 1) + bytes([ord("q"), rng.randrange(4)]) if kind == 7 else b"h" + bytes([rng.randrange(4)])
    )


def program(rng):
    """A well-formed pickle of whatever the reader knows; one in four has a changed byte."""
    pickled = b"\x80\x02]q\x000}q\x010)q\x020Nq\x030" + value(rng, 5) + b"."
    return mutate(pickled, rng, []) if rng.random() < 0.25 else pickled


@pytest.mark.parametrize("count", [40, pytest.param(5000, marks=pytest.mark.slow)])
def test_generated_pickles_are_read_or_refused(count, tmp_path):
    path = tmp_path / "program.pth"
    for seed in range(count):
        path.write_bytes(archive(program(random.Random(seed)), {"0": bytes(8)}))
        try:
            bounded(read_whole, path)
        except Exception as error:
            raise AssertionError(f"the program of seed {seed}") from error


def values(rng, depth):
    """A random JSON value, mostly of the kinds that a sidecar has."""
    kind = rng.randrange(9 if depth else 7)
    if kind == 7:
        return [values(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {str(rng.randrange(3)): values(rng, depth - 1) for _ in range(rng.randrange(3))}
    return (None, True, -1, 0.5, "RGB", [1.0, 2.0, 3.0], 1e400)[kind]


def test_random_sidecars_and_configs(query, tmp_path):
    """Both lie beside a file and are as foreign as the file."""
    rng = random.Random(0)
    model = {"stem.conv1.weight": np.ones((8, 3, 7, 7), np.float32), "res2.0.conv1.weight": np.ones((8, 8, 1, 1))}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": model, "__author__": "x"}))
    names = ("pixel_mean", "pixel_std", "format", "stride_in_1x1", "weights_sha256")
    for _ in range(200):
        fields = {name: values(rng, 2) for name in names if rng.random() < 0.9}
        (tmp_path / "x.json").write_text(json.dumps(fields))
        parts = {"PIXEL_MEAN": values(rng, 1), "PIXEL_STD": values(rng, 1), "RESNETS": values(rng, 2)}
        config = {"MODEL": rng.choice((parts, values(rng, 2))), "INPUT": values(rng, 2)}
        (tmp_path / "config.yaml").write_text(json.dumps(rng.choice((config, values(rng, 2)))))
        with pytest.raises(UserError, match=str(tmp_path)):  # at the latest for the tensors that are missing
            read_encoder(tmp_path / "x.pkl", naming="detectron2")
