"""A cache on disk of what the frozen networks make of the data: latents, text states."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy

from sdjax.errors import InputError

_ABOUT = "cache.json"
_VERSION = 1

Encode = Callable[[dict[str, np.ndarray]], Mapping[str, Any]]


class Cached:
    """A cache's examples: dicts of arrays, read from disk as they are asked for.

    One that could not be read when the cache was made is None, and in `skipped`.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any]):
        self.path = str(path)
        self.made_of: dict[str, Any] = about["made_of"]
        self.count: int = about["count"]
        self.digest = str(self.made_of.get("data", ""))
        self.skipped = {int(n): line for n, line in about.get("skipped", {}).items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._keys = list(about["arrays"])
        self._open()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray] | None:
        if index in self.skipped:
            return None
        return {key: np.array(array[index]) for key, array in self._arrays.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_arrays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}
        for key in self._keys:
            file = Path(self.path, f"{key}.npy")
            try:
                array = np.load(file, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise InputError(f"{file} is damaged: {error}: delete {self.path}") from None
            if len(array) != self.count:
                raise InputError(
                    f"{file} holds {len(array)} examples in place of {self.count}: "
                    f"delete {self.path}"
                )
            self._arrays[key] = array
            self.shapes[key] = array.shape[1:]


def cache(
    batches: Iterator[dict[str, np.ndarray]],
    encode: Encode,
    path: str | Path,
    count: int,
    *,
    made_of: Mapping[str, Any],
    store: Literal["float32", "float16"] = "float32",
    skipped: Mapping[int, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Cached:
    """The first `count` examples of `batches`, each through `encode` once, kept in a folder.

    `encode`: a batch to named arrays [b, ...]; floating ones are stored as `store`, one .npy a
    name. `made_of`: what the arrays depend on, for JSON: data, networks, size, seed. A cache
    already at `path` is opened in place of making one if it was made of the same, and else refused.
    `skipped`: the examples that are of no use, as `Batches.skipped` of batches without shuffling
    has them once all were read; the cache knows them, and gives None for them.
    The folder gets its name when it is whole and on disk. `progress(done, count)` after each batch.
    """
    path = Path(path)
    wanted = json.loads(json.dumps({**made_of, "count": count, "store": store}))
    if count < 1:
        raise InputError(f"a cache needs at least one example, got count={count}")
    if path.exists():
        return open_cached(path, wanted)
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        _sweep(path)
        partial.mkdir(parents=True)
        arrays = _write(partial, batches, encode, count, np.dtype(store), progress)
        about = {"version": _VERSION, "count": count, "arrays": arrays, "made_of": wanted}
        if skipped:
            about["skipped"] = {str(number): skipped[number] for number in sorted(skipped)}
        with (partial / _ABOUT).open("w") as file:
            json.dump(about, file, indent=1, sort_keys=True)
            _flush(file)
        os.replace(partial, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"no cache could be written to {path}: {error.strerror or error}"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_cached(path, wanted)


def open_cached(path: str | Path, made_of: Mapping[str, Any] | None = None) -> Cached:
    """A cache that `cache` wrote; refused where it was made of something else than `made_of`.

    Only what both name is compared.
    """
    try:
        about = json.loads(Path(path, _ABOUT).read_text())
        version = about["version"]
    except OSError as error:
        raise InputError(f"{path} is no cache: {_ABOUT}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path} is no cache, or a damaged one: delete it") from None
    if version != _VERSION:
        raise InputError(f"{path} is a cache of another release of sdjax: delete it")
    for key, value in json.loads(json.dumps(dict(made_of or {}))).items():
        if key in about["made_of"] and about["made_of"][key] != value:
            raise InputError(
                f"{path} was made with {key} {about['made_of'][key]!r}, and now it is {value!r}: "
                "delete it, or name another folder"
            )
    return Cached(path, about)


def _write(
    folder: Path,
    batches: Iterator[dict[str, np.ndarray]],
    encode: Encode,
    count: int,
    store: np.dtype,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Write the arrays from front to back: a full disk is then an error and not a crash."""
    shapes: dict[str, tuple[int, ...]] = {}
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        done = 0
        while done < count:
            batch = next(batches, None)
            if batch is None:
                raise InputError(f"the data ends after {done} of {count} examples to be cached")
            rows = {key: _stored(key, value, store) for key, value in encode(batch).items()}
            for key, array in rows.items():
                if not files.keys() >= rows.keys():
                    file = stack.enter_context((folder / f"{key}.npy").open("wb"))
                    shape = shapes[key] = (count, *array.shape[1:])
                    descr = npy.dtype_to_descr(array.dtype)
                    header = {"descr": descr, "fortran_order": False, "shape": shape}
                    npy.write_array_header_1_0(file, header)
                    files[key] = file
                if array.shape[1:] != shapes[key][1:]:
                    raise ValueError(f"{key} was {shapes[key][1:]} an example, now {array.shape}")
                files[key].write(array[: count - done].tobytes())
            done = min(count, done + len(next(iter(rows.values()))))
            if progress is not None:
                progress(done, count)
        for file in files.values():
            _flush(file)
    return {key: list(shape) for key, shape in shapes.items()}


def _stored(key: str, value: Any, store: np.dtype) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind in "iub":
        return np.ascontiguousarray(array)
    array = np.asarray(array, np.float32)  # bfloat16 too, which numpy's files do not know
    with np.errstate(over="ignore"):
        small = array.astype(store)
    if not np.isfinite(small).all():
        if np.isfinite(array).all():
            most = float(np.abs(array).max())
            raise InputError(f"{key} reaches {most:g}, too large for float16: store it as float32")
        raise InputError(f"{key} holds values that are not finite: nothing was cached")
    return small


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system knows how
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sweep(path: Path) -> None:
    """Delete what killed processes of this machine left of this cache."""
    for left in path.parent.glob(f".{path.name}.{socket.gethostname()}.*.partial"):
        number = left.name.split(".")[-2]
        if number.isdigit() and not _alive(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
