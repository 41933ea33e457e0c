"""Euler's method and its ancestral form: first order, one evaluation a step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.types import Denoiser, Latents, Sigma, State, Step, StepNoise, pytree


@pytree
class Euler:
    """Euler's method for the probability-flow ODE. Order 1, one evaluation a step.

    Karras et al. (2206.00364), algorithm 2 without the correction. Churn adds noise before a step:
    up to `s_churn` over the whole run, where s_tmin <= sigma <= s_tmax, `s_noise` times its due.
    With `s_churn` 0 it is DDIM.
    """

    s_churn: ArrayLike = 0.0
    s_tmin: ArrayLike = 0.0
    s_tmax: ArrayLike = float("inf")
    s_noise: ArrayLike = 1.0

    @property
    def stochastic(self) -> ArrayLike:
        return self.s_churn

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        x, sigma = churn(x, at, noise, self.s_churn, self.s_tmin, self.s_tmax, self.s_noise)
        x0 = denoise(x, sigma)
        return x0 + at.sigma_next / sigma * (x - x0), state


@pytree
class EulerAncestral:
    """Euler down to a lower level, then fresh noise back up. Order 1, one evaluation a step, one
    draw where `eta` > 0.

    k-diffusion's `sample_euler_ancestral`. `eta` 1 is DDPM's posterior (2006.11239, eq. 7), 0 is
    Euler.
    """

    eta: ArrayLike = 1.0
    s_noise: ArrayLike = 1.0

    @property
    def stochastic(self) -> ArrayLike:
        return self.eta

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        x0 = denoise(x, at.sigma)
        down, up = ancestral(at.sigma, at.sigma_next, self.eta)
        x = x0 + down / at.sigma * (x - x0)
        return renoise(x, up * self.s_noise, lambda: noise(at.sigma, at.sigma_next)), state


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
