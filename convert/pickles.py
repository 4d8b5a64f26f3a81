"""Reading a pickle without running anything that it names.

A pickle is a program for a stack machine. This is such a machine, which builds plain values only: texts, numbers,
lists, tuples, dictionaries, and what `convert.stand_ins` has for the names in the file. Nothing is imported, and no
method of a value is called by the file's choice. What a file can make the machine do is bounded: the number of steps,
the length of names, the size of numbers. Long strings stay in the file, so that arrays in a pickle cost no memory.
"""

import codecs
import pickle
import pickletools
import struct
from collections.abc import Callable
from typing import Any

from convert import stand_ins
from convert.stand_ins import Blob
from convert.tensors import ForeignClass, Record, UnreadableTensor

MAX_STEPS = 1_000_000
_LONGEST_NAME = 1000
_LONG = 4096  # bytes from which on a string is left in the file
_LONGEST_NUMBER = 256  # bytes
_EMPTY_SET = ForeignClass("set")

Handler = Callable[["Unpickler"], None]
_HANDLERS: dict[int, Handler] = {}


class Unpickler:
    """Reads one pickle; see the module's docstring.

    Args:
        data: the bytes that hold it.
        start: where it begins.
        storage: called with a persistent id, (`"storage"`, type, key, location, count, ...), where the pickle refers to
            tensor data outside itself.
        allow_unknown: names outside the allow-list become inert records instead of an error.

    Attributes:
        position: the next byte; after `load`, the first one after the pickle.
    """

    def __init__(
        self,
        data: memoryview,
        start: int = 0,
        storage: Callable[[Any], Any] | None = None,
        allow_unknown: bool = False,
    ) -> None:
        self.data = data
        self.position = start
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self._steps = MAX_STEPS
        self._storage = storage
        self._allow_unknown = allow_unknown
        self._names: dict[tuple[str, str], Any] = {}

    def load(self) -> Any:
        """The object that the pickle describes.

        Raises:
            ForbiddenGlobal: a name outside the allow-list.
            pickle.UnpicklingError and the like: not a pickle, or a damaged one.
        """
        data, end, stop = self.data, len(self.data), pickle.STOP[0]
        handlers = [_HANDLERS.get(code) for code in range(256)]
        while self.position < end:
            code = data[self.position]
            self.position += 1
            handler = handlers[code]
            if handler is None and code != stop:
                raise pickle.UnpicklingError(f"byte {self.position - 1} is no instruction of a pickle")
            try:
                if handler is None:
                    return self.stack.pop()
                handler(self)
            except IndexError as error:
                raise pickle.UnpicklingError("an instruction without the values that it needs") from error
            except KeyError as error:
                raise pickle.UnpicklingError("a reference to a value that is not there") from error
            self._steps -= 1
            if self._steps < 0:
                self.spend(0)
        raise EOFError("the pickle ends early")

    def spend(self, steps: int) -> None:
        """Account for work.

        Raises:
            pickle.UnpicklingError: it is more than any file of weights needs.
        """
        self._steps -= steps
        if self._steps < 0:
            raise pickle.UnpicklingError(
                f"it holds more than {MAX_STEPS} values beside its tensors; save the state dict alone"
            )

    def take(self, count: int) -> memoryview:
        """The next bytes."""
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            raise EOFError("the pickle ends within a value")
        self.position += count
        return taken

    def number(self, layout: str) -> int:
        """The next bytes as one number."""
        return int(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])

    def line(self, limit: int) -> bytes:
        """The bytes up to the next end of a line."""
        window = _LONGEST_NUMBER
        while (found := bytes(self.data[self.position : self.position + window]).find(b"\n")) < 0:
            if window > min(limit, len(self.data) - self.position):
                raise pickle.UnpicklingError(f"a line without an end, or of more than {limit} bytes")
            window *= 4
        return bytes(self.take(found + 1))[:-1]

    def name(self) -> str:
        """A line that is a name."""
        return self.line(_LONGEST_NAME).decode("utf-8")

    def pop_mark(self) -> list[Any]:
        """The values since the last mark."""
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def find(self, module: Any, name: Any) -> Any:
        """What a name stands for."""
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _LONGEST_NAME:
            raise pickle.UnpicklingError("a class whose name is not a short text")
        if (module, name) not in self._names:
            self._names[module, name] = stand_ins.find(module, name, self._allow_unknown)
        return self._names[module, name]

    def call(self, what: Any, args: Any) -> Any:
        """Call what a name stands for; arguments that may be copied count as work."""
        if isinstance(what, stand_ins.Function) and isinstance(args, tuple):
            self.spend(sum(len(arg) // (64 if isinstance(arg, str) else 1) for arg in args if isinstance(arg, _SIZED)))
        return stand_ins.apply(what, args)

    def refer(self, pid: Any) -> Any:
        """Tensor data that lies outside the pickle."""
        if self._storage is None:
            raise UnreadableTensor("it refers to data outside itself")
        return self._storage(pid)


_SIZED = (str, list, tuple, dict)


def _on(*names: str) -> Callable[[Handler], Handler]:
    """Register the handler of instructions, by their names in `pickletools`."""

    def register(handler: Handler) -> Handler:
        for name in names:
            _HANDLERS[_CODES[name]] = handler
        return handler

    return register


_CODES = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}


def _push(name: str, make: Callable[[Unpickler], Any]) -> None:
    """Register an instruction that pushes one value."""

    def handle(machine: Unpickler) -> None:
        value = make(machine)  # first: it may replace the stack
        machine.stack.append(value)

    _HANDLERS[_CODES[name]] = handle


def _string(layout: str, text: bool) -> Callable[[Unpickler], Any]:
    """A string with its length before it; strings of Python 2, too, are text to us (Latin-1)."""

    def read(machine: Unpickler) -> Any:
        view = machine.take(machine.number(layout))
        if len(view) >= _LONG:
            return Blob(view, text)
        return bytes(view).decode("utf-8", "surrogatepass") if text else bytes(view)

    return read


def _old_string(layout: str) -> Callable[[Unpickler], Any]:
    read = _string(layout, False)

    def decode(machine: Unpickler) -> Any:
        value = read(machine)
        return value.decode("latin-1") if isinstance(value, bytes) else value

    return decode


def _quoted(machine: Unpickler) -> str:
    """Python 2's `'...'` with escapes; such a line may hold an array."""
    text = machine.line(len(machine.data)).strip()
    if len(text) < 2 or text[:1] not in (b"'", b'"') or text[:1] != text[-1:]:
        raise pickle.UnpicklingError("a string without quotes")
    return str(codecs.escape_decode(text[1:-1])[0].decode("latin-1"))


def _integer(machine: Unpickler) -> int:
    text = machine.line(_LONGEST_NUMBER)
    return text == b"01" if text in (b"00", b"01") else int(text.rstrip(b"L"))


def _long(layout: str) -> Callable[[Unpickler], int]:
    def read(machine: Unpickler) -> int:
        size = machine.number(layout)
        if not 0 <= size <= _LONGEST_NUMBER:
            raise pickle.UnpicklingError(f"a number of {size} bytes")
        return int.from_bytes(machine.take(size), "little", signed=True)

    return read


def _top(machine: Unpickler) -> Any:
    return machine.stack[-1]


for _name, _value in {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}.items():
    _push(_name, lambda machine, value=_value: value)  # type: ignore[misc]
for _name, _layout in {"BININT": "<i", "BININT1": "<B", "BININT2": "<H"}.items():
    _push(_name, lambda machine, layout=_layout: machine.number(layout))  # type: ignore[misc]
for _name, _layout in {"BINUNICODE": "<I", "SHORT_BINUNICODE": "<B", "BINUNICODE8": "<Q"}.items():
    _push(_name, _string(_layout, True))
for _name, _layout in {"BINBYTES": "<I", "SHORT_BINBYTES": "<B", "BINBYTES8": "<Q", "BYTEARRAY8": "<Q"}.items():
    _push(_name, _string(_layout, False))
_push("BINSTRING", _old_string("<I"))
_push("SHORT_BINSTRING", _old_string("<B"))
_push("STRING", _quoted)
_push("UNICODE", lambda machine: machine.line(len(machine.data)).decode("raw-unicode-escape"))
_push("INT", _integer)
_push("LONG", _integer)
_push("LONG1", _long("<B"))
_push("LONG4", _long("<i"))
_push("FLOAT", lambda machine: float(machine.line(_LONGEST_NUMBER)))
_push("BINFLOAT", lambda machine: struct.unpack(">d", machine.take(8))[0])
_push("EMPTY_LIST", lambda machine: [])
_push("EMPTY_DICT", lambda machine: {})
_push("EMPTY_SET", lambda machine: Record(_EMPTY_SET))
_push("LIST", Unpickler.pop_mark)
_push("TUPLE", lambda machine: tuple(machine.pop_mark()))
_push("TUPLE1", lambda machine: (machine.stack.pop(),))
_push("FROZENSET", lambda machine: Record(_EMPTY_SET, tuple(machine.pop_mark())))
_push("GET", lambda machine: machine.memo[int(machine.line(_LONGEST_NUMBER))])
_push("BINGET", lambda machine: machine.memo[machine.number("<B")])
_push("LONG_BINGET", lambda machine: machine.memo[machine.number("<I")])
_push("DUP", _top)
_push("GLOBAL", lambda machine: machine.find(machine.name(), machine.name()))
_push("PERSID", lambda machine: machine.refer(machine.name()))
_push("BINPERSID", lambda machine: machine.refer(machine.stack.pop()))


@_on("PROTO")
def _protocol(machine: Unpickler) -> None:
    if machine.number("<B") > pickle.HIGHEST_PROTOCOL:
        raise pickle.UnpicklingError("a pickle of an unknown protocol")


@_on("FRAME")
def _frame(machine: Unpickler) -> None:
    machine.number("<Q")  # how much to read ahead; the file is mapped


@_on("MARK")
def _mark(machine: Unpickler) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


@_on("POP")
def _pop(machine: Unpickler) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


@_on("POP_MARK")
def _drop(machine: Unpickler) -> None:
    machine.pop_mark()


@_on("TUPLE2", "TUPLE3")
def _short_tuple(machine: Unpickler) -> None:
    count = machine.data[machine.position - 1] - _CODES["TUPLE1"] + 1
    if len(machine.stack) < count:
        raise IndexError("a tuple of values that are not there")
    machine.stack[-count:] = [tuple(machine.stack[-count:])]


@_on("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
def _remember(machine: Unpickler) -> None:
    code = machine.data[machine.position - 1]
    if code == _CODES["PUT"]:
        place = int(machine.line(_LONGEST_NUMBER))
    elif code == _CODES["MEMOIZE"]:
        place = len(machine.memo)
    else:
        place = machine.number("<B" if code == _CODES["BINPUT"] else "<I")
    machine.memo[place] = machine.stack[-1]


@_on("STACK_GLOBAL")
def _global(machine: Unpickler) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.find(module, name))


def _add_elements(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, Record):
        for item in items:
            target.add(None, item)
    else:
        raise UnreadableTensor("elements for something that is no list")


def _add_items(target: Any, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(target, dict):
            target[stand_ins.plain_key(key)] = value
        elif isinstance(target, Record):
            target.add(key, value)
        else:
            raise UnreadableTensor("items for something that is no dictionary")


@_on("APPEND")
def _append(machine: Unpickler) -> None:
    item = machine.stack.pop()
    _add_elements(machine.stack[-1], [item])


@_on("APPENDS", "ADDITEMS")
def _append_all(machine: Unpickler) -> None:
    items = machine.pop_mark()
    _add_elements(machine.stack[-1], items)


@_on("SETITEM")
def _set_item(machine: Unpickler) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _add_items(machine.stack[-1], [key, value])


@_on("SETITEMS")
def _set_items(machine: Unpickler) -> None:
    items = machine.pop_mark()
    _add_items(machine.stack[-1], items)


@_on("DICT")
def _dictionary(machine: Unpickler) -> None:
    items = machine.pop_mark()
    machine.stack.append({})
    _add_items(machine.stack[-1], items)


@_on("REDUCE", "NEWOBJ")
def _reduce(machine: Unpickler) -> None:
    args, what = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.call(what, args))


@_on("NEWOBJ_EX")
def _new_object(machine: Unpickler) -> None:
    machine.stack.pop()  # keyword arguments: nothing of ours takes any
    _reduce(machine)


@_on("INST")
def _instance(machine: Unpickler) -> None:
    what = machine.find(machine.name(), machine.name())
    args = machine.pop_mark()
    machine.stack.append(machine.call(what, tuple(args)))


@_on("OBJ")
def _object(machine: Unpickler) -> None:
    what, *args = machine.pop_mark()
    machine.stack.append(machine.call(what, tuple(args)))


@_on("BUILD")
def _build(machine: Unpickler) -> None:
    state = machine.stack.pop()
    stand_ins.complete(machine.stack[-1], state)
