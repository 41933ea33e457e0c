"""How likely an image is under a denoiser: the density that its probability-flow ODE carries."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from sdjax.errors import InputError
from sdjax.types import Array, Denoiser, Latents, Sigma


class Likelihood(NamedTuple):
    """Of each image, at the lowest noise level."""

    log_prob: Float[Array, " b"]  # natural logarithm of the density
    noise: Float[Array, "b h w c"]  # where the ODE takes the image, at the highest level


def log_likelihood(
    denoise: Denoiser,
    x: Latents,
    sigmas: Any,
    keys: Any = None,
    probes: int = 1,
    data_mean: ArrayLike = 0.0,
    data_std: ArrayLike = 1.0,
) -> Likelihood:
    """The log density of x at the lowest of `sigmas`, by following it up to the highest.

    Song et al. (2011.13456), section 4.3, in sigma space: along dx / d log sigma =
    x - D(x), log p falls by the divergence, d - tr dD/dx. Order 4 (Runge and Kutta's classical
    method in log sigma), four evaluations a step, each with its trace: exactly, by d directional
    derivatives, or with `keys` [b] by Hutchinson's estimate from `probes` random signs, the same
    ones all along (Grathwohl et al., 1810.01367). At the top p is N(data_mean, data_std^2 +
    sigma_max^2), wrong by about |mean - data_mean| / sigma_max for each image, and less on average.

    `sigmas` [n+1] lie above 0, rising or falling, as for `spacings.exponential(n, low, high)[:-1]`.
    `x` is what stands at the lowest: an image with that noise on it, or an image itself where it is
    low enough.
    """
    levels = _rising(sigmas)
    x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    signs = None if keys is None else _signs(keys, probes, x)
    times = jnp.log(jnp.asarray(levels, x.dtype))

    def slope(x: Latents, t: Any) -> tuple[Latents, Any]:
        x0, trace = _traced(denoise, x, jnp.exp(t), signs)
        return x - x0, x[0].size - trace

    def step(carry: tuple[Latents, Any], span: tuple[Any, Any]) -> tuple[tuple[Latents, Any], None]:
        (x, total), (t, end) = carry, span
        h = end - t
        k1, d1 = slope(x, t)
        k2, d2 = slope(x + h / 2 * k1, t + h / 2)
        k3, d3 = slope(x + h / 2 * k2, t + h / 2)
        k4, d4 = slope(x + h * k3, end)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return (x, total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)), None

    begin = (x, jnp.zeros(x.shape[0], x.dtype))
    (noise, grown), _ = jax.lax.scan(step, begin, (times[:-1], times[1:]))
    variance = jnp.square(jnp.exp(times[-1])) + jnp.square(data_std)
    square = jnp.sum(jnp.square(noise - data_mean), axis=(1, 2, 3)) / variance
    prior = -0.5 * (square + x[0].size * jnp.log(2 * math.pi * variance))
    return Likelihood(prior + grown, noise)


def bits_per_dimension(log_prob: Array, size: int, width: float = 1.0) -> Array:
    """-log2 p a value, of images of `size` values in bins of `width`: 2 / 255 for bytes as -1 .. 1.

    Theis et al. (1511.01844), section 3.1. With width 1 it is the density's own.
    """
    return -log_prob / (size * math.log(2)) - math.log2(width)


def _traced(
    denoise: Denoiser, x: Latents, sigma: Sigma, signs: Any
) -> tuple[Latents, Float[Array, " b"]]:
    """The estimate, and the trace of its Jacobian for each image."""
    x0, push = jax.linearize(lambda x: denoise(x, sigma), x)
    size = x[0].size

    def along(total: Any, direction: Any) -> tuple[Any, None]:
        if signs is None:  # a unit vector, by its index
            direction = jax.nn.one_hot(direction, size, dtype=x.dtype).reshape(x.shape[1:])
            direction = jnp.broadcast_to(direction, x.shape)
        return total + jnp.sum(direction * push(direction), axis=(1, 2, 3)), None

    directions = jnp.arange(size) if signs is None else signs
    total, _ = jax.lax.scan(along, jnp.zeros(x.shape[0], x.dtype), directions)
    return x0, total if signs is None else total / signs.shape[0]


def _signs(keys: Any, probes: int, x: Latents) -> Float[Array, "p b h w c"]:
    if probes < 1:
        raise InputError(f"probes must be at least 1, got {probes}")
    if keys.shape != x.shape[:1]:
        raise InputError(
            f"keys must be one an image, [{x.shape[0]}], got {list(keys.shape)}: "
            "use sdjax.diffusion.noise.keys(seeds)"
        )

    def one(key: Any) -> Any:
        return jax.random.rademacher(key, (probes, *x.shape[1:]), x.dtype)

    return jnp.moveaxis(jax.vmap(one)(keys), 0, 1)


def _rising(sigmas: Any) -> Any:
    """Concrete levels are checked, and turned around if they fall."""
    if isinstance(sigmas, jax.core.Tracer):
        return sigmas
    levels = np.asarray(sigmas)
    if levels.ndim == 1 and levels.size > 1 and levels[0] > levels[-1]:
        levels = levels[::-1]
    if levels.ndim != 1 or levels.size < 2 or not ((levels[:1] > 0) & (np.diff(levels) > 0)).all():
        raise InputError(
            "sigmas must be [n+1] different levels above 0, in order: leave out the last 0 of a "
            "spacing"
        )
    return levels
