"""`batches`: an endless, exactly resumable stream of batches, made ahead of time."""

import dataclasses
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sdjax.errors import InputError
from sdjax.training.data.cached import Cached
from sdjax.training.data.rows import Fit, Row, Rows, Tokenize, collate
from sdjax.training.data.source import ENDLESS, Source

_THREADS = 8


class Batches(Iterator[dict[str, np.ndarray]]):
    """Batches in order, with the position of the next one.

    Nothing is read before the first `next`; then the batches to come are made ahead, by threads, or
    by `workers` processes. What is made ahead does not count: `state` is the position after the
    last batch given. Used in one thread. `close` (or leaving a `with`) ends threads and processes.
    """

    def __init__(self, rows: Rows, workers: int, epochs: int | None):
        self.skipped: dict[int, str] = {}
        """Unreadable examples met so far, by number: the name and what is wrong, or nothing where
        they were met before a position that was gone back to. Of this process's rows alone."""
        self.enlarged: set[int] = set()
        """Numbers of the examples met so far that were smaller than what is trained on."""
        self._rows = rows
        self._next = 0
        self._workers = workers
        self._epochs = epochs
        self._made: Any = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._made is None:
            self._made = self._begin()
        made: Row = next(self._made)
        self._next += self._rows.batch_size
        for note in made.notes:
            self._tell(*note)
        if not self._workers:
            return made.arrays
        # What processes send lies in memory that is theirs.
        return {key: np.array(value) for key, value in made.arrays.items()}

    @property
    def epoch(self) -> int:
        """The epoch of the next batch's first example, from 0."""
        return self._next // len(self._rows.source)

    def state(self) -> dict[str, Any]:
        """The position of the next batch, for JSON: that of all processes, whatever `workers`.

        With it go the source's `digest`, where it has one, and the numbers of what was skipped.
        """
        digest = getattr(self._rows.source, "digest", "")
        return {
            "examples": self._next,
            "seed": self._rows.seed,
            "length": len(self._rows.source),
            **({"digest": digest} if digest else {}),
            **({"skipped": sorted(self.skipped)} if self.skipped else {}),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state` gave: the next batch is the one that was next there.

        InputError: it is one in other data, or with another seed.
        """
        here = self.state()
        for key in ("seed", "length"):
            if state.get(key) != here[key]:
                what = {"seed": "seed", "length": "number of examples"}[key]
                raise InputError(
                    f"the position was saved with the {what} {state.get(key)}, and here it is "
                    f"{here[key]}: continue with the data and the seed it was saved with"
                )
        # Positions that were saved before there were digests go on as they did.
        if "digest" in state and state["digest"] != here.get("digest"):
            raise InputError(
                "the position was saved with other data, whose names or captions differ from what "
                "data.source holds now: continue with the data it was saved with"
            )
        start = state.get("examples")
        if not isinstance(start, int) or start < 0:
            raise InputError(f"a position counts examples from 0, got {start!r}")
        self.close()
        self._next = start
        self.skipped = {n: self.skipped.get(n, "") for n in state.get("skipped", ())}

    def close(self) -> None:
        """End what runs ahead; the next batch can still be asked for, and starts it anew."""
        if self._made is not None:
            self._made.close()
            self._made = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> Any:
        import grain

        rows = dataclasses.replace(self._rows, start=self._next, length=self._left())
        size = rows.batch_size // rows.process[1]
        data = grain.MapDataset.source(rows)
        if not self._workers:
            threads = min(_THREADS, os.cpu_count() or 1)
            ahead = grain.ReadOptions(
                num_threads=threads, prefetch_buffer_size=max(2 * size, threads)
            )
            made = data.to_iter_dataset(ahead).batch(size, drop_remainder=True, batch_fn=collate)
            return iter(made)
        from absl import flags  # grain's own options, which only programs on absl parse

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # Whole batches are dealt to the processes: what is in a batch depends on no process.
        one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        whole = data.batch(size, drop_remainder=True, batch_fn=collate).to_iter_dataset(one)
        processes = grain.MultiprocessingOptions(num_workers=self._workers)
        return iter(whole.mp_prefetch(processes, _live_and_die_with_the_parent))

    def _left(self) -> int:
        """Rows of this process in the batches that are left."""
        if self._epochs is None:
            return ENDLESS
        rows = self._rows
        total = self._epochs * len(rows.source)
        return max(0, total - self._next) // rows.batch_size * rows.batch_size // rows.process[1]

    def _tell(self, kind: str, index: int, text: str) -> None:
        if kind == "skipped" and index not in self.skipped:
            self.skipped[index] = text
            warnings.warn(f"skipped {text}", stacklevel=3)
        elif kind == "enlarged" and index not in self.enlarged:
            if not self.enlarged:
                fit = self._rows.fit
                size = f"{fit.width}x{fit.height}" if fit else ""
                warnings.warn(
                    f"{text} is smaller than {size} and enlarged; others are counted only",
                    stacklevel=3,
                )
            self.enlarged.add(index)


def _live_and_die_with_the_parent(index: int, count: int) -> None:
    """In a worker: Ctrl-C is for the training, which ends its workers; SIGKILL cannot do so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=follow, daemon=True).start()


def batches(
    source: Source | Any,
    *,
    batch_size: int,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    tokenize: Tokenize | Mapping[str, Tokenize] | None = None,
    flip: bool = False,
    crop: str = "center",
    time_ids: bool = False,
    workers: int = 0,
    shuffle: bool = True,
    process: tuple[int, int] = (0, 1),
    epochs: int | None = None,
    start: Mapping[str, Any] | None = None,
) -> Batches:
    """Batches of a source's examples: dicts of arrays [b, ...] as `training.stage.Batch` has them.

    `pixels`: uint8, resized to cover height x width and cropped, by `crop` at the "center" or at
    "random"; mirrored in half of the cases with `flip`. With `tokenize`, a tokenizer or one for
    each key ({"ids": .., "ids_2": ..}): int32 ids. With `time_ids`: float32 [b, 6], the stored
    height and width, the crop's top and left after resizing, height and width (SDXL, arXiv
    2307.01952, section 2.2). A cache's examples come as they are, and need none of these.

    Batch k is a function of (source, seed, batch_size, k): examples kB to (k+1)B of an endless
    stream in which each epoch is another permutation (in order without `shuffle`), each choice
    drawn from (seed, epoch, number of the example). An unreadable example's row is filled by
    another one; nothing else moves. Of every batch process i of n has the rows from i B/n on, B/n
    of them: side by side, the processes' rows are the batch.

    Endless, or `epochs` long, without what fills no batch at the end. `start`: a `state` to go to.
    """
    fit = None
    if height is not None or width is not None:
        fit = Fit(*_size(height, width), crop, flip, time_ids)
        if crop not in ("center", "random"):
            raise InputError(f"crop must be center or random, got {crop!r}")
    elif not isinstance(source, Cached):
        raise InputError("pictures of any size need a height and a width to be made into batches")
    index, count = process
    if not 0 <= index < count:
        raise InputError(f"process must be (index, count) with index below count, got {process}")
    if batch_size < 1 or batch_size % count:
        raise InputError(
            f"batch_size must be positive and a multiple of {count}, the number of processes, got "
            f"{batch_size}"
        )
    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}")
    if workers < 0:
        raise InputError(f"workers must not be negative, got {workers}")
    if not len(source):
        raise InputError("the source is empty")
    if epochs is not None:
        if len(source) == ENDLESS:
            raise InputError(f"an endless source has no epochs, got epochs={epochs}: count steps")
        if epochs * len(source) < batch_size:
            raise InputError(
                f"{epochs} epochs of {len(source)} examples do not fill one batch of {batch_size}"
            )
    if tokenize is None:
        tokenize = {}
    elif not isinstance(tokenize, Mapping):
        tokenize = {"ids": tokenize}
    rows = Rows(
        source=source,
        fit=fit,
        tokenize=dict(tokenize),
        seed=seed,
        shuffle=shuffle,
        start=0,
        batch_size=batch_size,
        process=(index, count),
        length=ENDLESS,
    )
    made = Batches(rows, workers, epochs)
    if start is not None:
        made.restore(start)
    return made


def _size(height: int | None, width: int | None) -> tuple[int, int]:
    if height is None or width is None or height < 1 or width < 1:
        raise InputError(f"height and width must both be positive, got {height} and {width}")
    return height, width
