"""Noise that belongs to an image: a function of its seed, the step and the draw only."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from sdjax.errors import InputError
from sdjax.types import Draw, Index, Latents, Sigma, pytree, static

START = 2**32 - 1
"""The fold for starting noise; steps fold in their index, which stays far below."""


def key(seed: Any) -> Key[Array, ""]:
    """The key of one image: all 64 bits of the seed count (`jax.random.key` keeps the lower 32).

    Equals `jax.random.key(seed)` for seeds below 2**32.
    """
    return keys([seed])[0]


def keys(seeds: Iterable[Any]) -> Key[Array, "b"]:
    """One key an image from seeds 0 .. 2**64 - 1: Python or numpy integers."""
    words = np.array([divmod(_seed(s), 2**32) for s in seeds], np.uint32).reshape(-1, 2)
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def _seed(seed: Any) -> int:
    if (
        isinstance(seed, bool | np.bool_)
        or not isinstance(seed, int | np.integer)
        or not 0 <= seed < 2**64
    ):
        raise InputError(f"a seed must be a whole number from 0 to 2**64 - 1, got {seed!r:.60}")
    return int(seed)


def start(keys: Key[Array, "b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Unit starting noise [b, *shape], float32; row i is the same bits alone and in any batch."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, START), shape, jnp.float32))(
        keys
    )


@pytree
class White:
    """Fresh unit noise for every image, step and draw: the key folds in (index, draw).

    Never the bits of sigma: a rounding difference would make another picture. Keys are [b], `shape`
    is one image's.
    """

    keys: Any
    shape: tuple[int, ...] = static()

    def __call__(self, index: Index, sigma: Sigma, sigma_next: Sigma, draw: Draw = 0) -> Latents:
        step = jnp.broadcast_to(jnp.asarray(index).reshape(-1), self.keys.shape)

        def one(key: Key[Array, ""], i: Array) -> Array:
            return jax.random.normal(
                jax.random.fold_in(jax.random.fold_in(key, i), draw), self.shape, jnp.float32
            )

        return jax.vmap(one)(self.keys, step)


@pytree
class Tape:
    """Recorded noise, to repeat what another program drew: `draws` [n, b, h, w, c], or [n, draws,
    b, h, w, c].
    """

    draws: Any

    @property
    def image_axis(self) -> int:
        """Where the leaf counts images, for whoever splits a batch."""
        return jnp.ndim(self.draws) - 4

    def check(self, steps: int, shape: tuple[int, ...]) -> None:
        """Refuse a tape that is too short, or of other images than [b, h, w, c] = `shape`."""
        own = jnp.shape(self.draws)
        if len(own) not in (5, 6) or own[0] < steps or own[-4:] != tuple(shape):
            wanted = [steps, *shape]
            raise InputError(
                f"a tape for {steps} steps holds draws {wanted} (or [n, draws, b, h, w, c]), "
                f"got {list(own)}"
            )

    def __call__(self, index: Index, sigma: Sigma, sigma_next: Sigma, draw: Draw = 0) -> Latents:
        draws = jnp.asarray(self.draws)
        if draws.ndim == 5:
            draws = draws[:, None]
        if isinstance(draw, int) and not 0 <= draw < draws.shape[1]:
            raise InputError(
                f"this sampler draws {draw + 1} times a step, but the tape holds {draws.shape[1]}: "
                "pass draws [n, draws, b, h, w, c]"
            )
        # A draw that is counted inside the program: NaN past the end, not the last one again.
        draws = draws.at[:, draw].get(mode="fill", fill_value=jnp.nan)
        index = jnp.asarray(index)
        if index.ndim == 0:
            return draws[index]
        return jnp.take_along_axis(draws, index[None], axis=0)[0]
