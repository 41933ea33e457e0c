"""Tensors to params on the device, one at a time, cast on the way."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdjax.checkpoints.naming import Shaped, check, leaves, to_flax_axes
from sdjax.checkpoints.tensors import FLOATS, Tensor
from sdjax.errors import InputError


def to_params(
    network: Shaped,
    tensors: Mapping[str, Tensor],
    *,
    dtype: np.dtype | None = None,
    where: str | Path = "the checkpoint",
    done: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """A network's params from its checkpoint, one tensor at a time, cast on the way.

    Args:
        network: what the checkpoint's config describes.
        tensors: what the file has, under any of its spellings.
        dtype: what to cast to; None keeps what is stored (float64 becomes float32).
        where: the file or folder, for errors.
        done: called with the number of bytes of each tensor that has been read.

    Returns:
        A nested dict of jax arrays on the default device.

    Raises:
        InputError: as `check`; also a NaN or an infinity, or a value that `dtype` cannot hold.
    """
    params: dict[str, Any] = {}
    found = check(network, tensors, where)
    try:
        for key, tensor in found.items():
            path = leaves(network)[key].path
            node = params
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = place(tensor, path[-1], dtype)
            if done is not None:
                done(tensor.nbytes)
    except BaseException:
        # Whoever keeps the error, as notebooks do, keeps this frame: free the device all the same.
        for leaf in jax.tree.leaves(params):
            leaf.delete()
        raise
    return params


def place(tensor: Tensor, leaf: str, dtype: np.dtype | None) -> jax.Array:
    """One tensor on the device with Linen's axes, its pages in the file released."""
    target = dtype or (FLOATS[2] if tensor.dtype == np.float64 else tensor.dtype)
    source = tensor.read()
    if not finite(source):
        raise InputError(
            f"{tensor.path}: tensor {tensor.name!r} holds NaN or infinity: the weights are "
            "damaged, use another copy"
        )
    source = to_flax_axes(leaf, source)
    array = aligned(source.shape, target)
    with np.errstate(over="ignore"):
        np.copyto(array, source, casting="unsafe")
    tensor.release()
    if target.itemsize < tensor.dtype.itemsize and not finite(array):
        raise InputError(
            f"{tensor.path}: tensor {tensor.name!r} holds values too large for {target.name}: "
            "load it as float32 or bfloat16"
        )
    return jax.device_put(array)


def dtype_name(dtype: Any) -> str:
    """The name of a dtype, however it is given."""
    try:
        return dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        return str(dtype)[:60]


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte border, which jax on the CPU adopts without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


_EXPONENTS = {
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
    "float32": (np.uint32, 0x7F800000),
    "float64": (np.uint64, 0x7FF0000000000000),
}


def finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite: none has all exponent bits set.

    A bit test is exact in every format, and in blocks it needs no memory to speak of.
    """
    unsigned, mask = _EXPONENTS[array.dtype.name]
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    flat = array.reshape(-1).view(unsigned)
    block = 1 << 16
    return all(
        int((flat[i : i + block] & unsigned(mask)).max()) != mask
        for i in range(0, flat.size, block)
    )
