"""The runs of numbers that a pickled checkpoint's tensors are views of."""

import struct
from typing import Any

from sdjax.checkpoints.files import AGAIN
from sdjax.checkpoints.pickle_globals import Inert, Storage, StorageType
from sdjax.checkpoints.tensors import Map
from sdjax.errors import InputError


class Store:
    """The storages that a pickle names, each once, however often."""

    def __init__(self) -> None:
        self.found: dict[str, Storage] = {}

    def __call__(self, saved: Any) -> Any:
        """What stands for a persistent id: a storage, or a stand-in for a module's class."""
        if isinstance(saved, tuple) and saved and saved[0] == "module":
            return Inert("a module")
        if not isinstance(saved, tuple) or len(saved) < 5 or saved[0] != "storage":
            raise ValueError("an unknown persistent id")
        kind, key, _, numel = saved[1:5]
        if not isinstance(kind, StorageType) or not isinstance(key, str):
            raise ValueError("a storage of no known type")
        if type(numel) is not int or not 0 <= numel < 2**60:
            raise ValueError("a storage whose size is no size")
        storage = self.found.setdefault(key, Storage(key, kind.dtype, numel))
        if (storage.dtype, storage.numel) != (kind.dtype, numel):
            raise ValueError(f"storage {key[:80]!r} twice, differently")
        part = saved[5] if len(saved) > 5 else None
        if part is None:
            return storage
        # A storage that is itself a window of another one; only torch < 0.4 wrote these.
        return window(storage, *part)


def window(root: Storage, key: Any, offset: Any, numel: Any) -> Storage:
    """A part of a storage, checked to lie inside it."""
    if any(type(n) is not int or n < 0 for n in (offset, numel)):
        raise ValueError("a part of a storage without sizes")
    if offset + numel > root.numel:
        raise ValueError(f"a part of storage {root.key[:80]!r} outside it")
    # Of a window of a window the first storage is the root: chains would be followed by recursion.
    skip = root.skip + offset
    return Storage(root.key, root.dtype, numel, root=root.root or root, skip=skip)


def stored(file: Map, at: int, storage: Storage) -> int:
    """Place a storage whose count of elements stands at `at`; returns where the next one does."""
    head = file.bytes(at, at + 8)
    itemsize = storage.dtype.itemsize if storage.dtype else 1
    stop = at + 8 + storage.numel * itemsize
    if len(head) < 8 or stop > file.size:
        raise InputError(
            f"{file.path} is cut short: storage {storage.key[:80]!r} ends at byte {stop} of "
            f"{file.size}: {AGAIN}"
        )
    (numel,) = struct.unpack("<q", head)
    if numel != storage.numel:
        raise InputError(
            f"{file.path}: storage {storage.key[:80]!r} has {numel} elements, announced as "
            f"{storage.numel}: {AGAIN}"
        )
    storage.start = at + 8
    return stop


def bound(storage: Storage, file: Map) -> None:
    """Check that a storage was found, and lies in the file."""
    if storage.data is None:
        itemsize = storage.dtype.itemsize if storage.dtype else 1
        if storage.begin is None or storage.begin + storage.numel * itemsize > file.size:
            raise InputError(
                f"{file.path} is cut short: storage {storage.key[:80]!r} of {storage.numel} "
                f"elements is not in it: {AGAIN}"
            )
