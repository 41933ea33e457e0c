"""Batches over all local devices: the only file that names devices, and it knows no task.

A program is written for one device and a batch [b, ...]. Here the batch is padded to a multiple of
the device count, split to [devices, b / devices, ...] and mapped with `jax.pmap`. Every process of
a pod maps over its own devices: sampling needs no communication between them. Training does: its
programs are written for the whole batch and all devices, and `mesh` and `shardings` say where the
arrays lie.
"""

import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdjax.errors import InputError

T = TypeVar("T")

_SMALL = 2**14
"""Numbers in an array below which it is not worth splitting."""


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


def start_processes() -> None:
    """Join the processes of a pod or a cluster, where the environment says there is one.

    jax finds TPU pods, Slurm and Open MPI by itself; elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say it. Call it before anything computes. Once only.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID")}
    if "JAX_COORDINATOR_ADDRESS" in os.environ and all(given.values()):
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(given["NUM_PROCESSES"] or 1),
            int(given["PROCESS_ID"] or 0),
        )
    elif any(name in os.environ for name in ("TPU_WORKER_HOSTNAMES", "SLURM_JOB_ID")):
        hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
        if len(hosts) > 1 or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            jax.distributed.initialize()


def process() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return jax.process_index(), jax.process_count()


def first_alone(make: Callable[[], T]) -> T:
    """`make()` in every process, in the first one before all others.

    What it writes to a disk that they share, the others find.
    """
    index, count = process()
    if count == 1:
        return make()
    from jax.experimental import multihost_utils

    made = make() if index == 0 else None
    multihost_utils.sync_global_devices("first_alone")
    return make() if made is None else made


def mesh(fsdp: int = 1) -> Mesh:
    """All devices of all processes, as (data, fsdp): params lie in `fsdp` parts, see `shardings`.

    InputError: `fsdp` does not divide the number of devices.
    """
    devices = np.array(jax.devices())
    if devices.size % fsdp:
        raise InputError(
            f"mesh.fsdp must divide the number of devices, {devices.size}, got {fsdp}: try "
            f"{math.gcd(fsdp, devices.size)}"
        )
    return Mesh(devices.reshape(-1, fsdp), ("data", "fsdp"))


def shardings(tree: Any, over: Mesh) -> Any:
    """How each array of a tree lies on a mesh, by one rule for params, averages and moments.

    The longest axis that `fsdp` divides is split over it (Zhao et al. 2023, arXiv 2304.11277; ZeRO,
    arXiv 1910.02054); arrays of fewer than 2^14 numbers, and those without such an axis, are whole
    on every device.
    """
    parts = over.shape["fsdp"]

    def rule(leaf: Any) -> NamedSharding:
        axes = [n for n, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or not axes or math.prod(leaf.shape) < _SMALL:
            return NamedSharding(over, PartitionSpec())
        longest = max(axes, key=lambda n: leaf.shape[n])
        return NamedSharding(over, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(rule, tree)


def whole(over: Mesh) -> NamedSharding:
    """All of an array on every device."""
    return NamedSharding(over, PartitionSpec())


def rows(over: Mesh) -> NamedSharding:
    """An array's first axis split over all devices."""
    return NamedSharding(over, PartitionSpec(("data", "fsdp")))


def check_batch(size: int, over: Mesh) -> None:
    """Refuse a batch that cannot be split over the mesh.

    InputError: the number of devices does not divide `size`.
    """
    if size % over.size:
        more = -(-size // over.size) * over.size
        raise InputError(
            f"run.batch_size must be a multiple of the number of devices, {over.size}, got {size}: "
            f"try {more}"
        )


def distribute(batch: Any, over: Mesh) -> Any:
    """This process's rows of a batch, as parts of arrays [b, ...] that lie on all devices."""
    sharding = rows(over)
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), batch
    )


def gather(tree: Any) -> Any:
    """Numpy arrays of a tree that lies anywhere on the mesh, whole, in every process."""
    from jax.experimental import multihost_utils

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)
