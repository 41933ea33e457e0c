"""Weights that are still in a file: names, shapes and dtypes now, numbers when asked for.

Every format is read into a `Tensors`; naming, single files and `load` map over it and never see a
file again. Nothing is read before `Tensor.read`, so a header can be checked against a network's
shapes before memory is spent on it.
"""

import functools
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from sdjax.errors import InputError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64))
"""The dtypes that weights may have; float64 becomes float32, which is what jax computes in."""


def nothing() -> None:
    """Release nothing: for a tensor that is not a view of a file."""


@dataclass(frozen=True)
class Tensor:
    """One array of a checkpoint, unread: its key, its torch shape, its dtype and its file.

    `read` gives the numbers, possibly a read-only view of the mapped file; once they are used,
    `release` hands the file's pages back to the system, and a view then costs a new fault.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    path: Path
    read: Callable[[], np.ndarray] = field(repr=False, compare=False)
    release: Callable[[], None] = field(default=nothing, repr=False, compare=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for length in self.shape:
            size *= length
        return size

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take."""
        return self.size * self.dtype.itemsize

    def view(
        self,
        change: Callable[[np.ndarray], np.ndarray],
        shape: tuple[int, ...],
        name: str | None = None,
    ) -> "Tensor":
        """The tensor after `change` (a slice, a transpose, a reshape), still unread.

        Args:
            change: applied to what `read` gives; should return a view.
            shape: the shape of its result.
            name: the key that errors name, when it differs.
        """
        read = self.read
        return replace(self, shape=shape, name=name or self.name, read=lambda: change(read()))

    def rows(self, start: int, stop: int, name: str | None = None) -> "Tensor":
        """Rows `start` to `stop` of the first axis: one part of a fused projection."""
        shape = (stop - start, *self.shape[1:])
        return self.view(lambda array: array[start:stop], shape, name)

    def transposed(self, name: str | None = None) -> "Tensor":
        """The axes in reverse order."""
        return self.view(lambda array: array.T, self.shape[::-1], name)

    def reshaped(self, shape: tuple[int, ...], name: str | None = None) -> "Tensor":
        """The same elements under another shape of equal size."""
        return self.view(lambda array: array.reshape(shape), shape, name)


class Tensors(Mapping[str, Tensor]):
    """A checkpoint's tensors by key, with the file (or folder) they come from and its metadata."""

    def __init__(
        self, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
    ):
        self._tensors = dict(tensors)
        self.path = path
        self.metadata = dict(metadata or {})

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Tensors({len(self)} from {self.path})"


class Map:
    """A file mapped read-only, closed when the last view of it is gone."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    def bytes(self, start: int, stop: int) -> bytes:
        """A copy of the bytes `start` to `stop`."""
        return self._map[start:stop]

    def tensor(self, name: str, shape: tuple[int, ...], dtype: np.dtype, start: int) -> Tensor:
        """The tensor stored contiguously from byte `start`, which the caller has checked."""
        size = 1
        for length in shape:
            size *= length
        stop = start + size * dtype.itemsize

        read = functools.partial(self.read, shape, dtype, start, stop)
        release = functools.partial(self.release, start, stop)
        return Tensor(name, shape, dtype, self.path, read, release)

    def read(self, shape: tuple[int, ...], dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        """A read-only view of the mapped bytes between two places."""
        if start == stop:
            return np.empty(shape, dtype)
        array = np.frombuffer(self._map, np.uint8, stop - start, start)
        return array.view(dtype).reshape(shape)

    def release(self, start: int, stop: int) -> None:
        """Drop the resident pages between two bytes; reading them again is correct, only slower."""
        if isinstance(self._map, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and stop > start:
            start -= start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


def floating(name: str) -> np.dtype:
    """The dtype of a float format by name: "float32", "bfloat16" or "float16".

    Raises:
        InputError: for any other name.
    """
    known = {"float32": FLOATS[2], "bfloat16": BFLOAT16, "float16": FLOATS[0]}
    if name not in known:
        raise InputError(f"dtype must be one of {', '.join(known)}, got {name!r}")
    return known[name]
