"""Unpickling without running anything that a file names.

A pickle is a program: each global in it is imported and called. Here every global resolves to something of
ours. The few that carry tensors (PyTorch's rebuild functions and storages, numpy's arrays) resolve to readers
with checked arguments. Classes that training code puts beside its weights, such as `argparse.Namespace`,
resolve to inert `Record`s. Any other name stops the reading, unless the caller trusts the file; then it, too,
becomes a `Record`, so that nothing of it is imported or run in any case.

The allow-list is in `_TENSORS` and `_INERT`.
"""

import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np

from convert.tensors import Record, StoredTensor, record_class

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

# Inert: modules whose classes are settings, logs, optimizer state or network structure. A name that ends with
# a dot covers the modules below it.
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
    *("dict", "list", "tuple", "slice", "range", "Exception"),
}
_BYOL_STATE = ("online_params", "target_params", "online_state", "target_state", "opt_state")


class ForbiddenGlobal(pickle.UnpicklingError):
    """The pickle names something outside the allow-list."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class UnreadableTensor(pickle.UnpicklingError):
    """A tensor is described in a way that cannot be right, or that is not supported here."""


class Storage:
    """A flat run of elements in a file, which several tensors may share.

    Attributes:
        dtype: numpy's name of the element type, or `bfloat16`.
        count: number of elements.
        locate: returns the storage's bytes as a uint8 array; set by the reader of the surrounding format.
    """

    def __init__(self, dtype: str, count: int) -> None:
        self.dtype = dtype
        self.count = count
        self.locate: Callable[[], np.ndarray] | None = None

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.count * item_size(self.dtype)

    def elements(self) -> np.ndarray:
        """The elements, flat; bfloat16 as float32."""
        if self.locate is None:
            raise UnreadableTensor("a tensor's data is missing")
        raw = self.locate()[: self.size]
        if raw.size < self.size:
            raise UnreadableTensor("a tensor's data is shorter than its shape")
        if self.dtype == "bfloat16":
            return widen_bfloat16(raw.view(np.uint16))
        return raw.view(self.dtype)


def item_size(dtype: str) -> int:
    """Bytes of one element."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Bfloat16 bit patterns (uint16) as float32: bfloat16 is float32 without its lower half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class StorageType:
    """The type of a PyTorch storage, as far as a pickle says it."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


class PickledArray:
    """A numpy array under construction: pickle makes it empty, then hands over its contents."""

    def __init__(self, *_: Any) -> None:
        self.tensor: StoredTensor | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, ArrayType) or dtype.name is None or isinstance(raw, list):
            return  # an array of strings or objects: not a tensor, and of no use here
        data = raw.encode("latin1") if isinstance(raw, str) else raw  # str: pickled by Python 2
        flat = np.frombuffer(data, dtype.name)
        self.tensor = StoredTensor.of(flat.reshape(shape, order="F" if fortran else "C"))


class ArrayType:
    """A numpy dtype, as far as it is a plain number in this machine's byte order or its opposite."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.name: str | None = None
        if isinstance(code, str) and re.fullmatch(r"[<>|=]?[fiub]\d{1,2}", code):
            self.name = code.lstrip("<>|=")

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
        if self.name is not None and order in ("<", ">"):
            self.name = order + self.name

    def __hash__(self) -> int:
        return id(self)


def _array_from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any = "C") -> PickledArray:
    """Numpy's arrays in pickles of protocol 5."""
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", bytes(buffer)))
    return array


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    """PyTorch's `_rebuild_tensor_v2`: a strided view of a storage. Sizes are in elements."""
    if not isinstance(storage, Storage):
        raise UnreadableTensor("a tensor without a storage")
    shape, strides = tuple(shape), tuple(strides)
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise UnreadableTensor(f"a tensor of shape {shape}, strides {strides} and offset {offset}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.count:
        raise UnreadableTensor(f"a tensor of shape {shape} in a storage of {storage.count} elements")

    def read() -> np.ndarray:
        flat = storage.elements()[offset:]
        steps = tuple(stride * flat.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)

    return StoredTensor(shape, storage.dtype, read)


def _first(value: Any, *_: Any) -> Any:
    return value


class Table(dict[Any, Any]):
    """An ordered dictionary; the attributes that PyTorch hangs on it (`_metadata`) are left out."""

    def __setstate__(self, state: Any) -> None:
        """Nothing."""


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    """Bytes, as protocol 2 writes them."""
    return text.encode("latin1")


def _named_tuple(name: str, fields: Sequence[str], *_: Any) -> type[Record]:
    """The way of dill to pickle a named tuple's class."""
    return record_class(str(name), tuple(str(field) for field in fields))


def _reconstructed(cls: Any, *_: Any) -> Any:
    """Instances in protocols 0 and 1."""
    return cls() if isinstance(cls, type) and issubclass(cls, Record) else Record()


_TENSORS: dict[str, Any] = {
    "collections.OrderedDict": Table,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": lambda build, cls, args, state: build(*args),
    "torch.Size": lambda *sizes: tuple(*sizes),
    "_codecs.encode": _encoded,
    "copyreg._reconstructor": _reconstructed,
    "copy_reg._reconstructor": _reconstructed,
    "numpy.ndarray": PickledArray,
    "numpy.dtype": ArrayType,
    "dill._dill._create_namedtuple": _named_tuple,
    "dill.dill._create_namedtuple": _named_tuple,
    "builtins.set": lambda *items: Record(),
    "builtins.frozenset": lambda *items: Record(),
    "builtins.bytearray": lambda *items: bytes(*(item for item in items if isinstance(item, (bytes, list)))),
    **{f"numpy.{core}.multiarray._reconstruct": PickledArray for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": record_class("numpy scalar") for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array_from_buffer for core in ("core", "_core")},
    **{f"torch.{name}": StorageType(dtype) for name, dtype in ITEM_TYPES.items()},
    **{f"torch.storage.{name}": StorageType(dtype) for name, dtype in ITEM_TYPES.items()},
}
_PLAIN_TORCH = re.compile(
    r"torch\.(device|Generator|(torch\.)?(b?float\d*\w*|double|half|u?int\d*|long|short|bool|uint8|complex\d*)"
    r"|memory_format|contiguous_format|channels_last|strided|serialization\._get_layout)"
)


class RestrictedUnpickler(pickle.Unpickler):
    """Reads one pickle; see the module's docstring for what it accepts.

    Args:
        file: at the pickle's first byte.
        storage: called with a persistent id, (`"storage"`, type, key, location, count, ...), when the pickle
            refers to tensor data outside itself.
        trust: names outside the allow-list become inert records instead of an error.

    Raises:
        ForbiddenGlobal: a name outside the allow-list.
        pickle.UnpicklingError and the like: not a pickle, or a damaged one.
    """

    def __init__(self, file: BinaryIO, storage: Callable[[Any], Any] | None = None, trust: bool = False) -> None:
        super().__init__(file, encoding="latin1")  # as Detectron2 does, for pickles of Python 2
        self._storage = storage
        self._trust = trust
        self._classes: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Our own stand-in for a name, never the thing itself."""
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full in _TENSORS:
            return _TENSORS[full]
        known = _INERT.fullmatch(module) or _PLAIN_TORCH.fullmatch(full) or full.endswith("._ByolExperimentState")
        plain = module in ("builtins", "__builtin__") and name in _INERT_BUILTINS
        if not (known or plain or self._trust):
            raise ForbiddenGlobal(full)
        fields = _BYOL_STATE if name == "_ByolExperimentState" else ()
        return self._classes.setdefault(full, record_class(full, fields))

    def persistent_load(self, pid: Any) -> Any:
        """Tensor data that lies outside the pickle."""
        if self._storage is None:
            raise UnreadableTensor("it refers to data outside itself")
        return self._storage(pid)
