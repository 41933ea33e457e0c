"""DPM-Solver-2 as k-diffusion steps it: second order, two evaluations a step."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.diffusion.stochastic import ancestral, churn, renoise
from sdjax.types import Denoiser, Latents, Sigma, State, Step, StepNoise, pytree


@pytree
class DPM2:
    """The midpoint method, its middle even in log sigma. Order 2, two evaluations a step, one where
    it ends at 0.

    DPM-Solver-2 of Lu et al. (2206.00927), algorithm 1, in sigma space; with churn, which is as in
    `Euler`, k-diffusion's `sample_dpm_2`.
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
        return midpoint(denoise, x, sigma, at.sigma_next), state


@pytree
class DPM2Ancestral:
    """`DPM2` down to a lower level, then fresh noise back up. Order 2 at `eta` 0, two evaluations
    a step, one where it ends at 0, one draw.

    k-diffusion's `sample_dpm_2_ancestral`. Its quirk is kept: where `eta` above 1 asks for all of a
    level as noise, the step goes down to 0 and none is added.
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
        def beside(x: Latents, sigma: Sigma) -> Latents:
            """At eta 1 a middle is the next level but for rounding; kept above it, for a plan's
            timestep of a level need not be a middle's (diffusers rounds the one only).
            """
            near = jnp.abs(sigma - at.sigma_next) <= 1e-6 * at.sigma_next
            off = jnp.where(near, at.sigma_next * (1 + 2.0**-23) - sigma, 0.0)
            return denoise(x, sigma + jax.lax.stop_gradient(off))

        down, up = ancestral(at.sigma, at.sigma_next, self.eta)
        x = midpoint(beside, x, at.sigma, down)
        std = jnp.where(down > 0, up, 0.0) * self.s_noise
        return renoise(x, std, lambda: noise(at.sigma, at.sigma_next)), state


def midpoint(denoise: Denoiser, x: Latents, sigma: Sigma, down: Sigma) -> Latents:
    """From sigma along the slope at the geometric mean; Euler's step where `down` is 0."""
    x0 = denoise(x, sigma)
    euler = x0 + down / sigma * (x - x0)
    more = down > 0
    middle = jnp.sqrt(sigma * jnp.where(more, down, sigma))

    def correct(euler: Latents) -> Latents:
        half = x0 + middle / sigma * (x - x0)
        slope = (half - denoise(half, middle)) / middle
        return jnp.where(more, x + (down - sigma) * slope, euler)

    return jax.lax.cond(jnp.any(more), correct, lambda euler: euler, euler)
