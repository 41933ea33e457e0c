"""Gradient estimation: Euler's method with the slope led on from the step before."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.diffusion.guidance import with_negative
from sdjax.types import Denoiser, Latents, State, Step, StepNoise, pytree, static


@pytree
class GradientEstimation:
    """Euler's step along slope + (gamma - 1) (slope - slope_before). Order 1, one evaluation a
    step; Euler's on the first step and into 0.

    Permenter and Yuan (2306.04848), their gradient-estimation sampler, whose gamma is 2, in sigma
    space, as ComfyUI's `sample_gradient_estimation`. The difference is that of
    Adams and Bashforth's second order for even steps at `gamma` 1.5; 2 takes twice as much of it.
    `gamma` 1 is Euler.

    `plus_plus` is ComfyUI's `gradient_estimation_cfg_pp`, after CFG++ (Chung et al., 2406.08070):
    the denoiser is `guidance.cfg`'s, the step leaves from its estimate, and all slopes are the
    negative's. The guidance scale is CFG++'s strength, 0 to 1 in the paper.
    """

    gamma: ArrayLike = 2.0
    plus_plus: bool = static(default=False)

    @property
    def stochastic(self) -> bool:
        return False

    def init(self, x: Latents) -> State:
        return jnp.zeros_like(x)

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        if self.plus_plus:
            x0, negative = with_negative(denoise, x, at.sigma)
        else:
            x0 = negative = denoise(x, at.sigma)
        slope = (x - negative) / at.sigma
        plain = (at.index == 0) | (at.sigma_next == 0)
        more = jnp.where(plain, 0.0, (at.sigma_next - at.sigma) * (jnp.asarray(self.gamma) - 1))
        x = x0 + at.sigma_next * slope + more * (slope - state)
        return x, slope
