"""The tar in which torch before 0.1.10 saved: members `storages`, `tensors` and `pickle`.

`storages` and `tensors` begin with a pickled count; then, for each, a pickled name and its binary
description. `pickle` is the object, where a tensor's persistent id is its name.
"""

import io
import struct
import tarfile
from pathlib import Path
from typing import Any

from sdjax.checkpoints import unpickle
from sdjax.checkpoints.files import AGAIN
from sdjax.checkpoints.pickle_globals import Inert, Storage, StorageType, View, view
from sdjax.checkpoints.storages import stored, window
from sdjax.checkpoints.tensors import Map
from sdjax.errors import InputError

ENTRY = 2**16
"""The longest pickle between two storages; torch's have 60 bytes. The last lists all windows."""


def begins(file: Map) -> bool:
    """Whether a file begins as such a tar does; some have no magic number."""
    try:
        info = tarfile.TarInfo.frombuf(file.bytes(0, 512), "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return info.name in ("storages", "tensors", "pickle")


def read(file: Map) -> tuple[Any, list[Storage]]:
    """The tar container: members `storages`, `tensors` and `pickle`."""
    path = file.path
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for _ in range(16):
                info = archive.next()
                if info is None:
                    break
                if info.isreg() and not info.issparse():
                    stop = info.offset_data + info.size
                    members[info.name.removeprefix("./")] = (info.offset_data, stop)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is cut short or damaged ({str(error)[:80]}): {AGAIN}") from None
    for name in ("storages", "tensors", "pickle"):
        if name not in members or not 0 <= members[name][0] <= members[name][1] <= file.size:
            raise InputError(f"{path} is a tar archive without a torch checkpoint in it: {AGAIN}")

    def refuse(saved: Any) -> Any:
        raise ValueError("a persistent id where none belongs")

    at, stop = members["storages"]

    def following(size: int = ENTRY) -> Any:
        nonlocal at
        source = unpickle.window(file, at, stop, size)
        loaded = unpickle.load(source, path, refuse)
        at += source.tell()
        return loaded

    storages: dict[Any, Storage] = {}
    for _ in range(counted(following(), path)):
        key, _, kind = fields(following(), path)
        name = named(key, path)
        if not isinstance(kind, StorageType) or kind.dtype is None:
            raise InputError(f"{path}: a storage is of no known type: {AGAIN}")
        head = file.bytes(at, at + 8)
        numel = struct.unpack("<q", head)[0] if len(head) == 8 else -1
        if not 0 <= numel < 2**60:
            raise InputError(f"{path}: storage {name[:80]!r} is damaged: {AGAIN}")
        storages[name] = Storage(name, kind.dtype, numel)
        at = stored(file, at, storages[name])
    views = following(unpickle.BYTES)
    for entry in views if isinstance(views, list) else ():
        target, root, offset, numel = fields(entry, path, 4)
        whole = storages.get(named(root, path))
        if whole is None:
            raise InputError(f"{path}: a storage is part of one that is not there: {AGAIN}")
        try:
            storages[named(target, path)] = window(whole, None, offset, numel)
        except ValueError as error:
            raise InputError(f"{path}: {error}: {AGAIN}") from None
    source = unpickle.window(file, *members["tensors"])
    tensors: dict[str, View] = {}
    for _ in range(counted(unpickle.load(source, path, refuse), path)):
        key, storage, _ = fields(unpickle.load(source, path, refuse), path)
        name, found = named(key, path), storages.get(named(storage, path))
        if found is None:
            raise InputError(f"{path}: tensor {name[:80]!r} has no storage: {AGAIN}")
        tensors[name] = tar_view(source, found, name, path)

    def persistent(saved: Any) -> Any:
        if isinstance(saved, tuple):
            return Inert("a module")
        return tensors[named(saved, path)]

    root = unpickle.load(unpickle.window(file, *members["pickle"]), path, persistent)
    return root, list(storages.values())


def tar_view(source: io.BytesIO, storage: Storage, key: str, path: Path) -> View:
    """The binary description of one tensor in a tar: rank, sizes, strides, offset."""
    try:
        (rank,) = struct.unpack("<i", source.read(4))
        if not 0 <= rank <= 32:
            raise ValueError(f"{rank} axes")
        source.read(4)
        numbers = struct.unpack(f"<{2 * rank + 1}q", source.read(16 * rank + 8))
        return view(storage, storage.dtype, numbers[-1], numbers[:rank], numbers[rank : 2 * rank])
    except (ValueError, struct.error) as error:
        raise InputError(f"{path}: tensor {key[:80]!r} is damaged ({error}): {AGAIN}") from None


def named(key: Any, path: Path) -> str:
    """The name of a storage or a tensor, which torch wrote as a number."""
    if not (isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**64)):
        raise InputError(f"{path}: a name in the archive is a {type(key).__name__}: {AGAIN}")
    return str(key)


def counted(number: Any, path: Path) -> int:
    """A count that a tar's member begins with."""
    if type(number) is not int or not 0 <= number < 10**6:
        raise InputError(f"{path}: a count of tensors is damaged: {AGAIN}")
    return number


def fields(entry: Any, path: Path, count: int = 3) -> tuple[Any, ...]:
    """A tuple of a known length."""
    if not isinstance(entry, tuple) or len(entry) != count:
        raise InputError(f"{path}: an entry of the archive is damaged: {AGAIN}")
    return entry
