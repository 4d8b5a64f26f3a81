"""Find the state dicts in a checkpoint: flat tables of dotted names and tensors, wherever they are nested.

A container is any mapping that holds tensors directly. Whole pickled modules and haiku's two-level parameters
are flattened into containers, too. Wrappers that training leaves in names (`module.`, `_orig_mod.`, FSDP's)
are removed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from convert.pickles import PickledArray
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


@dataclass(frozen=True)
class Container:
    """A flat table of tensors.

    Attributes:
        path: the keys that lead to it from the top of the file; empty where the file is the table.
        tensors: by name, without wrappers.
        siblings: the names beside this container and above it, which tell the file's origin.
    """

    path: tuple[str, ...]
    tensors: dict[str, StoredTensor]
    siblings: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        """The path in one word."""
        return "/".join(self.path)

    @property
    def bytes(self) -> int:
        """Size of all its tensors, as float32."""
        return 4 * sum(tensor.count for tensor in self.tensors.values())


def find_containers(content: Any) -> list[Container]:
    """All containers of a file, the outermost first.

    Raises:
        ValueError: two names become the same when wrappers are removed.
    """
    return list(_walk(content, (), frozenset(), set()))


def without_wrappers(name: str) -> str:
    """`module.backbone._orig_mod.conv1.weight` -> `backbone.conv1.weight`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def leaf(value: Any) -> StoredTensor | None:
    """The tensor that a value is, if it is one."""
    if isinstance(value, PickledArray):
        return value.tensor
    return value if isinstance(value, StoredTensor) else None


def _walk(value: Any, path: tuple[str, ...], above: frozenset[str], seen: set[int]) -> Iterator[Container]:
    items = _items(value)
    # A pickle may hold the same dictionary many times, or inside itself.
    if not items or len(path) > _DEEPEST or id(value) in seen:
        return
    seen.add(id(value))
    module = _module_tensors(value, 0)
    if module is not None:
        yield _container(path, module, above)
        return
    names = frozenset(str(key) for key, _ in items)
    if haiku := _haiku_tensors(dict(items)):
        yield from (_container((*path, part), tensors, above | names) for part, tensors in haiku.items())
        items = [(key, child) for key, child in items if not re.fullmatch(r".*_(params|state)", str(key))]
    tensors = {str(key): tensor for key, child in items if (tensor := leaf(child)) is not None}
    if tensors:
        yield _container(path, tensors, above | names)
    for key, child in items:
        if isinstance(child, (Mapping, list, tuple)):
            yield from _walk(child, (*path, str(key)), above | names, seen)


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Record):
        return list(value.children())
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    return []


def _container(path: tuple[str, ...], tensors: dict[str, StoredTensor], siblings: frozenset[str]) -> Container:
    plain: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        short = without_wrappers(name)
        if short in plain:
            raise ValueError(f"two tensors are called {short!r} once wrappers such as `module.` are removed")
        plain[short] = tensor
    return Container(path, plain, siblings)


def _module_tensors(value: Any, depth: int) -> dict[str, StoredTensor] | None:
    """The state dict of a module that was pickled whole (`torch.save(model)`), from its attributes."""
    state = value.state if isinstance(value, Record) else None
    if depth > _DEEPEST or not isinstance(state, Mapping) or not {"_modules", "_parameters"} <= state.keys():
        return None
    found: dict[str, StoredTensor] = {}
    for kind in ("_parameters", "_buffers"):
        for name, child in _items(state.get(kind)):
            if (tensor := leaf(child)) is not None:
                found[str(name)] = tensor
    for name, child in _items(state["_modules"]):
        found.update({f"{name}.{inner}": tensor for inner, tensor in (_module_tensors(child, depth + 1) or {}).items()})
    return found


def _haiku_tensors(items: Mapping[Any, Any]) -> dict[str, dict[str, StoredTensor]]:
    """Haiku keeps parameters and statistics in two tables, {module path: {"w": array}}; here they are joined.

    `{"online_params": ..., "online_state": ...}` gives `{"online": {"res_net50/~/initial_conv/w": tensor,
    ...}}`.
    """
    found: dict[str, dict[str, StoredTensor]] = {}
    for key, table in items.items():
        match = re.fullmatch(r"(.*)_(params|state)", str(key))
        if match and isinstance(table, Mapping) and any("/" in str(name) for name in table):
            flat = found.setdefault(match[1], {})
            for module, arrays in _items(table):
                for name, child in _items(arrays):
                    if (tensor := leaf(child)) is not None:
                        flat[f"{module}/{name}"] = tensor
    return found
