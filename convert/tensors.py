"""The values that a checkpoint holds once it is read: tensors that are fetched on demand, and inert records.

Nothing here runs a file's code, and nothing that a file describes can be changed afterwards: a tensor's shape, type
and place are fixed when it is made, and numpy compares them with the size of the data again whenever they are read.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

MAX_DIMENSIONS = 32  # numpy's limit before version 2
_LARGEST = 1 << 48  # elements; no file is larger


class UnreadableTensor(ValueError):
    """A tensor is described in a way that cannot be right, or that is not supported."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor in a file: its shape and type now, its values on `read()`.

    Attributes:
        shape: as stored.
        dtype: numpy's name, or `bfloat16`.
        read: returns the values as an array of `shape`; bfloat16 comes as float32. The array may be a read-only view of
            the file.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def permuted(self, *axes: int) -> "StoredTensor":
        """The same tensor with its axes in another order."""
        return replace(
            self, shape=tuple(self.shape[axis] for axis in axes), read=lambda: np.transpose(self.read(), axes)
        )

    def reshaped(self, *shape: int) -> "StoredTensor":
        """The same elements in another shape."""
        return replace(self, shape=shape, read=lambda: self.read().reshape(shape))

    @staticmethod
    def of(array: np.ndarray) -> "StoredTensor":
        """A tensor that is in memory already."""
        return StoredTensor(tuple(array.shape), array.dtype.name, lambda: array)


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A flat run of elements in a file, which several tensors may share.

    Attributes:
        dtype: numpy's name of the element type, or `bfloat16`.
        count: number of elements.
        locate: returns the storage's bytes, at least `size` of them, as a uint8 array.
    """

    dtype: str
    count: int
    locate: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.count * item_size(self.dtype)

    def tensor(self, offset: Any, shape: Any, strides: Any) -> StoredTensor:
        """A strided view of the storage; offset and strides are in elements.

        Raises:
            UnreadableTensor: the arguments are not sizes, or reach beyond the storage.
        """
        shape, strides = sizes(shape), sizes(strides)
        if len(shape) != len(strides) or not is_size(offset):
            raise UnreadableTensor("a tensor without a proper offset, shape and strides")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if 0 not in shape and last >= self.count:
            raise UnreadableTensor(f"a tensor of shape {shape} in a storage of {self.count} elements")
        return StoredTensor(shape, self.dtype, lambda: self._view(offset, shape, strides))

    def _view(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
        if math.prod(shape) > self.count:  # PyTorch saves an expanded tensor so; weights never are
            raise UnreadableTensor(f"a tensor of shape {shape} that repeats the {self.count} elements it has")
        raw = self.locate()
        if raw.size < self.size:
            raise UnreadableTensor("a tensor's data is shorter than its shape")
        size = item_size(self.dtype)
        kind = np.dtype(np.uint16 if self.dtype == "bfloat16" else self.dtype)
        # numpy compares shape and strides with the size of the buffer once more.
        array = np.ndarray(
            shape, kind, buffer=raw[: self.size], offset=offset * size, strides=[step * size for step in strides]
        )
        array.flags.writeable = False
        return widen_bfloat16(array) if self.dtype == "bfloat16" else array


def is_size(value: Any) -> bool:
    """Whether a value from a file is a number of elements."""
    return type(value) is int and 0 <= value < _LARGEST


def sizes(values: Any) -> tuple[int, ...]:
    """A shape, or strides, from a file.

    Raises:
        UnreadableTensor: it is something else.
    """
    if not isinstance(values, (tuple, list)) or len(values) > MAX_DIMENSIONS or not all(map(is_size, values)):
        raise UnreadableTensor("a tensor whose shape is not a few numbers")
    return tuple(values)


def item_size(dtype: str) -> int:
    """Bytes of one element."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Bfloat16 bit patterns (uint16) as float32: bfloat16 is float32 without its lower half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class ForeignClass:
    """Stands for a class that a file names and that is not imported.

    Attributes:
        name: module and name, dotted.
        fields: of a named tuple.
    """

    name: str
    fields: tuple[str, ...] = ()


class Record:
    """Stands for an instance of a class that is not imported: it keeps what the file hands it, and does nothing.

    Records are equal by identity, so that enumerations and paths can be keys.

    Attributes:
        cls: the class that it is an instance of.
        args: arguments of its constructor.
        items: the items set on it as (key, value); elements of a list subclass are keyed by their position.
        state: what the file says of its attributes, if anything.
    """

    __slots__ = ("args", "cls", "items", "state")

    def __init__(self, cls: ForeignClass, args: Sequence[Any] = ()) -> None:
        self.cls = cls
        self.args = args
        self.items: list[tuple[Any, Any]] | None = None  # made when needed: a file may hold millions of records
        self.state: Any = None

    def __repr__(self) -> str:
        return f"<{self.cls.name}>"

    def add(self, key: Any, value: Any) -> None:
        """Keep an item; without a key, an element."""
        if self.items is None:
            self.items = []
        self.items.append((len(self.items) if key is None else key, value))

    def children(self) -> Iterator[tuple[Any, Any]]:
        """Everything inside: items of a dictionary that it was made from, its own, fields, attributes."""
        if len(self.args) == 1 and isinstance(self.args[0], Mapping):
            yield from self.args[0].items()
        yield from self.items or ()
        yield from zip(self.cls.fields, self.args, strict=False)
        state = self.attributes
        if isinstance(state, Mapping):
            yield from state.items()

    @property
    def attributes(self) -> Any:
        """Its attributes; pickle hands over a pair where some of them are in slots."""
        return self.state[1] if isinstance(self.state, tuple) and len(self.state) == 2 else self.state
