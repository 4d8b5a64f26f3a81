"""What the names in a pickle stand for here. None of them is imported.

A pickle names the functions and classes that rebuild its objects. The few that carry tensors (PyTorch's rebuild
functions and storages, numpy's arrays) stand for a `Function` of this module, which checks its arguments. Classes that
training code saves beside its weights, such as `argparse.Namespace`, stand for a `ForeignClass`, whose instances are
inert records. Any other name is an error, unless the user allows unknown names: they stand for a `ForeignClass`, too.

The allow-list is in `_CALLS` and `_INERT`.
"""

import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from convert.tensors import ForeignClass, Record, Storage, StoredTensor, UnreadableTensor, sizes

ITEM_TYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}

# Modules whose classes are settings, logs, optimizer state or network structure, with everything below them.
_INERT = re.compile(
    r"(argparse|collections|pathlib|datetime|enum|typing|functools|uuid|decimal|fractions|numpy\.random"
    r"|torch\.(nn|optim|distributions|cuda\.amp|amp|backends|distributed\.\w+)|torchvision|timm|transformers"
    r"|omegaconf|yacs|fvcore|easydict|addict|ml_collections|munch|box|attr|hydra"
    r"|mmcv|mmengine|mmcls|mmselfsup|mmpretrain|openselfsup|vissl|classy_vision|detectron2|apex"
    r"|pytorch_lightning|lightning|lightning_fabric|lightning_utilities|torchmetrics|lightly|lightly_train|solo"
    r"|haiku|jax|jaxlib|optax|flax|chex|jaxline|byol|tree|dill)(\..*)?"
)
_INERT_BUILTINS = {
    *("object", "type", "bool", "int", "float", "complex", "str", "bytes", "long", "unicode"),
    *("dict", "list", "tuple", "slice", "range", "Exception", "set", "frozenset"),
}
_INERT_TORCH = re.compile(
    r"torch\.(device|Generator|(torch\.)?(b?float\d*\w*|double|half|u?int\d*|long|short|bool|uint8|complex\d*)"
    r"|memory_format|contiguous_format|channels_last|strided|serialization\._get_layout)"
)
_BYOL_STATE = ("online_params", "target_params", "online_state", "target_state", "opt_state")
_NUMBERS = {"b1", "f2", "f4", "f8", *(f"{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8))}


class ForbiddenGlobal(pickle.UnpicklingError):
    """The pickle names something outside the allow-list."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """What a pickle may call: `call` takes the arguments that the file gives, and checks them."""

    name: str
    call: Callable[..., Any]


@dataclass(frozen=True, slots=True, eq=False)
class StorageType:
    """The type of a PyTorch storage."""

    dtype: str


@dataclass(frozen=True, slots=True, eq=False)
class Blob:
    """A long text or byte string, left where it is in the file until it is used.

    Attributes:
        view: its bytes in the file.
        text: they are UTF-8; protocol 2 writes bytes so, decoded as Latin-1.
    """

    view: memoryview
    text: bool

    def data(self) -> bytes | memoryview:
        """The byte string."""
        return bytes(self.view).decode("utf-8").encode("latin-1") if self.text else self.view


class ArrayType:
    """A numpy dtype, if it is a plain number; `name` is None for all others (text, objects, fields).

    Pickle makes it from a code such as `f4`, then tells its byte order as state.
    """

    __slots__ = ("_complete", "_name")

    def __init__(self, code: Any) -> None:
        plain = code.lstrip("<>|=") if isinstance(code, str) else ""
        order = ">" if isinstance(code, str) and code.startswith(">") else "<"
        self._name = order + plain if plain in _NUMBERS else None
        self._complete = False

    @property
    def name(self) -> str | None:
        """Byte order and code, such as `<f4`."""
        return self._name

    def complete(self, state: Any) -> None:
        """Take the byte order from (version, order, subarray, names, fields, ...).

        Raises:
            UnreadableTensor: a second state.
        """
        if self._complete:
            raise UnreadableTensor("a number type that is described twice")
        self._complete = True
        known = isinstance(state, tuple) and len(state) >= 5 and state[1] in (*"<>|=",)
        if not known or any(part is not None for part in state[2:5]):
            self._name = None
        elif self._name is not None and state[1] in "<>":
            self._name = state[1] + self._name[1:]


class Array:
    """A numpy array: pickle makes it empty, then hands over its contents as state."""

    __slots__ = ("_complete", "_tensor")

    def __init__(self) -> None:
        self._tensor: StoredTensor | None = None
        self._complete = False

    @property
    def tensor(self) -> StoredTensor | None:
        """Its values; None where they are not numbers."""
        return self._tensor

    def complete(self, state: Any) -> None:
        """Take (version, shape, dtype, Fortran order, bytes).

        Raises:
            UnreadableTensor: a second state, or one that no array has.
        """
        if self._complete or not isinstance(state, tuple) or len(state) != 5:
            raise UnreadableTensor("an array that is described twice, or not at all")
        self._complete = True
        _, shape, dtype, fortran, data = state
        shape = sizes(shape)
        if not isinstance(dtype, ArrayType) or dtype.name is None or not isinstance(data, (Blob, bytes, str)):
            return  # an array of text or objects
        name = dtype.name
        order: Literal["F", "C"] = "F" if fortran is True else "C"

        def read() -> np.ndarray:
            raw = data.data() if isinstance(data, Blob) else data.encode("latin-1") if isinstance(data, str) else data
            kind = np.dtype(name)
            if len(raw) != math.prod(shape) * kind.itemsize:
                raise UnreadableTensor(f"an array of shape {shape} with {len(raw)} bytes")
            return np.ndarray(shape, kind, buffer=raw, order=order)

        self._tensor = StoredTensor(shape, np.dtype(name).name, read)


def find(module: str, name: str, allow_unknown: bool) -> Function | ForeignClass | StorageType:
    """What a name stands for.

    Raises:
        ForbiddenGlobal: it is not on the allow-list, and unknown names are not allowed.
    """
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    full = f"{module}.{name}"
    if full in _FUNCTIONS:
        return _FUNCTIONS[full]
    if module in ("torch", "torch.storage") and name in ITEM_TYPES:
        return StorageType(ITEM_TYPES[name])
    known = _INERT.fullmatch(module) or _INERT_TORCH.fullmatch(full) or full.endswith("._ByolExperimentState")
    if not (known or allow_unknown or (module == "builtins" and name in _INERT_BUILTINS)):
        raise ForbiddenGlobal(full)
    return ForeignClass(full, _BYOL_STATE if name == "_ByolExperimentState" else ())


def apply(what: Any, args: Any) -> Any:
    """What a pickle gets when it calls `what`: our function's result, or a record.

    Raises:
        UnreadableTensor: it is nothing that can be called.
    """
    if not isinstance(args, tuple):
        raise UnreadableTensor("a call without arguments")
    if isinstance(what, Function):
        try:
            return what.call(*args)
        except TypeError as error:
            raise UnreadableTensor(f"a call of {what.name} with arguments that it does not take") from error
    if isinstance(what, ForeignClass):
        return Record(what, args)
    if isinstance(what, Record):  # a pickled factory
        return Record(what.cls, args)
    raise UnreadableTensor("a call of something that is no function")


def complete(target: Any, state: Any) -> None:
    """Hand state to an object, as pickle's BUILD does. Only arrays, their types and records take any.

    Raises:
        UnreadableTensor: the object takes none.
    """
    if isinstance(target, (Array, ArrayType)):
        target.complete(state)
    elif isinstance(target, Record):
        target.state = state
    elif not isinstance(target, dict):  # PyTorch hangs `_metadata` on dictionaries; it is left out
        raise UnreadableTensor("attributes for something that has none")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    """PyTorch's `_rebuild_tensor_v2`."""
    if not isinstance(storage, Storage):
        raise UnreadableTensor("a tensor without a storage")
    return storage.tensor(offset, shape, strides)


def _array_from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any = "C") -> Array:
    """Numpy's arrays in pickles of protocol 5."""
    array = Array()
    array.complete((1, shape, dtype, order == "F" if isinstance(order, str) else False, buffer))
    return array


def _ordered_dictionary(pairs: Any = (), *_: Any) -> dict[Any, Any]:
    """Empty, or from key-value pairs, as Python 2 pickles it."""
    if not isinstance(pairs, (list, tuple)):
        raise UnreadableTensor("a dictionary that is not made of pairs")
    made = {}
    for pair in pairs:
        key, value = pair
        made[plain_key(key)] = value
    return made


def _encoded(text: Any, encoding: Any = "latin1") -> Blob | bytes:
    """Bytes, as protocol 2 writes them."""
    if isinstance(text, Blob) and text.text:
        return text
    if not isinstance(text, str):
        raise UnreadableTensor("bytes that are not text")
    return text.encode("latin-1")


def _named_tuple(name: Any, fields: Any, *_: Any) -> ForeignClass:
    """The way of dill to pickle a named tuple's class."""
    if not isinstance(fields, (list, tuple)) or len(fields) > 1000:
        raise UnreadableTensor("a named tuple without fields")
    return ForeignClass(
        name if isinstance(name, str) else "named tuple", tuple(f for f in fields if isinstance(f, str))
    )


def plain_key(key: Any) -> Any:
    """A key that is cheap to hash: text, bytes and small numbers are kept, other plain keys become text.

    A file could otherwise hold keys whose hashes take for ever (nested tuples) or are all the same.

    Raises:
        UnreadableTensor: a key that only such a file has.
    """
    if isinstance(key, (str, bytes, bool, Record, ForeignClass, Blob)) or key is None:
        return key
    if isinstance(key, int) and abs(key) < 1 << 60:
        return key
    parts = key if isinstance(key, tuple) and len(key) <= 16 else (key,)
    if not all(isinstance(part, (str, int, float, type(None))) and len(repr(part)) < 1000 for part in parts):
        raise UnreadableTensor("a dictionary key that is neither text nor a number")
    return repr(key)


def _reconstructed(kind: Any, base: Any = None, content: Any = None) -> Record:
    """Instances in protocols 0 and 1; `content` is that of a built-in base class."""
    return Record(kind if isinstance(kind, ForeignClass) else ForeignClass("object"), (content,))


def _first(value: Any, *_: Any) -> Any:
    return value


def _pickled_storage(*_: Any) -> Any:
    """PyTorch's `_load_from_bytes`: each tensor of such a file is a checkpoint of its own, as a byte string."""
    raise UnreadableTensor(
        "PyTorch's tensors were written by pickle.dump; write the state dict with torch.save instead"
    )


def _subclass(build: Any, kind: Any, args: Any, state: Any) -> Any:
    """PyTorch's `_rebuild_from_type_v2`, of parameters and other subclasses of tensors."""
    if not isinstance(build, Function) or build.call not in (_tensor, _first):
        raise UnreadableTensor("a tensor of an unknown kind")
    return apply(build, args)


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dictionary,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.storage._load_from_bytes": _pickled_storage,
    "torch.Size": lambda values=(): sizes(values),
    "_codecs.encode": _encoded,
    "copyreg._reconstructor": _reconstructed,
    "numpy.ndarray": lambda *_: Array(),
    "numpy.dtype": lambda code, *_: ArrayType(code),
    "dill._dill._create_namedtuple": _named_tuple,
    "dill.dill._create_namedtuple": _named_tuple,
    "builtins.bytearray": lambda data=b"", *_: _encoded(data) if isinstance(data, str) else data,
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: Array() for core in ("core", "_core")},
    **{
        f"numpy.{core}.multiarray.scalar": lambda *args: Record(ForeignClass("numpy scalar"), args)
        for core in ("core", "_core")
    },
    **{f"numpy.{core}.numeric._frombuffer": _array_from_buffer for core in ("core", "_core")},
}
_FUNCTIONS = {name: Function(name, call) for name, call in _CALLS.items()}
