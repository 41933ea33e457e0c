"""A run's state on disk: saved behind its back, whole or not at all, and back bit for bit."""

import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.errors import InputError

_STATE, _REST = "state", "rest"


class Checkpoints:
    """The newest `keep` checkpoints of a run, in one folder, written by orbax in the background.

    A checkpoint is a folder named by its step. It is written under another name and renamed when
    all of it is there, so what a kill leaves half-written never counts, and is cleared away when
    the folder is opened next. Random keys are kept as their data. Every array's sum of bits is kept
    beside it and compared after reading: a checkpoint that is damaged is never gone on from.

    `note` is told in a sentence of what was saved, when that is so, and of what went wrong. One
    process at a time may have a folder open; the processes of a pod open it together.
    """

    def __init__(
        self, folder: str | Path, keep: int = 2, note: Callable[[str], None] = lambda line: None
    ) -> None:
        from etils import epath

        self.folder = epath.Path(folder if "://" in str(folder) else Path(folder).absolute())
        self.keep = keep
        self._note = note
        self._saving: int | None = None  # the step that is on its way
        self._failure: str | None = None  # of the last save
        self._manager = self._opened()

    def steps(self) -> list[int]:
        """The steps that are saved, ascending; the one on its way is not among them."""
        return sorted(step for step in self._manager.all_steps() if step != self._saving)

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Begin to save a tree of jax's arrays and a dict of JSON, and return.

        The arrays may be donated as soon as this returns. It waits for the save before. One that
        fails is noted, and the next is tried all the same: see `wait`. On a pod all processes save,
        and `extra` is the first one's.
        """
        import orbax.checkpoint as ocp

        self._settle()
        arrays = _flat(state)
        marks = _marks(arrays)
        rest = {"arrays": {name: [*_form(arrays[name]), marks[name]] for name in arrays}}
        rest["extra"] = dict(extra)
        try:
            with _quiet():
                self._saving = step
                self._manager.save(
                    step,
                    force=True,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave({k: v for k, v in arrays.items() if v.size}),
                        rest=ocp.args.JsonSave(rest),
                    ),
                )
        except Exception as error:
            self._failed(error)

    def poll(self) -> None:
        """Say what has been saved since the last call; at once, for the training loop."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._settle()

    def wait(self) -> None:
        """Wait until all is saved.

        InputError: the last save failed.
        """
        self._settle()
        if self._failure is not None:
            raise InputError(self._failure)

    def close(self) -> None:
        """Wait, and let the folder go."""
        self._settle()
        with _quiet():
            self._manager.close()

    def restore_latest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Read the newest whole checkpoint: its step, state and extra; None where there is none.

        `like` is the state, or its shapes (jax.ShapeDtypeStruct), with the shardings that are
        wanted now: they, and the number of devices, may be others than when it was saved.
        A damaged checkpoint is noted and set aside as STEP.damaged, and the one before is read.

        InputError: the checkpoint is of another model or optimizer, or none can be read.
        """
        self._settle()
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                with _quiet():
                    state, extra = self._read(step, like)
            except InputError:
                raise
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise  # the checkpoint is not to blame
            except Exception as error:
                damaged[step] = _reason(error)
                _hush()
                continue
            for bad, reason in damaged.items():
                self._note(f"checkpoint {self.folder / str(bad)} is damaged ({reason}): not used")
                self._set_aside(bad)
            if damaged:
                self._note(f"going on from step {step}")
                self._reopen()
            return step, state, extra
        if damaged:
            reason = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise InputError(
                f"no checkpoint in {self.folder} can be read ({reason}): restore one from a copy, "
                "or train in another folder"
            )
        return None

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        import orbax.checkpoint as ocp

        rest = self._manager.restore(step, args=ocp.args.Composite(rest=ocp.args.JsonRestore()))
        saved, extra = rest[_REST]["arrays"], rest[_REST]["extra"]
        targets = _flat(like)
        self._compare(step, saved, targets)
        read = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(
                    {name: _target(leaf) for name, leaf in targets.items() if leaf.size}
                )
            ),
        )[_STATE]
        for name, leaf in targets.items():
            if not leaf.size:
                read[name] = jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        marks = _marks(read)
        wrong = [name for name in targets if marks[name] != saved[name][2]]
        if wrong:
            raise ValueError(f"{wrong[0]} is not what was saved")
        leaves, structure = jax.tree.flatten(like)
        kept = [
            jax.random.wrap_key_data(array, impl=_impl(leaf)) if _is_key(leaf) else array
            for leaf, array in zip(leaves, (read[name] for name in targets), strict=True)
        ]
        return jax.tree.unflatten(structure, kept), extra

    def _compare(self, step: int, saved: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
        """Refuse a state of other names, shapes or types."""
        where, mend = self.folder / str(step), "take the settings that it was saved with"
        for name in (*targets, *saved):
            if (name in saved) != (name in targets):
                there, here = ("has", "has none") if name in saved else ("has no", "has one")
                raise InputError(f"{where} {there} {name} and this run {here}: {mend}")
        for name, leaf in targets.items():
            old, new = saved[name][:2], _form(leaf)
            if old != new:
                raise InputError(
                    f"{name} is {old[1]}{old[0]} in {where} and {new[1]}{new[0]} in this "
                    f"run: {mend}"
                )

    def _settle(self) -> None:
        """Wait for the save on its way, and say how it ended."""
        if self._saving is None:
            return
        try:
            with _quiet():
                self._manager.wait_until_finished()
            if not (self.folder / str(self._saving)).is_dir():
                raise OSError("it is not there after all")
        except Exception as error:
            self._failed(error)
            return
        step, self._saving, self._failure = self._saving, None, None
        self._note(f"saved step {step}")

    def _failed(self, error: Exception) -> None:
        self._failure = f"step {self._saving} could not be saved in {self.folder}: {_reason(error)}"
        self._saving = None
        self._note(f"warning: {self._failure}")
        # After a failure every wait of the manager raises it again.
        self._reopen()

    def _set_aside(self, step: int) -> None:
        names = (f"{step}.damaged{n or ''}" for n in itertools.count())
        free = next(name for name in names if not (self.folder / name).exists())
        try:
            (self.folder / str(step)).rename(self.folder / free)
        except OSError:
            pass  # another process of the pod was first

    def _opened(self) -> Any:
        import orbax.checkpoint as ocp

        with _quiet():
            return ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self.keep, cleanup_tmp_directories=True
                ),
                item_handlers={
                    _STATE: ocp.StandardCheckpointHandler(),
                    _REST: ocp.JsonCheckpointHandler(),
                },
            )

    def _reopen(self) -> None:
        try:
            with _quiet():
                self._manager.close()
        except Exception:
            pass  # it says again what was said
        self._manager = self._opened()


def _flat(tree: Any) -> dict[str, Any]:
    """The leaves by name; keys as their data."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _data(leaf) for path, leaf in leaves
    }


def _data(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _impl(leaf: Any) -> Any:
    """Which generator a key array, or its shape, is of."""
    if isinstance(leaf, jax.Array):
        return jax.random.key_impl(leaf)
    return leaf.dtype._impl.name


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jnp.zeros(()).sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _form(leaf: Any) -> list[Any]:
    return [list(leaf.shape), jnp.dtype(leaf.dtype).name]


def _marks(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Each array's bits as integers, each times an odd number of its place, summed modulo 2^32.

    One changed bit always changes it, the order of the sum never: it is the same on any mesh.
    Arrays in this process's memory are summed by numpy, which has nothing to compile.
    """
    marks = {}
    for name, array in arrays.items():
        if _is_on_cpu(array) and array.is_fully_addressable:
            marks[name] = _mark(np.asarray(array), np)
            continue
        marks[name] = _compiled_mark(array)
        if _is_on_cpu(array):
            # Sums over processes each hold a thread while they wait: many at once stop for good.
            jax.block_until_ready(marks[name])
    return {name: int(mark) for name, mark in jax.device_get(marks).items()}


def _is_on_cpu(array: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in array.devices())


def _mark(array: Any, xp: Any) -> Any:
    array = array[..., None]  # a scalar too has an axis
    if array.dtype == bool:
        array = array.astype(xp.uint8)
    kind = {1: xp.uint8, 2: xp.uint16}.get(array.dtype.itemsize, xp.uint32)
    bits = array.view(kind).astype(xp.uint32)
    place = xp.zeros((1,) * bits.ndim, xp.uint32)
    for axis, size in enumerate(bits.shape):
        at = xp.arange(size, dtype=xp.uint32)
        place = place * xp.uint32(65_599) + at.reshape(-1, *(1,) * (bits.ndim - axis - 1))
    return (bits * (2 * place + xp.uint32(1))).sum(dtype=xp.uint32)


_compiled_mark = jax.jit(partial(_mark, xp=jnp))


def _reason(error: BaseException) -> str:
    """The first line of an error, which may run over pages."""
    lines = str(error).strip().splitlines()
    return f"{lines[0]:.120}" if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep orbax's log off the terminal: what counts is said."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@cache
def _hush() -> None:
    """Keep quiet about reads that orbax gave up: they end at any time, each with a page of text."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        name = getattr(unraisable.object, "__qualname__", "")
        if name != "_read_array_index_and_device_put" and "loop is closed" not in str(
            unraisable.exc_value
        ):
            before(unraisable)

    sys.unraisablehook = hook
