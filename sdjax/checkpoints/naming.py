"""Torch's names and axes to Linen's and back: the one renaming rule.

A Linen path is the Hugging Face key with slashes for dots, where a number joins the name before it
(`down_blocks.0.resnets.1.conv1.weight` -> `down_blocks_0/resnets_1/conv1/kernel`). A weight of two
or more axes is a kernel: its output axis is first in torch and last here ([out, in] -> [in, out],
OIHW -> HWIO); a norm's weight is its scale, an embedding's its table, and neither is transposed.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from sdjax.checkpoints import shapes
from sdjax.checkpoints.tensors import FLOATS, Tensor
from sdjax.errors import InputError

NUMBERED = frozenset({"linear_1", "linear_2"})
"""Names that end in a number by themselves: the two layers of a time embedding."""

TOLERATED = re.compile(r"(text_model\.)?embeddings\.position_ids")
"""Extra keys that are ignored: the constant 0, 1, ... that old transformers saved as a weight."""

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def torch_key(path: tuple[str, ...]) -> str:
    """The Hugging Face key of a Linen path."""
    *names, leaf = path
    names = [n if n in NUMBERED else re.sub(r"_(\d+)$", r".\1", n) for n in names]
    return ".".join([*names, LEAVES.get(leaf, leaf)])


def flax_path(key: str, ndim: int) -> tuple[str, ...]:
    """The Linen path of a Hugging Face key whose array has `ndim` axes."""
    *names, leaf = key.split(".")
    path: list[str] = []
    for name in names:
        if name.isdigit() and path:
            path[-1] = f"{path[-1]}_{name}"
        else:
            path.append(name)
    if leaf == "weight":
        table = ndim == 2 and path and path[-1].endswith("_embedding")
        leaf = "embedding" if table else "kernel" if ndim > 1 else "scale"
    return (*path, leaf)


def to_torch_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The torch shape of a Linen leaf."""
    return (shape[-1], shape[-2], *shape[:-2]) if leaf == "kernel" else tuple(shape)


def to_flax_axes(leaf: str, array: np.ndarray) -> np.ndarray:
    """A view of a torch array with Linen's axes: [out, in, *space] -> [*space, in, out]."""
    if leaf != "kernel":
        return array
    return array.transpose(*range(2, array.ndim), 1, 0)


def to_torch_axes(leaf: str, array: np.ndarray) -> np.ndarray:
    """A view of a Linen array with torch's axes: [*space, in, out] -> [out, in, *space]."""
    if leaf != "kernel":
        return array
    return array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))


class Leaf(NamedTuple):
    """One parameter of a module: where it is, and its shape in torch."""

    path: tuple[str, ...]
    shape: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def leaves(module: nn.Module) -> dict[str, Leaf]:
    """Every parameter of a module by its torch key, from its shapes alone."""
    found = {}
    for path, leaf in flatten(shapes.params(module)):
        found[torch_key(path)] = Leaf(path, to_torch_shape(path[-1], leaf.shape))
    return found


def expected(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The torch keys and torch shapes that a module's checkpoint must have; allocates nothing."""
    return {key: leaf.shape for key, leaf in leaves(module).items()}


def respell(tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The tensors under the keys of `expected(module)`, whichever spelling the file has.

    transformers 5.6 dropped CLIP's `text_model.`; diffusers 0.17 renamed the autoencoder's
    attention from `query, key, value, proj_attn` to `to_q, to_k, to_v, to_out.0`.
    """
    wanted = leaves(module)
    prefixed = any(key.startswith("text_model.") for key in wanted)
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    spelled: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key
        if name not in wanted and not prefixed:
            name = name.removeprefix("text_model.")
        elif name not in wanted and f"text_model.{name}" in wanted:
            name = f"text_model.{name}"
        if name not in wanted:
            parts = name.split(".")
            if len(parts) > 1 and parts[-2] in old:
                renamed = ".".join([*parts[:-2], old[parts[-2]], parts[-1]])
                name = renamed if renamed in wanted else name
        if name in spelled:
            raise InputError(
                f"{tensor.path}: {spelled[name].name[:100]!r} and {key[:100]!r} are two spellings "
                "of one weight: keep one of them"
            )
        spelled[name] = tensor
    return spelled


def check(module: nn.Module, tensors: Mapping[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """Hold a checkpoint's headers against a module: keys, shapes and dtypes; reads no weights.

    Args:
        module: the network, built from the checkpoint's config.
        tensors: what the file has.
        where: the file or folder, for the error.

    Returns:
        The tensor of every key of `expected(module)`, in its order.

    Raises:
        InputError: keys missing or too many, a wrong shape, a dtype that is not a float.
    """
    kind = type(module).__name__
    # What the headers alone can say comes first: tracing a large network takes seconds.
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS and not TOLERATED.fullmatch(key):
            raise InputError(
                f"{tensor.path}: tensor {tensor.name[:100]!r} is {tensor.dtype.name}, where a "
                "float belongs: use an unquantised checkpoint in float32, float16 or bfloat16"
            )
    wanted = leaves(module)
    found = respell(tensors, module)
    missing = [key for key in wanted if key not in found]
    extra = [key for key in found if key not in wanted and not TOLERATED.fullmatch(key)]
    if missing:
        also = f", and has {count(extra)} that it does not know" if extra else ""
        raise InputError(
            f"{where} lacks {count(missing)} of the {kind} that its config describes{also}: "
            "use the config that belongs to these weights, or a complete download"
        )
    if extra:
        raise InputError(
            f"{where} has {count(extra)} that the {kind} its config describes does not know: use "
            "the config that belongs to these weights, or remove them"
        )
    for key, leaf in wanted.items():
        tensor = found[key]
        if tensor.shape != leaf.shape:
            raise InputError(
                f"{tensor.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, and the "
                f"{kind} its config describes needs {list(leaf.shape)}: use the config that "
                "belongs to these weights"
            )
    return {key: found[key] for key in wanted}


def count(keys: list[str]) -> str:
    """How many keys, and the first few of them."""
    if len(keys) == 1:
        return f"the key {keys[0][:100]!r}"
    shown = ", ".join(repr(key[:100]) for key in keys[:3])
    return f"{len(keys)} keys ({shown}{', ...' if len(keys) > 3 else ''})"


def to_params(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    dtype: np.dtype | None = None,
    where: str | Path = "the checkpoint",
    done: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """A module's params from its checkpoint, one tensor at a time, cast on the way.

    Args:
        module: the network, built from the checkpoint's config.
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
    found = check(module, tensors, where)
    try:
        for key, tensor in found.items():
            path = leaves(module)[key].path
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


def flatten(params: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The paths and arrays of a nested dict of params."""
    for name, node in params.items():
        if isinstance(node, Mapping):
            for path, leaf in flatten(node):
                yield (name, *path), leaf
        else:
            yield (name,), node
