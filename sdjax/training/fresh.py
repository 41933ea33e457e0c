"""A network's first weights."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Key

from sdjax.checkpoints import naming
from sdjax.model import Params
from sdjax.types import Array


@functools.partial(jax.jit, static_argnums=0)
def fresh(module: nn.Module, key: Key[Array, ""]) -> Params:
    """Draw a network's params: normal kernels of variance 1/fan-in; a UNet's branches end in 0.

    As in the paper's code, the last convolution of every residual branch and the network's own are
    zero, so that training starts from the identity (cf. Zhang et al. 2019, arXiv 1901.09321).
    """
    shapes = {
        leaf.path: naming.to_flax_shape(leaf.path[-1], leaf.shape)
        for leaf in naming.leaves(module).values()
    }
    drawn = {path: shape for path, shape in shapes.items() if _is_drawn(path)}
    values = dict(zip(drawn, cut(jax.random.normal, key, list(drawn.values())), strict=True))
    params: dict[str, Any] = {}
    for path, shape in shapes.items():
        node = functools.reduce(lambda tree, name: tree.setdefault(name, {}), path[:-1], params)
        if path in values:
            table = path[-1] == "embedding"
            fan_in = shape[-1] if table else math.prod(shape[:-1])
            node[path[-1]] = values[path] / fan_in**0.5
        else:
            node[path[-1]] = jnp.full(shape, float(path[-1] == "scale"))
    return params


def cut(draw: Callable[..., Array], key: Key[Array, ""], sizes: list[tuple[int, ...]]) -> list:
    """Arrays of these shapes from one draw: a draw for each takes minutes to compile."""
    if not sizes:
        return []
    counts = [math.prod(shape) for shape in sizes]
    parts = jnp.split(draw(key, (sum(counts),)), np.cumsum(counts)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, sizes, strict=True)]


def _is_drawn(path: tuple[str, ...]) -> bool:
    return path[-1] in ("kernel", "embedding") and path[-2] not in ("conv2", "proj_out", "conv_out")
