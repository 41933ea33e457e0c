"""A pickle machine that can build tensors and containers and nothing else.

Python's own unpickler imports and calls whatever a file asks for. This one never imports, calls no
object of the file's choosing and sets no attribute: a global is looked up in a fixed table, that of
`pickle_globals`. Opcodes: PEP 3154 and the standard library's `pickletools`.
"""

import io
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdjax.checkpoints.pickle_globals import ARGUMENTS, Function, Inert, insert, look_up
from sdjax.checkpoints.tensors import Map
from sdjax.errors import InputError

BYTES = 64 * 2**20
"""The longest pickle that is read; a training checkpoint's, weights apart, takes 3 MB."""

WORK = 1_000_000
"""Opcodes executed, and elements copied by calls, before a pickle is refused."""

DAMAGE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
"""What the machine's steps raise for objects that cannot be built."""


def window(file: Map, start: int, stop: int, size: int = BYTES) -> io.BytesIO:
    """The bytes of a file from `start`, at most `size` of them and none from `stop` on."""
    return io.BytesIO(file.bytes(start, min(start + size, stop)))


def load(source: io.BytesIO, path: Path, persistent: Callable[[Any], Any]) -> Any:
    """Build what one pickle describes, reading `source` up to its end.

    Args:
        source: where; stands behind the pickle afterwards.
        path: the file, for errors.
        persistent: makes an object of a persistent id.

    Raises:
        InputError: a global that is refused, a pickle that is damaged or too large.
    """
    try:
        return _Machine(path, persistent).run(source)
    except InputError:
        raise
    except DAMAGE as error:
        text = str(error).split("\n")[0][:120]
        raise InputError(
            f"{path}: the pickle cannot be read ({text}): download it again, or get the weights "
            "as safetensors"
        ) from None


class _Mark:
    pass


class _Machine:
    def __init__(self, path: Path, persistent: Callable[[Any], Any]):
        self.path, self.persistent = path, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.work = 0

    def run(self, source: io.BytesIO) -> Any:
        push = self.stack.append
        for code, argument, _ in pickletools.genops(source):
            name = code.name
            self.work += 1
            if self.work > WORK:
                raise ValueError("it is too large for a checkpoint's")
            if name in _VALUES:
                push(argument)
            elif name in _CONSTANTS:
                push(_CONSTANTS[name])
            elif name == "STOP":
                return self.stack.pop()
            elif name == "REDUCE":
                arguments = self.stack.pop()
                push(self.call(self.stack.pop(), arguments))
            else:
                getattr(self, f"op_{name.lower()}")(argument)
        raise ValueError("it has no end")

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise ValueError("a call without arguments")
        if isinstance(function, Function):
            if len(arguments) > ARGUMENTS:
                raise ValueError(f"a call with {len(arguments)} arguments")
            if function.flat and arguments:
                self.work += len(arguments[0])
            return function.call(*arguments)
        if not isinstance(function, Inert):
            raise ValueError(f"a call of a {type(function).__name__}")
        if function.name == "collections.defaultdict":
            return {}
        return function if function.name.endswith(")") else Inert(f"{function.name}(...)")

    def marked(self) -> list[Any]:
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _Mark:
                items = self.stack[at + 1 :]
                del self.stack[at:]
                return items
        raise ValueError("a mark is missing")

    def top(self) -> Any:
        if self.stack[-1] is _Mark:
            raise ValueError("a mark stands where an object belongs")
        return self.stack[-1]

    def op_proto(self, version: int) -> None:
        if version > 5:
            raise ValueError(f"protocol {version}")

    def op_frame(self, size: int) -> None:
        pass

    def op_mark(self, _: Any) -> None:
        self.stack.append(_Mark)

    def op_pop(self, _: Any) -> None:
        self.stack.pop()

    def op_pop_mark(self, _: Any) -> None:
        self.marked()

    def op_dup(self, _: Any) -> None:
        self.stack.append(self.top())

    def op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.top()

    def op_put(self, index: Any) -> None:
        self.memo[int(index)] = self.top()

    op_binput = op_long_binput = op_put

    def op_get(self, index: Any) -> None:
        self.stack.append(self.memo[int(index)])

    op_binget = op_long_binget = op_get

    def op_empty_list(self, _: Any) -> None:
        self.stack.append([])

    # Sets are kept as lists: nothing that the file made is hashed but plain keys.
    op_empty_set = op_empty_list

    def op_empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def op_list(self, _: Any) -> None:
        self.stack.append(self.marked())

    def op_tuple(self, _: Any) -> None:
        self.stack.append((*self.marked(),))

    op_frozenset = op_tuple

    def op_tuple1(self, _: Any) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def op_tuple2(self, _: Any) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def op_tuple3(self, _: Any) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def op_dict(self, _: Any) -> None:
        items = self.marked()
        built: dict = {}
        for key, value in zip(items[::2], items[1::2], strict=True):
            insert(built, key, value)
        self.stack.append(built)

    def extend(self, items: Any) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise ValueError(f"items for a {type(target).__name__}")

    def op_append(self, _: Any) -> None:
        item = self.stack.pop()
        self.extend([item])

    def op_appends(self, _: Any) -> None:
        self.extend(self.marked())

    op_additems = op_appends

    def assign(self, items: Any) -> None:
        target = self.top()
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                insert(target, key, value)
        elif not isinstance(target, Inert):
            raise ValueError(f"keys for a {type(target).__name__}")

    def op_setitem(self, _: Any) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self.assign([key, value])

    def op_setitems(self, _: Any) -> None:
        self.assign(self.marked())

    def op_build(self, _: Any) -> None:
        # State is dropped: attributes of a dictionary (`_metadata`) say nothing of its weights.
        self.stack.pop()
        self.top()

    def op_global(self, names: str) -> None:
        module, _, name = names.partition(" ")
        self.stack.append(look_up(module, name, self.path))

    def op_stack_global(self, _: Any) -> None:
        name = self.stack.pop()
        module = self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global without a name")
        self.stack.append(look_up(module, name, self.path))

    def op_newobj(self, _: Any) -> None:
        arguments = self.stack.pop()
        self.stack.append(self.call(self.stack.pop(), arguments))

    def op_newobj_ex(self, _: Any) -> None:
        self.stack.pop()
        self.op_newobj(None)

    def op_obj(self, _: Any) -> None:
        made, *arguments = self.marked()
        self.stack.append(self.call(made, (*arguments,)))

    def op_inst(self, names: str) -> None:
        arguments = (*self.marked(),)
        self.op_global(names)
        self.stack.append(self.call(self.stack.pop(), arguments))

    def op_persid(self, name: str) -> None:
        self.stack.append(self.persistent(name))

    def op_binpersid(self, _: Any) -> None:
        self.stack.append(self.persistent(self.stack.pop()))

    def op_refuse(self, _: Any) -> None:
        raise ValueError("an extension or a buffer outside the file")

    op_ext1 = op_ext2 = op_ext4 = op_next_buffer = op_readonly_buffer = op_refuse


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8".split()
)
