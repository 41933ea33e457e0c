"""`Source`: pictures with captions at random access, and the two that need no files."""

import bisect
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from sdjax.errors import InputError

ENDLESS = sys.maxsize
"""The length of a source that never repeats."""


class Example(NamedTuple):
    """A picture as it is stored, of any size, and what is said of it."""

    pixels: UInt8[np.ndarray, "h w 3"]
    caption: str
    name: str
    """A file or a tar's member, for messages."""


@runtime_checkable
class Source(Protocol):
    """Examples by number; anything with these two methods can be trained on.

    An example is a picture with its caption, or arrays that are a batch's row as they are. One that
    cannot be read is None, never an exception; a source that has a dict `skipped` puts its number
    there with one line: the name and what is wrong. One that has a `digest`, a str, is known by it:
    caches and checkpoints then notice other data. So do caches by a `stamp`, a str that also tells
    files that were changed in place; another copy of the data has the digest and not the stamp.
    """

    def __len__(self) -> int:
        """How many there are, the unreadable among them; `ENDLESS` for a program's."""
        ...

    def __getitem__(self, index: int, /) -> Example | Mapping[str, np.ndarray] | None:
        """The same example for the same number, in any process and in any order."""
        ...


class Drawn:
    """Pictures that a program makes: `make(index)`, endless unless `length` is given.

    `digest`: what tells this program from others, for caches.
    """

    def __init__(
        self,
        make: Callable[[int], Example | Mapping[str, np.ndarray] | None],
        length: int | None = None,
        digest: str = "",
    ):
        if length is not None and length < 1:
            raise InputError(f"a drawn source needs at least one picture, got length={length}")
        self.make = make
        self.digest = digest
        self.length = ENDLESS if length is None else length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example | Mapping[str, np.ndarray] | None:
        return self.make(index)


class Joined:
    """Several sources one after another."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        self.starts = list(itertools.accumulate(map(len, self.sources), initial=0))
        self.skipped: dict[int, str] = {}
        if self.starts[-1] > ENDLESS:
            raise InputError("an endless source cannot be joined with others: train on it alone")

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Example | Mapping[str, np.ndarray] | None:
        which = bisect.bisect_right(self.starts, index) - 1
        inner = index - self.starts[which]
        found = self.sources[which][inner]
        if found is None:
            self.skipped[index] = reason(self.sources[which], inner)
        return found

    @property
    def digest(self) -> str:
        """The sources' digests, as one."""
        parts = [(len(s), getattr(s, "digest", "")) for s in self.sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def stamp(self) -> str:
        """The sources' stamps, as one."""
        parts = [getattr(s, "stamp", "") for s in self.sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def stamp(paths: Iterable[str]) -> str:
    """SHA-256 of files' sizes and times of change, in order; the files are not read."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            found = os.stat(path)
            digest.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(b"absent\n")
    return digest.hexdigest()


def reason(source: Source, index: int) -> str:
    """One line on an example that the source could not read: its name and what is wrong."""
    skipped: dict[int, str] = getattr(source, "skipped", {})
    return skipped.get(index, f"example {index} cannot be read")
