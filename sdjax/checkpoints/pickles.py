"""Torch's pickled checkpoints (.ckpt, .bin, .pt), read lazily and without running them.

Three containers have been used: a zip (torch >= 1.6: `NAME/data.pkl` and `NAME/data/KEY`), a run of
pickles with the storages behind them (torch 0.1.10 to 1.5), and a tar (before). In all of them a
pickle describes tensors as views of storages, and the numbers lie in the file uncompressed, so they
are mapped. `unpickle` reads the pickles; nothing here trusts what they say of sizes.
"""

import functools
import io
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.checkpoints import old_tar, unpickle
from sdjax.checkpoints.files import AGAIN, refuse_impostor
from sdjax.checkpoints.pickle_globals import Inert, Storage, View
from sdjax.checkpoints.storages import Store, bound, stored
from sdjax.checkpoints.tensors import Map, Tensor, Tensors
from sdjax.errors import InputError

MAGIC = 0x1950A86A20F9469CFC6C
STATE = "state_dict"
"""Lightning's key for the weights; what lies beside it (epochs, optimisers) is not looked at."""


def open(path: str | os.PathLike) -> Tensors:
    """The tensors of a pickled checkpoint, by key; nested `state_dict`s are followed.

    Raises:
        InputError: when the file is not there, damaged, or asks for what is no tensor.
    """
    path = Path(path)
    refuse_impostor(path)
    file = Map(path)
    start = file.bytes(0, 4)
    if start in (b"PK\x03\x04", b"PK\x05\x06"):
        root, storages = read_zip(file)
    elif old_tar.begins(file):
        root, storages = old_tar.read(file)
    elif start[:1] == b"\x80":
        root, storages = read_run(file)
    else:
        raise InputError(f"{path} is not a torch checkpoint or is damaged: {AGAIN}")
    for storage in storages:
        bound(storage, file)
    found = {}
    for key, value in state_dict(root, path).items():
        if isinstance(value, View):
            found[str(key)] = tensor(str(key), value, file)
        elif isinstance(value, Inert | Storage):
            raise InputError(
                f"{path}: {str(key)[:100]!r} is an object, not a tensor: get the weights as "
                "safetensors"
            )
    if not found:
        raise InputError(f"{path} holds no tensors: it is not a checkpoint of weights")
    said = {
        str(key): str(value)
        for key, value in root.items()
        if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    }
    return Tensors(found, path, said)


def state_dict(root: Any, path: Path) -> Mapping[Any, Any]:
    """The dictionary of weights in what a pickle holds."""
    for _ in range(4):
        if not isinstance(root, dict):
            kind = root.name[:100] if isinstance(root, Inert) else type(root).__name__
            raise InputError(
                f"{path} holds {kind!r}, not a dictionary of tensors: save the model's state_dict()"
            )
        if not isinstance(root.get(STATE), dict | Inert):
            return root
        root = root[STATE]
    raise InputError(f"{path} nests {STATE!r} too deep: save the model's state_dict()")


def tensor(key: str, view: View, file: Map) -> Tensor:
    """A view of a storage as a tensor; contiguous ones are views of the mapped file."""
    storage, dtype, shape = view.storage, view.dtype, view.shape
    contiguous, step = True, 1
    for length, stride in zip(shape[::-1], view.stride[::-1], strict=True):
        contiguous &= length <= 1 or stride == step
        step *= length
    offset = view.offset * dtype.itemsize
    if storage.begin is not None and contiguous:
        return file.tensor(key, shape, dtype, storage.begin + offset)
    numel = storage.numel if storage.dtype else storage.numel // dtype.itemsize
    release = None
    if storage.begin is not None:
        whole = file.tensor(key, (numel,), dtype, storage.begin)
        flat, release = whole.read, whole.release
    elif storage.data is None:
        raise InputError(
            f"{file.path}: {key[:100]!r} is a part of a storage that is compressed or has no "
            "dtype: get the weights as safetensors"
        )
    else:
        inflate = storage.data
        flat = lambda: inflate()[: numel * dtype.itemsize].view(dtype)  # noqa: E731

    def read() -> np.ndarray:
        if 0 in shape:
            return np.empty(shape, dtype)
        steps = tuple(stride * dtype.itemsize for stride in view.stride)
        return np.lib.stride_tricks.as_strided(flat()[view.offset :], shape, steps, writeable=False)

    made = Tensor(key, shape, dtype, file.path, read)
    return made if release is None else Tensor(key, shape, dtype, file.path, read, release)


def read_zip(file: Map) -> tuple[Any, list[Storage]]:
    """The zip container."""
    path = file.path
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path} is cut short or damaged ({str(error)[:80]}): {AGAIN}") from None
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.filename in entries:
            raise InputError(f"{path}: the archive has {info.filename[:100]!r} twice: {AGAIN}")
        if info.flag_bits & 1:
            raise InputError(f"{path} is encrypted: unpack it first")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"{path}: {info.filename[:100]!r} is compressed by an unusual method "
                f"({info.compress_type}): pack the archive again without compression"
            )
        entries[info.filename] = info
    pickled = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise InputError(f"{path} is a zip archive without a torch checkpoint in it")
    prefix = pickled[0].removesuffix("data.pkl")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and inflate(archive, order, file, 16).strip() != b"little":
        raise InputError(f"{path} is stored big-endian: save it again on a little-endian machine")
    store = Store()
    info = entries[pickled[0]]
    start = place(info, file)
    if start is None:
        data = inflate(archive, info, file, unpickle.BYTES)
        source = io.BytesIO(data)
    else:
        source = unpickle.window(file, start, start + info.file_size)
    root = unpickle.load(source, path, store)
    for key, storage in store.found.items():
        found = entries.get(f"{prefix}data/{key}")
        size = storage.numel * (storage.dtype.itemsize if storage.dtype else 1)
        if found is None or found.file_size < size:
            has = "nothing" if found is None else f"{found.file_size} bytes"
            raise InputError(
                f"{path}: storage {key[:80]!r} needs {size} bytes and the archive has {has}: "
                f"{AGAIN}"
            )
        storage.start = place(found, file)
        if storage.start is None:
            # Somebody packed it again, compressed: inflated when it is read, and only as far.
            storage.data = functools.partial(inflated, archive, found, file, size)
    return root, list(store.found.values())


def place(info: zipfile.ZipInfo, file: Map) -> int | None:
    """Where an entry's bytes begin, from its local header; None if they are compressed."""
    if info.compress_type != zipfile.ZIP_STORED:
        return None
    header = file.bytes(info.header_offset, info.header_offset + 30)
    if info.header_offset < 0 or len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise InputError(f"{file.path}: {info.filename[:100]!r} is not where its archive says")
    name, extra = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name + extra
    if start + info.file_size > file.size:
        raise InputError(f"{file.path} is cut short in {info.filename[:100]!r}: {AGAIN}")
    return start


def inflate(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: Map, limit: int) -> bytes:
    """The first `limit` bytes of an entry."""
    import zlib

    try:
        with archive.open(info) as entry:
            return entry.read(limit)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise InputError(
            f"{file.path}: {info.filename[:100]!r} is damaged ({str(error)[:80]}): {AGAIN}"
        ) from None


def inflated(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: Map, size: int) -> np.ndarray:
    """A compressed storage's bytes, all that its tensors are views of."""
    data = inflate(archive, info, file, size)
    if len(data) != size:
        # zipfile takes a stream that ends before the size which the archive claims for it.
        raise InputError(
            f"{file.path}: {info.filename[:100]!r} ends after {len(data)} of {size} bytes: {AGAIN}"
        )
    return np.frombuffer(data, np.uint8)


def read_run(file: Map) -> tuple[Any, list[Storage]]:
    """The run of pickles: magic number, protocol, machine, the object, keys; then storages."""
    source = unpickle.window(file, 0, file.size)

    def following(persistent: Any = None) -> Any:
        return unpickle.load(source, file.path, persistent or Store())

    if following() != MAGIC:
        raise InputError(
            f"{file.path} is a pickle, but not a checkpoint that torch saved: get the weights as "
            "safetensors"
        )
    if following() != 1001:
        raise InputError(f"{file.path} is of an unknown version of torch's format: {AGAIN}")
    machine = following()
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise InputError(f"{file.path} is stored big-endian: save it again with a newer torch")
    store = Store()
    root = following(store)
    keys = following()
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not named or len(set(keys)) != len(keys):
        raise InputError(f"{file.path}: the list of storages is damaged: {AGAIN}")
    at = source.tell()
    for key in keys:
        storage = store.found.get(key)
        if storage is None:
            raise InputError(f"{file.path}: storage {key[:80]!r} belongs to nothing: {AGAIN}")
        at = stored(file, at, storage)
    return root, list(store.found.values())
