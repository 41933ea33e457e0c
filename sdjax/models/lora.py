"""Low-rank updates of kernels: the mathematics of LoRA, for any network."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from sdjax.types import Array

Tree = dict[str, Any]


def merge(params: Tree, lora: Tree, scale: float = 1.0, *, dtype: Any = None) -> Tree:
    """The params with W + scale * a b in the place of every kernel W that `lora` updates.

    Hu et al. 2021 (arXiv 2106.09685), equation 3; `scale` is alpha / rank there, 1 for what
    `load_lora` gives. `lora` is nested as the params are, of one network or of a dictionary of
    them, with {"a": [..., in, rank], "b": [rank, out]} where the params have a layer. The params
    stay as they are; updated kernels keep their dtype, or get `dtype`.
    """
    merged = dict(params)
    for name, node in lora.items():
        if is_pair(node):
            kernel = params[name]["kernel"]
            merged[name] = dict(params[name], kernel=_updated(kernel, node, scale, dtype))
        else:
            merged[name] = merge(params[name], node, scale, dtype=dtype)
    return merged


def is_pair(node: Any) -> bool:
    """Whether a node of a tree of updates is one layer's."""
    return set(node) == {"a", "b"} and not any(isinstance(leaf, dict) for leaf in node.values())


def _updated(
    kernel: Float[Array, "*space c k"], pair: Tree, scale: float, dtype: Any
) -> Float[Array, "*space c k"]:
    a, b = jnp.asarray(pair["a"], jnp.float32), jnp.asarray(pair["b"], jnp.float32)
    return (kernel + scale * jnp.matmul(a, b)).astype(dtype or kernel.dtype)
