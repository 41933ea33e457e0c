"""Euler's method and its ancestral form: first order, one evaluation a step."""

from jax.typing import ArrayLike

from sdjax.diffusion.stochastic import ancestral, churn, renoise
from sdjax.types import Denoiser, Latents, State, Step, StepNoise, pytree


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
