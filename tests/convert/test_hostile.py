"""Files made to crash their reader, to keep it busy or to fill the memory end in one line, soon, and within bounds."""

import json
import pickle
import resource
import struct
import time
import zipfile

import pytest

from convert import archives, to_d2
from convert.pickles import MAX_STEPS
from convert.reader import load_tree, read_checkpoint
from foundation.errors import UserError
from tests.convert.hostile import (
    archive,
    dtype_with_objects,
    flat,
    nested,
    number,
    storage,
    tensor,
    text,
    whole,
)

ONE = {"0": struct.pack("<2f", 1.0, 2.0)}
SLOW = ("ten million marks", "ten million sets", "tuples a million")
GLOBAL = b"cargparse\nNamespace\n"
ATTACKS = {
    "hash of nested tuples": whole(b"}" + nested() + b"K\x01s"),
    "nested tuples as the key of an OrderedDict": whole(
        b"ccollections\nOrderedDict\n](" + nested() + b"K\x01\x86e\x85R"
    ),
    "nested tuples in a set": whole(b"\x8f(" + nested() + b"\x90"),
    "nested shape": archive(whole(tensor(storage(2), shape=nested())), ONE),
    "nested strides": archive(whole(tensor(storage(2), strides=nested())), ONE),
    "nested offset": archive(whole(tensor(storage(2), offset=nested())), ONE),
    "nested key of a storage": archive(
        whole(b"(" + text("storage") + b"ctorch\nFloatStorage\n" + nested() + text("cpu") + b"K\x02tQ"), ONE
    ),
    "nested persistent id": archive(whole(nested() + b"Q"), ONE),
    "nested module name": whole(nested() + text("x") + b"\x93"),
    "nested objective of an own checkpoint": whole(
        b"}(" + text("format") + text("corinfomax-pretrain") + text("config") + b"}" + nested() + b"Nsu"
    ),
    "memo index of two billion": whole(b"]r\xff\xff\xff\x7f"),
    "memo index of a thousand digits": whole(b"]p" + b"9" * 1000 + b"\n"),
    "global name of 10 MB": whole(b"c" + b"a" * 10_000_000 + b"\nb\n"),
    "global name of 10 MB on the stack": whole(text("torch") + text("a" * 10_000_000) + b"\x93"),
    "string longer than the file": whole(b"\x8e" + struct.pack("<Q", 1 << 60)),
    "frame longer than the file": whole(b"\x95" + struct.pack("<Q", 1 << 60)),
    "number of 10 MB": whole(b"\x8b" + struct.pack("<i", 10_000_000) + b"\x01" * 10_000_000),
    "number of negative length": whole(b"\x8b" + struct.pack("<i", -5)),
    "number of a million digits": whole(b"I" + b"9" * 1_000_000 + b"\n"),
    "ten million lists": whole(b"]" * 10_000_000),
    "ten million marks": whole(b"(" * 10_000_000),
    "ten million names for one object": whole(b"]" + b"\x94" * 10_000_000),
    "ten million sets": whole(b"\x8f" * 10_000_000),
    "lists a million deep": whole(b"]" * 400_000 + b"a" * 399_999),
    "tuples a million deep": whole(b")" + b"\x85" * 900_000),
    "copies of a long list": whole(
        b"](" + b"K\x01K\x01\x86" * 50_000 + b"eq\x000ccollections\nOrderedDict\nq\x010("
        + b"h\x01h\x00\x85R" * 50_000 + b"t"
    ),
    "copies of a long text": whole(
        text("a" * 4000) + b"q\x000c_codecs\nencode\nq\x01(" + b"h\x01h\x00\x85R" * 200_000 + b"t"
    ),
    "copies of a dictionary by a class": whole(
        b"}(" + b"".join(number(i) + b"N" for i in range(100_000)) + b"uq\x000" + GLOBAL
        + b"q\x010(" + b"h\x01h\x00\x85R" * 100_000 + b"l"
    ),
    "a list that holds one list a hundred thousand times": whole(
        b"](" + b"K\x01" * 100_000 + b"eq\x00](h\x00" + b"h\x00" * 99_999 + b"e"
    ),
    "modules that hold each other many times": whole(
        b"".join(
            b"0ctorch.nn\nModule\n)R}(" + text("_parameters") + b"}" + text("_modules") + b"}("
            + b"".join(number(i) + b"h\x00" for i in range(100 if level else 0)) + b"uubq\x00"
            for level in range(8)
        ).removeprefix(b"0")
    ),
    "many names beside many tables": archive(
        whole(b"}(" + b"".join(number(i) + b"}" + number(1) + tensor(storage(2)) + b"s" for i in range(20_000)) + b"u"),
        ONE,
    ),
    "an encoder in every name": archive(
        whole(
            tensor(storage(2)) + b"q\x000}("
            + b"".join(text(f"a{i}.layer1.0.conv1.weight") + b"h\x00" for i in range(50_000)) + b"u"
        ),
        ONE,
    ),
    "call of a text": whole(text("os") + b"(" + text("id") + b"tR"),
    "call without arguments": whole(GLOBAL + b"NR"),
    "instructions of a later protocol": whole(b"\x98"),
    "extension registry": whole(b"\x82\x01"),
    "nothing on the stack": whole(b""),
    "too much taken off": whole(b"000000"),
    "number type with objects": dtype_with_objects(),
    "safetensors header of 90 MB": struct.pack("<Q", 90_000_000) + b'{"a":' + b" " * 90_000_000,
    "safetensors header 10,000 deep": struct.pack("<Q", 20_008) + b'{"a":  ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "safetensors beyond its end": (
        lambda header: struct.pack("<Q", len(header)) + header + bytes(8)
    )(json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()),
}  # fmt: skip


# What the messages say, where another reason would do as well.
MESSAGES = {
    "hash of nested tuples": "dictionary key",
    "nested tuples as the key of an OrderedDict": "dictionary key",
    "nested shape": "shape is not a few numbers",
    "nested strides": "shape is not a few numbers",
    "nested offset": "proper offset",
    "nested key of a storage": "a storage without a key",
    "nested persistent id": "unknown way",
    "nested module name": "name is not a short text",
    "nested objective of an own checkpoint": "dictionary key",
    "memo index of two billion": "no tensors",
    "copies of a long list": "more than 1000000 values",
    "copies of a long text": "more than 1000000 values",
    "copies of a dictionary by a class": "too many places",
    "modules that hold each other many times": "more than 100000 tensors",
    "an encoder in every name": "more encoders",
    "call of a text": "no function",
    "nothing on the stack": "values that it needs",
}


def bounded(function, *arguments):
    """Call; fail where it takes more than 3 s of CPU or 1 GB more memory than this process has had before."""
    memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        return function(*arguments)
    finally:
        assert time.process_time() - begin < 3.0
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000  # KiB


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name.startswith(SLOW) else ()) for name in ATTACKS]
)
def test_attacks_end_in_one_line(name, tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(ATTACKS[name])
    with pytest.raises(UserError, match=r"evil\.pth") as caught:
        bounded(to_d2.main, [str(path), str(tmp_path / "out.pkl")])
    assert len(str(caught.value)) < 2000
    assert MESSAGES.get(name, "") in str(caught.value)


@pytest.mark.parametrize("name", ["lists a million deep", "a list that holds one list a hundred thousand times"])
def test_whole_trees_are_copied_within_bounds(name, tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(ATTACKS[name])
    if "deep" in name:
        with pytest.raises(UserError, match="evil"):
            bounded(load_tree, path)
    else:
        assert len(bounded(load_tree, path)[1]) == 100_000


@pytest.mark.parametrize(
    "changed",
    {
        "storage": storage(2) + b"}" + text("count") + number(1 << 20) + b"sb",
        "storage, as slots": storage(2) + b"(N}" + text("count") + number(1 << 20) + b"stb",
        "storage type": b"ctorch\nFloatStorage\n}" + text("dtype") + text("object") + b"sb",
        "tensor": tensor(storage(2)) + b"}" + text("shape") + number(1 << 20) + b"\x85sb",
        "reader": tensor(storage(2)) + b"(N}" + text("read") + b"ctorch.nn\nModule\nstb",
        "function": b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("__name__") + text("x") + b"sb",
        "class": GLOBAL + b"(N}" + text("name") + text("x") + b"stb",
    }.items(),
    ids=lambda item: item[0],
)
def test_build_reaches_nothing_of_ours(changed, tmp_path):
    """`BUILD` sets attributes in pickle's own machine: a storage's size was changed so after it had been checked."""
    path = tmp_path / "evil.pth"
    path.write_bytes(archive(whole(changed[1]), ONE))
    with pytest.raises(UserError, match="attributes for something that has none"):
        read_checkpoint(path)


def test_state_is_taken_once(tmp_path):
    """An array, or its number type, cannot be described anew when tensors refer to it already."""
    order = b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    kind = b"cnumpy\ndtype\n" + text("f4") + b"\x89\x88\x87R" + order
    state = b"(K\x01K\x02\x85" + kind + b"\x89C\x08" + b"A" * 8 + b"tb"
    begin = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    (tmp_path / "good.pkl").write_bytes(whole(begin + state))
    assert read_checkpoint(tmp_path / "good.pkl").content.tensor.shape == (2,)
    for bad in (begin + state + state, kind + order):
        (tmp_path / "bad.pkl").write_bytes(whole(bad))
        with pytest.raises(UserError, match="twice"):
            read_checkpoint(tmp_path / "bad.pkl")


def test_sizes_are_checked_where_memory_is_read(tmp_path):
    """A tensor may be described before the file turns out to be short; numpy compares again when it is read."""
    path = tmp_path / "short.pth"
    path.write_bytes(archive(whole(tensor(storage(2), shape=b"K\x08\x85", strides=b"K\x00\x85")), ONE))
    with pytest.raises(UserError, match="repeats the 2 elements"):
        load_tree(path)
    for arguments in ({"offset": b"K\x01"}, {"shape": b"K\x03\x85"}, {"strides": b"K\x02\x85"}):
        path.write_bytes(archive(whole(tensor(storage(2), **arguments)), ONE))
        with pytest.raises(UserError, match="in a storage of 2 elements"):
            load_tree(path)
    for wrong in (b"J\xff\xff\xff\xff", b"G" + struct.pack(">d", 0.0), b"\x88", text("0")):
        path.write_bytes(archive(whole(tensor(storage(2), offset=wrong)), ONE))
        with pytest.raises(UserError, match="offset, shape and strides"):
            load_tree(path)


def test_compressed_archives_have_a_bound(tmp_path, monkeypatch):
    """A megabyte may unpack to a gigabyte; the bound is lowered here."""
    monkeypatch.setattr(archives, "_LARGEST_UNPACKED", 4 << 20)
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", whole(tensor(storage(2))))
        with file.open("archive/data/0", "w", force_zip64=True) as record:
            for _ in range(5):
                record.write(bytes(1 << 20))
    with pytest.raises(UserError, match="save it uncompressed"):
        bounded(load_tree, path)


def test_a_directory_of_a_million_entries(tmp_path):
    path = tmp_path / "many.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", whole(b"N"))
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    start = data.index(b"PK\x01\x02")
    entries = data[start:end] * 200_000
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(entries), start, 0)
    path.write_bytes(data[:start] + entries + tail)
    with pytest.raises(UserError, match="directory is larger"):
        bounded(read_checkpoint, path)


def test_tensors_that_share_their_data_do_not_fill_the_memory(tmp_path):
    """A file of 4 MB with a thousand names for its data."""
    path = tmp_path / "shared.pth"
    count = 1 << 20
    one = tensor(storage(count), shape=number(count) + b"\x85")
    names = b"".join(number(i) + one for i in range(1000))
    path.write_bytes(archive(whole(b"}(" + names + b"u"), {"0": bytes(4 * count)}))
    with pytest.raises(UserError, match="share their data"):
        bounded(load_tree, path)


def test_honest_files_stay_below_the_bound(tmp_path):
    """A log of forty thousand entries beside the weights is read."""
    log = [{"loss": float(i), "step": i} for i in range(40_000)]
    (tmp_path / "log.pkl").write_bytes(flat({"log": log}))
    assert read_checkpoint(tmp_path / "log.pkl").content["log"] == log
    (tmp_path / "log.pkl").write_bytes(flat([float(i) for i in range(MAX_STEPS)]))
    with pytest.raises(UserError, match="save the state dict alone"):
        bounded(read_checkpoint, tmp_path / "log.pkl")


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_those_of_pickle(protocol, tmp_path):
    long = "é" * 5000
    content = {
        "numbers": [0, 1, 255, 256, 65536, -1, 2**31, -(2**70), 1.5, float("inf"), True, False, None],
        "texts": ["", "a", "é\n'\"\\", "x" * 300, "\u20ac"],
        "bytes": [b"", b"\x00\xff", b"a" * 300],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "nested": {"a": {"b": [{}, []]}},
        5: "five",
        None: 0,
        True: 1,
    }
    content["again"] = content["nested"]
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({**content, "long": [long]}, protocol=protocol))
    read = read_checkpoint(tmp_path / "plain.pkl").content
    (kept,) = read.pop("long")
    if protocol == 0:
        assert kept == long
    else:
        assert bytes(kept.view).decode() == long  # long texts stay in the file
    if protocol < 3:  # an empty byte string is a call of `bytes` there
        content["bytes"], read["bytes"] = content["bytes"][1:], read["bytes"][1:]
    assert read == content
    assert read["again"] is read["nested"]
