"""Torch's names and axes to Linen's and back: the one renaming rule.

A Linen path is the Hugging Face key with slashes for dots, where a number joins the name before it
(`down_blocks.0.resnets.1.conv1.weight` -> `down_blocks_0/resnets_1/conv1/kernel`). A weight of two
or more axes is a kernel: its output axis is first in torch and last here ([out, in] -> [in, out],
OIHW -> HWIO); a norm's weight is its scale, an embedding's its table, and neither is transposed.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np

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
        table = ndim == 2 and path and path[-1].endswith("embedding")
        leaf = "embedding" if table else "kernel" if ndim > 1 else "scale"
    return (*path, leaf)


def to_torch_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The torch shape of a Linen leaf."""
    return (shape[-1], shape[-2], *shape[:-2]) if leaf == "kernel" else tuple(shape)


def to_flax_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The Linen shape of a torch weight."""
    return (*shape[2:], shape[1], shape[0]) if leaf == "kernel" else tuple(shape)


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


@runtime_checkable
class Shaped(Protocol):
    """A network or its config: hashable, and it says which weights a checkpoint must have."""

    kind: ClassVar[str]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the torch shape of every weight by its torch key."""
        ...

    def __hash__(self) -> int: ...


@functools.lru_cache(maxsize=64)
def leaves(network: Shaped) -> dict[str, Leaf]:
    """Every parameter of a network by its torch key, in the order of a sorted tree of params."""
    shapes = network.shapes()
    found = {key: Leaf(flax_path(key, len(shape)), shape) for key, shape in shapes.items()}
    return dict(sorted(found.items(), key=lambda item: item[1].path))


def respell(tensors: Mapping[str, Tensor], network: Shaped) -> dict[str, Tensor]:
    """The tensors under the keys of `leaves(network)`, whichever spelling the file has.

    transformers 5.6 dropped CLIP's `text_model.`; diffusers 0.17 renamed the autoencoder's
    attention from `query, key, value, proj_attn` to `to_q, to_k, to_v, to_out.0`.
    """
    wanted = leaves(network)
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


def check(network: Shaped, tensors: Mapping[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """Hold a checkpoint's headers against a network: keys, shapes and dtypes; reads no weights.

    Args:
        network: what the checkpoint's config describes.
        tensors: what the file has.
        where: the file or folder, for the error.

    Returns:
        The tensor of every key of `leaves(network)`, in its order.

    Raises:
        InputError: keys missing or too many, a wrong shape, a dtype that is not a float.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS and not TOLERATED.fullmatch(key):
            raise InputError(
                f"{tensor.path}: tensor {tensor.name[:100]!r} is {tensor.dtype.name}, where a "
                "float belongs: use an unquantised checkpoint in float32, float16 or bfloat16"
            )
    kind, wanted = network.kind, leaves(network)
    found = respell(tensors, network)
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


def flatten(params: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The paths and arrays of a nested dict of params."""
    for name, node in params.items():
        if isinstance(node, Mapping):
            for path, leaf in flatten(node):
                yield (name, *path), leaf
        else:
            yield (name,), node
