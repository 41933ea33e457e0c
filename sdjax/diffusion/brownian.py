"""Noise of one Brownian path an image: the same picture under finer and finer steps."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from sdjax.types import Draw, Index, Latents, Sigma, pytree, static


@pytree
class BrownianTree:
    """A virtual Brownian tree: W at any noise level, in logarithmic time and no memory.

    Li et al. (2001.01328), section 4 and algorithm 3: from W(0) = 0 and W(sigma_max), Brownian
    bridges halve the interval that holds sigma, each with the key of its place in the tree. Time is
    sigma itself, as in k-diffusion's `BrownianTreeNoiseSampler`: the noise of a step is
    (W(sigma_next) - W(sigma)) / sqrt(|sigma_next - sigma|), of unit variance, and increments over
    a -> b and b -> c add up to that over a -> c.

    The noise of k-diffusion's SDE solvers where none is given (`sampling.noise_of`).

    A function of the image's key and the two levels alone: not of step, draw, schedule or batch.
    Keys are [b] (`noise.keys(seeds)`), `shape` is one image's; levels lie between 0 and
    `sigma_max`, else the noise is NaN. Another `sigma_max` is another path. `depth` halvings
    resolve sigma_max / 2^depth, by default 2.4e-7; below it the path is a straight line. A draw
    costs 2 `depth` normal arrays. Noise is a constant to gradients.
    """

    keys: Any
    shape: tuple[int, ...] = static()
    sigma_max: ArrayLike = 2.0**14
    depth: int = static(default=36)

    def __call__(self, index: Index, sigma: Sigma, sigma_next: Sigma, draw: Draw = 0) -> Latents:
        images = self.keys.shape
        a, b = (
            jax.lax.stop_gradient(jnp.broadcast_to(jnp.reshape(s, -1), images))
            for s in (sigma, sigma_next)
        )
        paths = jax.vmap(jax.vmap(self._path, (None, 0)))(self.keys, jnp.stack([a, b], 1))
        length = jnp.abs(b - a)
        scale = jnp.where(length > 0, jax.lax.rsqrt(jnp.where(length > 0, length, 1.0)), 0.0)
        outside = jnp.maximum(a, b) > self.sigma_max
        scale = jnp.where(outside, jnp.nan, scale).reshape(-1, *(1,) * len(self.shape))
        return scale * (paths[:, 1] - paths[:, 0])

    def _path(self, key: Key[Array, ""], sigma: Float[Array, ""]) -> Float[Array, "..."]:
        """W(sigma) of one image."""
        top = jnp.asarray(self.sigma_max, jnp.float32)
        root, key = jax.random.split(key)
        zero = jnp.zeros(self.shape, jnp.float32)
        end = jnp.sqrt(top) * jax.random.normal(root, self.shape, jnp.float32)

        def halve(_: Any, place: tuple) -> tuple:
            low, width, at_low, at_high, key = place
            own, *children = jax.random.split(key, 3)
            fresh = jax.random.normal(own, self.shape, jnp.float32)
            middle = (at_low + at_high) / 2 + jnp.sqrt(width) / 2 * fresh
            width = width / 2
            up = sigma >= low + width
            return (
                jnp.where(up, low + width, low),
                width,
                jnp.where(up, middle, at_low),
                jnp.where(up, at_high, middle),
                jnp.where(up, children[1], children[0]),
            )

        start = (jnp.zeros_like(top), top, zero, end, key)
        low, width, at_low, at_high, _ = jax.lax.fori_loop(0, self.depth, halve, start)
        return at_low + (sigma - low) / width * (at_high - at_low)
