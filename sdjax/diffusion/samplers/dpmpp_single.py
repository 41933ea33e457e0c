"""DPM-Solver++ within one step: no memory, two evaluations."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.diffusion.guidance import with_negative
from sdjax.diffusion.stochastic import ancestral, renoise
from sdjax.types import Denoiser, Latents, Sigma, State, Step, StepNoise, pytree, static


@pytree
class DPMSolverPP2SAncestral:
    """The singlestep DPM-Solver++ down to a lower level, then fresh noise back up. Order 2 at `eta`
    0, two evaluations a step, one where it ends at 0, one draw.

    Lu et al. (2211.01095), algorithm 1 with r = 1/2: the estimate at the step's middle in log sigma
    replaces the first one. The noise is as in `EulerAncestral`; together they are k-diffusion's
    `sample_dpmpp_2s_ancestral`. `eta` 0 is DPM-Solver++(2S).

    `plus_plus` is ComfyUI's `dpmpp_2s_ancestral_cfg_pp`, after CFG++ (Chung et al., 2406.08070):
    the denoiser is `guidance.cfg`'s, and x is moved by what the guided estimate has more than the
    negative's. ComfyUI's quirk is kept: in the second half that is the middle's negative, and still
    the first guided estimate. The guidance scale is CFG++'s strength, 0 to 1 in the paper.
    """

    eta: ArrayLike = 1.0
    s_noise: ArrayLike = 1.0
    plus_plus: bool = static(default=False)

    @property
    def stochastic(self) -> ArrayLike:
        return self.eta

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        def both(x: Latents, sigma: Sigma) -> tuple[Latents, Latents]:
            """The estimate, and where it is seen from: the negative's, or the same."""
            if self.plus_plus:
                return with_negative(denoise, x, sigma)
            x0 = denoise(x, sigma)
            return x0, x0

        guided, negative = both(x, at.sigma)
        down, up = ancestral(at.sigma, at.sigma_next, self.eta)
        more = down > 0
        middle = jnp.sqrt(at.sigma * jnp.where(more, down, at.sigma))

        def correct(first: tuple[Latents, Latents]) -> tuple[Latents, Latents]:
            half = guided + middle / at.sigma * (x - first[1])
            second = both(half, middle)
            return jax.tree.map(lambda a, b: jnp.where(more, a, b), second, first)

        pair = (guided, negative)
        x0, negative = jax.lax.cond(jnp.any(more), correct, lambda pair: pair, pair)
        moved = guided - negative if self.plus_plus else 0.0
        x = x0 + down / at.sigma * (x + moved - x0)
        return renoise(x, up * self.s_noise, lambda: noise(at.sigma, at.sigma_next)), state
