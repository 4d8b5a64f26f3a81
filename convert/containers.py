"""Find the state dicts in a checkpoint: flat tables of dotted names and tensors, at any depth.

A container is a mapping that holds tensors directly. Modules that were pickled whole and haiku's two-level parameters
are flattened into containers as well. What wrappers add to names (`module.`, `_orig_mod.`, FSDP's) is removed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any

from convert.pickles import MAX_STEPS
from convert.reader import leaf
from convert.tensors import Record, StoredTensor

WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_fpw_module",
    "_forward_module",
}
_DEEPEST = 12
_MOST_TENSORS = 100_000
_LONGEST_NAME = 300
_HAIKU_TABLE = re.compile(r"(.*)_(params|state)")


Names = tuple[tuple[str, ...], ...]  # of each level


@dataclass(frozen=True)
class Container:
    """A flat table of tensors.

    Attributes:
        path: the keys that lead to it from the top of the file; empty if the file itself is the table.
        tensors: by name, without wrappers.
        above: the names beside this container and above it, one tuple for each level; they tell the file's origin.
    """

    path: tuple[str, ...]
    tensors: dict[str, StoredTensor]
    above: Names = ()

    @property
    def label(self) -> str:
        """The path as one string."""
        return "/".join(self.path)

    @property
    def bytes(self) -> int:
        """Size of all its tensors, as float32."""
        return 4 * sum(tensor.count for tensor in self.tensors.values())

    @cached_property
    def surroundings(self) -> str:
        """All names in it, beside it and above it, one a line."""
        return "\n".join([*self.tensors, *chain.from_iterable(self.above)])


def find_containers(content: Any) -> list[Container]:
    """All containers of a file, the outermost first.

    Raises:
        ValueError: two names become the same when wrappers are removed, or there are far too many tensors.
    """
    return list(_Walk().containers(content, (), ()))


def without_wrappers(name: str) -> str:
    """`module.backbone._orig_mod.conv1.weight` -> `backbone.conv1.weight`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class _Walk:
    """A walk through a file's content, in which a value may be in many places, or inside itself."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._tensors = _MOST_TENSORS
        self._items = MAX_STEPS

    def containers(self, value: Any, path: tuple[str, ...], above: Names) -> Iterator[Container]:
        """The containers in a value and below it."""
        if len(path) > _DEEPEST or id(value) in self._seen:
            return
        self._seen.add(id(value))
        items = self._inside(value)
        module = self._module_tensors(value, 0)
        if module is not None:
            yield _container(path, module, above)
            return
        names = () if isinstance(value, (list, tuple)) else tuple(str(key)[:_LONGEST_NAME] for key, _ in items)
        if haiku := self._haiku_tensors(items):
            yield from (_container((*path, part), tensors, (*above, names)) for part, tensors in haiku.items())
            items = [(key, child) for key, child in items if not _HAIKU_TABLE.fullmatch(str(key))]
        tensors = {str(key): tensor for key, child in items if (tensor := leaf(child)) is not None}
        if tensors:
            self._count(len(tensors))
            yield _container(path, tensors, (*above, names))
        for key, child in items:
            if isinstance(child, (Record, Mapping, list, tuple)):
                yield from self.containers(child, (*path, str(key)), (*above, names))

    def _inside(self, value: Any) -> list[tuple[Any, Any]]:
        """What a value holds, with its keys; two records may be made from one dictionary."""
        if isinstance(value, Record):
            items = list(islice(value.children(), self._items + 1))
        elif isinstance(value, Mapping):
            items = list(value.items())
        else:
            items = list(enumerate(value)) if isinstance(value, (list, tuple)) else []
        self._items -= len(items)
        if self._items < 0:
            raise ValueError("some of what it holds is in too many places")
        return items

    def _count(self, tensors: int) -> None:
        self._tensors -= tensors
        if self._tensors < 0:
            raise ValueError(f"it holds more than {_MOST_TENSORS} tensors, or some of them under many names")

    def _module_tensors(self, value: Any, depth: int) -> dict[str, StoredTensor] | None:
        """The state dict of a module that was pickled whole (`torch.save(model)`), from its attributes."""
        state = value.attributes if isinstance(value, Record) else None
        if depth > _DEEPEST or not isinstance(state, Mapping) or not {"_modules", "_parameters"} <= state.keys():
            return None
        self._count(1)
        found: dict[str, StoredTensor] = {}
        for kind in ("_parameters", "_buffers"):
            for name, child in self._inside(state.get(kind)):
                if (tensor := leaf(child)) is not None:
                    found[str(name)] = tensor
        self._count(len(found))
        for name, child in self._inside(state["_modules"]):
            inner = self._module_tensors(child, depth + 1) or {}
            self._count(len(inner))
            found.update({f"{name}.{part}": tensor for part, tensor in inner.items()})
        return found

    def _haiku_tensors(self, items: Sequence[tuple[Any, Any]]) -> dict[str, dict[str, StoredTensor]]:
        """Haiku keeps parameters and statistics in two tables, {module path: {"w": array}}; here they are joined.

        `{"online_params": ..., "online_state": ...}` gives `{"online": {"res_net50/~/initial_conv/w": tensor, ...}}`.
        """
        found: dict[str, dict[str, StoredTensor]] = {}
        for key, table in items:
            match = _HAIKU_TABLE.fullmatch(str(key))
            modules = self._inside(table) if match and isinstance(table, (Record, Mapping)) else []
            if not match or not any("/" in str(name) for name, _ in modules):
                continue
            flat = found.setdefault(match[1], {})
            for module, arrays in modules:
                if isinstance(arrays, (Record, Mapping)):
                    parts = self._inside(arrays)
                    self._count(len(parts))
                    flat.update(
                        {f"{module}/{name}": tensor for name, child in parts if (tensor := leaf(child)) is not None}
                    )
        return found


def _container(
    path: tuple[str, ...], tensors: dict[str, StoredTensor], above: tuple[tuple[str, ...], ...]
) -> Container:
    plain: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        short = without_wrappers(name)
        if len(name) > _LONGEST_NAME:
            raise ValueError(f"a tensor whose name has {len(name)} characters")
        if short in plain:
            raise ValueError(f"two tensors are called {short!r} once wrappers such as `module.` are removed")
        plain[short] = tensor
    return Container(path, plain, above)
