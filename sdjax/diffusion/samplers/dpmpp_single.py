"""DPM-Solver++ within one step: no memory, two evaluations."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.diffusion.stochastic import ancestral, renoise
from sdjax.types import Denoiser, Latents, State, Step, StepNoise, pytree


@pytree
class DPMSolverPP2SAncestral:
    """The singlestep DPM-Solver++ down to a lower level, then fresh noise back up. Order 2 at `eta`
    0, two evaluations a step, one where it ends at 0, one draw.

    Lu et al. (2211.01095), algorithm 1 with r = 1/2: the estimate at the step's middle in log sigma
    replaces the first one. The noise is as in `EulerAncestral`; together they are k-diffusion's
    `sample_dpmpp_2s_ancestral`. `eta` 0 is DPM-Solver++(2S).
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
        more = down > 0
        middle = jnp.sqrt(at.sigma * jnp.where(more, down, at.sigma))

        def correct(x0: Latents) -> Latents:
            half = x0 + middle / at.sigma * (x - x0)
            return jnp.where(more, denoise(half, middle), x0)

        x0 = jax.lax.cond(jnp.any(more), correct, lambda x0: x0, x0)
        x = x0 + down / at.sigma * (x - x0)
        return renoise(x, up * self.s_noise, lambda: noise(at.sigma, at.sigma_next)), state
