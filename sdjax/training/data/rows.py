"""`Rows`: which example stands in which row of which batch, and what becomes of it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from sdjax.errors import InputError
from sdjax.training.data.pixels import fit
from sdjax.training.data.source import ENDLESS, Example, reason

# What a random number is for: its own stream for each.
_SHUFFLE, _PLACE, _FLIP, _INSTEAD = range(4)
# So many unreadable examples in a row are no accident.
_PATIENCE = 1000

Tokenize = Callable[[list[str]], Any]


class Note(NamedTuple):
    """What is to be told of an example."""

    kind: Literal["skipped", "enlarged"]
    number: int
    """The example's."""
    text: str


class Row(NamedTuple):
    """One row of a batch, and what is to be told."""

    arrays: dict[str, np.ndarray]
    notes: list[Note]


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a picture becomes a row of `pixels`."""

    height: int
    width: int
    crop: str
    flip: bool
    time_ids: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The rows of this process, from the example `start` of the endless stream of epochs.

    Random access for grain, and a function of the row's number alone: nothing is remembered that
    could change what a row holds.
    """

    source: Any
    fit: Fit | None
    tokenize: Mapping[str, Tokenize]
    seed: int
    shuffle: bool
    start: int
    batch_size: int
    process: tuple[int, int]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> Row:
        rows = self.batch_size // self.process[1]
        batch, inside = divmod(row, rows)
        position = self.start + batch * self.batch_size + self.process[0] * rows + inside
        epoch, place = divmod(position, len(self.source))
        index = self._at(epoch, place)
        notes: list[Note] = []
        for attempt in range(_PATIENCE):
            found = self.source[index]
            if found is not None:
                return Row(self._arrays(found, epoch, index, notes), notes)
            notes.append(Note("skipped", index, reason(self.source, index)))
            # The row is filled by another example, so that no other row moves up into it.
            draw = self._random(_INSTEAD, epoch, position, attempt)
            index = int(draw.integers(len(self.source)))
        raise InputError(
            f"none of {_PATIENCE} examples tried could be read; the first: {notes[0].text}"
        )

    def _at(self, epoch: int, place: int) -> int:
        """The example at a place of an epoch: a permutation an epoch, found without storing it."""
        length = len(self.source)
        if not self.shuffle or length == ENDLESS:
            return place
        from grain.experimental import index_shuffle

        return index_shuffle(place, length - 1, _epoch_seed(self.seed, epoch), 4)

    def _arrays(
        self, found: Any, epoch: int, index: int, notes: list[Note]
    ) -> dict[str, np.ndarray]:
        if isinstance(found, Mapping):
            return dict(found)  # arrays already: a cache's
        if not isinstance(found, Example):
            raise InputError(f"example {index} must be an Example or None, got {found!r:.60}")
        if self.fit is None:
            raise InputError("pictures need a height and a width to be made into batches")
        pixels = found.pixels
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise InputError(
                f"{found.name}: pixels must be uint8 [h, w, 3], got {pixels.dtype} {pixels.shape}"
            )
        arrays: dict[str, np.ndarray] = {}
        place = None
        if self.fit.crop == "random":
            place = self._random(_PLACE, epoch, index).random(2)
        if self.fit.flip and self._random(_FLIP, epoch, index).random() < 0.5:
            pixels = pixels[:, ::-1]
        fitted = fit(pixels, self.fit.height, self.fit.width, place)
        arrays["pixels"] = fitted.pixels
        if fitted.enlarged:
            text = f"{found.name}: {pixels.shape[1]}x{pixels.shape[0]}"
            notes.append(Note("enlarged", index, text))
        if self.fit.time_ids:
            corner = fitted.top, fitted.left
            size = self.fit.height, self.fit.width
            arrays["time_ids"] = np.array([*pixels.shape[:2], *corner, *size], np.float32)
        for key, tokenize in self.tokenize.items():
            tokens = tokenize([found.caption])
            ids = tokens.ids if hasattr(tokens, "ids") else tokens
            arrays[key] = np.asarray(ids[0], np.int32)
        return arrays

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *purpose])


@functools.lru_cache(maxsize=4)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, _SHUFFLE, epoch]).generate_state(1)[0])


def collate(rows: list[Row]) -> Row:
    """Rows to one batch: arrays stacked, notes gathered."""
    notes = [note for row in rows for note in row.notes]
    keys = rows[0].arrays
    return Row({key: np.stack([row.arrays[key] for row in rows]) for key in keys}, notes)
