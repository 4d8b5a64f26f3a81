"""Files that attack their reader, assembled byte by byte."""

import io
import pickle
import struct
import zipfile

MULTIARRAY = b"cnumpy.core.multiarray\n"


def text(value):
    data = value.encode() if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    return b"J" + struct.pack("<i", value)


def archive(pickled, storages=None):
    """A zip archive as PyTorch writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in (storages or {}).items():
            file.writestr(f"archive/data/{name}", data)
    return buffer.getvalue()


def storage(count, key="0", kind=b"FloatStorage"):
    """Instructions that push a storage."""
    return b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(data, offset=b"K\x00", shape=b"K\x02\x85", strides=b"K\x01\x85"):
    """Instructions that push a tensor; the arguments are instructions, too."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + data + offset + shape + strides + b"\x89}tR"


def whole(instructions):
    return b"\x80\x02" + instructions + b"."


def nested(levels=60):
    """A tuple whose hash and text take 2^levels steps: each level holds the one below twice."""
    return b")" + b"".join(b"q\x00h\x00\x86" for _ in range(levels))


def dtype_with_objects():
    """A number type whose state carries a field of Python objects: numpy would take file bytes for pointers."""
    inner = b"cnumpy\ndtype\n(" + text("O8") + b"\x89\x88tRK\x00t"
    outer = b"cnumpy\ndtype\n(" + text("V8") + b"\x89\x88tR(K\x03" + text("|") + b"N("
    outer += text("model") + b"t}" + text("model") + b"(" + inner + b"sK\x08K\x01K\x00tb"
    return b"\x80\x03" + MULTIARRAY + b"scalar\n(" + outer + b"C\x08" + b"A" * 8 + b"tR."


def flat(content):
    """A plain pickle of a content."""
    return pickle.dumps(content, protocol=4)
