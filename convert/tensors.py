"""What a checkpoint is made of, once read: tensors that know their shape and are fetched when wanted, and
inert records.

Nothing here runs a file's code: a class that a file names becomes a `Record`, which only remembers what it
was given.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape and type now, its values on `read()`.

    Attributes:
        shape: as stored.
        dtype: numpy's name, or `bfloat16`.
        read: returns the values as an array of `shape`; bfloat16 comes as float32. The array may be a
            read-only view of the file.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

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


class Record(dict[Any, Any]):
    """Stands for an instance of a class that a file names and that is not imported: it keeps what pickle
    hands it.

    Items set on it are its own items, constructor arguments are in `args`, instance state in `state`. It is
    hashable by identity, because enumerations and paths serve as keys, and callable, because factories are
    pickled as calls.
    """

    kind = "record"
    fields: tuple[str, ...] = ()
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> "Record":
        """Remember the arguments; those of a dictionary's copy become items."""
        record = super().__new__(cls)
        record.args = args
        record.state = None
        if len(args) == 1 and isinstance(args[0], Mapping):
            dict.update(record, args[0])
        return record

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: pickle creates instances with and without calling this, so `__new__` does the work."""

    def __call__(self, *args: Any, **kwargs: Any) -> "Record":
        """What a pickled factory makes is another record."""
        return Record(*args)

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, value: Any) -> None:
        """Keep an element of a list subclass."""
        self[len(self)] = value

    def extend(self, values: Any) -> None:
        """Keep the elements of a list subclass."""
        for value in values:
            self.append(value)

    def children(self) -> Iterator[tuple[Any, Any]]:
        """Everything inside: items, fields of a named tuple, attributes."""
        yield from self.items()
        yield from zip(self.fields, self.args, strict=False)
        state = self.state[1] if isinstance(self.state, tuple) and len(self.state) == 2 else self.state
        if isinstance(state, Mapping):
            yield from state.items()


def record_class(kind: str, fields: tuple[str, ...] = ()) -> type[Record]:
    """A class of records that stands for the class named `kind` (module and name, dotted)."""
    return type("Record", (Record,), {"kind": kind, "fields": fields})
