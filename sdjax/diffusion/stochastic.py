"""What stochastic samplers share: levels to step down to, and noise drawn only where asked for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.types import Latents, Sigma, Step, StepNoise


class Around:
    """A sampler around another, that draws as it does."""

    sampler: Any

    @property
    def stochastic(self) -> Any:
        return getattr(self.sampler, "stochastic", None)

    @property
    def brownian(self) -> bool:
        return getattr(self.sampler, "brownian", False)


def ancestral(sigma: Sigma, sigma_next: Sigma, eta: ArrayLike) -> tuple[Sigma, Sigma]:
    """The level to step down to, and the noise to add: down^2 + up^2 = sigma_next^2.

    up = eta sigma_next sqrt(1 - (sigma_next / sigma)^2), at most sigma_next: DDIM's eq. 16
    (2010.02502) in sigma.
    """
    keep = jnp.square(sigma_next / sigma)
    up = jnp.square(eta) * (1 - keep)
    down = (1 - jnp.square(eta)) + jnp.square(eta) * keep  # 1 - up, without its cancellation
    return sigma_next * root(jnp.minimum(down, 1.0)), sigma_next * root(jnp.minimum(up, 1.0))


def churn(
    x: Latents,
    at: Step,
    noise: StepNoise,
    s_churn: ArrayLike,
    s_tmin: ArrayLike,
    s_tmax: ArrayLike,
    s_noise: ArrayLike,
) -> tuple[Latents, Sigma]:
    """Noise up to sigma (1 + gamma), drawn only where some image asks for it.

    2206.00364, algorithm 2, lines 4-6.
    """
    inside = (s_tmin <= at.sigma) & (at.sigma <= s_tmax)
    steps = at.index + at.left
    gamma = jnp.where(inside, jnp.minimum(s_churn / steps, 2**0.5 - 1), 0.0).astype(x.dtype)

    def stir(x: Latents) -> Latents:
        fresh = noise(at.sigma, at.sigma * (1 + gamma))
        wider = at.sigma * root(gamma * (2 + gamma))  # sqrt(sigma_hat^2 - sigma^2)
        return jnp.where(gamma > 0, x + s_noise * wider * fresh, x).astype(x.dtype)

    return jax.lax.cond(jnp.any(gamma > 0), stir, lambda x: x, x), at.sigma * (1 + gamma)


def renoise(x: Latents, std: ArrayLike, draw: Callable[[], Latents]) -> Latents:
    """Add std * draw(), drawn only where some image asks for it."""

    def add(x: Latents) -> Latents:
        return (x + std * draw()).astype(x.dtype)

    return jax.lax.cond(jnp.any(jnp.asarray(std) != 0), add, lambda x: x, x)


def root(square: ArrayLike) -> jax.Array:
    """sqrt, 0 from 0 down, with a finite gradient there."""
    positive = jnp.asarray(square) > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
