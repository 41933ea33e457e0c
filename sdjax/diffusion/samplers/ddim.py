"""DDIM: first order, one evaluation a step."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.diffusion.samplers.euler import ancestral
from sdjax.diffusion.sampling import pick
from sdjax.types import Denoiser, Latents, State, Step, StepNoise, pytree


@pytree
class DDIM:
    """Denoising diffusion implicit models. Order 1, one evaluation a step, one draw where `eta` >
    0.

    Song et al. (2010.02502), eq. 12 and 16, in sigma space: `eta` 0 is Euler, 1 is DDPM.

    `landings` keeps a quirk of diffusers: its step always goes down by T // n timesteps, while the
    next evaluation stands where the spacing says, on the same variance-preserving latents. Sigmas
    [n] or [n, b, 1, 1, 1] where each step lands; None where the two agree.
    """

    eta: ArrayLike = 0.0
    landings: ArrayLike | None = None

    @property
    def stochastic(self) -> ArrayLike:
        return self.eta

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        landing = at.sigma_next
        if self.landings is not None:
            landing = pick(jnp.asarray(self.landings, x.dtype), at.index)
        x0 = denoise(x, at.sigma)
        down, up = ancestral(at.sigma, landing, self.eta)
        x = x0 + down / at.sigma * (x - x0)
        drawn = jnp.any(jnp.asarray(self.eta) != 0)
        x = jax.lax.cond(drawn, lambda x: x + up * noise(at.sigma, landing), lambda x: x, x)
        if self.landings is not None:
            x = x * jnp.sqrt((1 + at.sigma_next**2) / (1 + landing**2))
        return x, state
