"""Batches over all local devices: the only file that names devices, and it knows no task.

A program is written for one device and a batch [b, ...]. Here the batch is padded to a multiple of
the device count, split to [devices, b / devices, ...] and mapped with `jax.pmap`. Every process of
a pod maps over its own devices: sampling needs no communication between them.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def device_count() -> int:
    """Number of devices that batches are split over: this process's own."""
    return jax.local_device_count()


def replicate(tree: Any) -> Any:
    """Copy every array to all local devices, once.

    Arrays that are replicated already are returned as they are. Do this to params before calling a
    program more than once: a call with replicated params costs under a millisecond, one that must
    copy them first costs the copy.
    """
    mesh = Mesh(np.array(jax.local_devices()), ("batch",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split(tree: Any, size: int) -> Any:
    """Host arrays [size, ...] -> [devices, n, ...], the last row repeated to fill the devices."""
    devices = device_count()
    each = -(-size // devices)

    def rows(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        if leaf.ndim == 0 or leaf.shape[0] != size:
            raise ValueError(f"expected a leading axis of {size}, got shape {leaf.shape}")
        padded = np.concatenate([leaf, np.repeat(leaf[-1:], each * devices - size, axis=0)])
        return padded.reshape(devices, each, *leaf.shape[1:])

    return jax.tree.map(rows, tree)


def join(tree: Any, size: int) -> Any:
    """The inverse of `split`, on the host: [devices, n, ...] -> [size, ...]."""
    return jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[2:])[:size], tree)


def mapped(function: Callable, *, donate: tuple[int, ...] = ()) -> Callable:
    """`function(static, shared, *batches)` over all local devices.

    `static` is hashable and part of the program, `shared` is the same on every device (see
    `replicate`), each of `batches` is a tree of [devices, n, ...] (see `split`), and so is the
    result. `donate` counts among the batches: 0 gives the first one's memory to the result.
    """

    def call(static: Any, shared: Any, *batches: Any) -> Any:
        devices = tuple(jax.local_devices())
        return _compiled(function, len(batches), donate, devices)(static, (shared,), *batches)

    return call


@cache
def _compiled(
    function: Callable, batches: int, donate: tuple[int, ...], devices: tuple
) -> Callable:
    def program(static: Any, shared: tuple[Any], *batches: Any) -> Any:
        return function(static, shared[0], *batches)

    # The tuple around `shared` is for pmap: where the arguments have as many leaves as there are
    # arguments, jax 0.10 takes each axis in a flat `in_axes` for a leaf's.
    return jax.pmap(
        program,
        axis_name="batch",
        in_axes=(None, (None,), *[0] * batches),
        static_broadcasted_argnums=0,
        donate_argnums=tuple(2 + d for d in donate),
        devices=devices,
    )


class Parts(NamedTuple):
    """A pytree taken apart into what is split over devices, what is shared, and what is static."""

    outline: Any
    """Hashable: the structure, and for each leaf the axis that counts images, or None."""
    shared: tuple[Any, ...]
    each: tuple[Any, ...]
    """Leaves that differ by image, that axis first."""

    @classmethod
    def of(cls, tree: Any, axis: Callable[[Any], int | None]) -> "Parts":
        """`axis` says which axis of a leaf counts images: None for a leaf without one."""
        leaves, structure = jax.tree.flatten(tree)
        axes = tuple(axis(leaf) for leaf in leaves)
        # Random keys travel as the integers that they are made of.
        kinds = tuple(jax.random.key_impl(leaf) if is_key(leaf) else None for leaf in leaves)
        leaves = [jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in leaves]
        pairs = list(zip(leaves, axes, strict=True))
        shared = tuple(leaf for leaf, at in pairs if at is None)
        each = tuple(np.moveaxis(np.asarray(leaf), at, 0) for leaf, at in pairs if at is not None)
        return cls((structure, axes, kinds), shared, each)

    def whole(self) -> Any:
        """The pytree again; inside a program too."""
        structure, axes, kinds = self.outline
        shared, each = iter(self.shared), iter(self.each)
        leaves = []
        for at, kind in zip(axes, kinds, strict=True):
            leaf = next(shared) if at is None else jnp.moveaxis(next(each), 0, at)
            leaves.append(leaf if kind is None else jax.random.wrap_key_data(leaf, impl=kind))
        return jax.tree.unflatten(structure, leaves)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of random keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
