"""A network's first weights."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Key

from sdjax.checkpoints import naming, shapes
from sdjax.model import Params
from sdjax.types import Array


def fresh(module: Any, key: Key[Array, ""]) -> Params:
    """Draw a network's params: normal kernels of variance 1/fan-in; a UNet's branches end in 0.

    As in the paper's code, the last convolution of every residual branch and the network's own are
    zero, so that training starts from the identity (cf. Zhang et al. 2019, arXiv 1901.09321).
    """
    leaves = list(naming.flatten(shapes.params(module)))
    drawn = {path: _fan_in(path, leaf.shape) for path, leaf in leaves if _is_drawn(path)}
    values = _normal(key, tuple(leaf.shape for path, leaf in leaves if path in drawn))
    params: dict[str, Any] = {}
    for path, leaf in leaves:
        node = functools.reduce(lambda tree, name: tree.setdefault(name, {}), path[:-1], params)
        if path in drawn:
            node[path[-1]] = values.pop(0) / drawn[path] ** 0.5
        else:
            node[path[-1]] = jnp.full(leaf.shape, float(path[-1] == "scale"))
    return params


def _is_drawn(path: tuple[str, ...]) -> bool:
    return path[-1] in ("kernel", "embedding") and path[-2] not in ("conv2", "proj_out", "conv_out")


def _fan_in(path: tuple[str, ...], shape: tuple[int, ...]) -> int:
    return shape[-1] if path[-1] == "embedding" else math.prod(shape[:-1])


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: Key[Array, ""], sizes: tuple[tuple[int, ...], ...]) -> list[Array]:
    """All arrays from one draw: a draw for each takes minutes to compile."""
    counts = [math.prod(shape) for shape in sizes]
    parts = jnp.split(jax.random.normal(key, (sum(counts),)), np.cumsum(counts)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, sizes, strict=True)]
