"""Heun's method: second order, two evaluations a step."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.diffusion.stochastic import churn
from sdjax.types import Denoiser, Latents, State, Step, StepNoise, pytree


@pytree
class Heun:
    """Euler's step, then again with the mean of both slopes. Order 2, two evaluations a step, one
    where it ends at 0.

    Karras et al. (2206.00364), algorithm 2: EDM's sampler. Churn is as in `Euler`.
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
        slope = (x - x0) / sigma
        euler = x0 + at.sigma_next * slope
        more = at.sigma_next > 0
        safe = jnp.where(more, at.sigma_next, at.sigma)

        def correct(euler: Latents) -> Latents:
            slope_next = (euler - denoise(euler, safe)) / safe
            mean = x + (at.sigma_next - sigma) * (slope + slope_next) / 2
            return jnp.where(more, mean, euler)

        return jax.lax.cond(jnp.any(more), correct, lambda euler: euler, euler), state
