"""RES, refined exponential solvers, as multistep: second order, one evaluation a step."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.diffusion.guidance import with_negative
from sdjax.diffusion.samplers.exponential import log_ratio, phi
from sdjax.diffusion.stochastic import ancestral, renoise
from sdjax.types import Denoiser, Latents, Sigma, State, Step, StepNoise, pytree, static


class Memory(NamedTuple):
    """The step before."""

    x0: Latents
    rate: Sigma  # one over its length in log sigma, 0 where there is none to use, [b, 1, 1, 1]


@pytree
class RESMultistep:
    """The two-step exponential solver with phi functions. Order 2 at `eta` 0, one evaluation a
    step, with `eta` one draw; first order on the first step and into 0.

    Zhang et al. (2308.02157), the two-step multistep RES, as ComfyUI's `res_multistep`
    (`eta` 0) and `res_multistep_ancestral` (`eta` 1) step it: with h = log(s / s') and h_before,
    x0 + e^-h (x - x0) + h phi_2(-h) (x0 - x0_before) h / h_before. At `eta` 0 these are the numbers
    of `DPMSolverPP2M("heun")`.

    With `eta` the step is to the ancestral level below s', and noise follows. ComfyUI's quirk is
    kept: h_before then ends at the lower level of the step before, not at where it was noised to.

    `plus_plus` is ComfyUI's `res_multistep_cfg_pp`, after CFG++ (Chung et al., 2406.08070): the
    denoiser is `guidance.cfg`'s, and all estimates above are the negative's, to which comes the
    guided one's difference: whole in a step of first order, e^-h of it in the others. The guidance
    scale is CFG++'s strength, 0 to 1 in the paper.
    """

    eta: ArrayLike = 0.0
    s_noise: ArrayLike = 1.0
    plus_plus: bool = static(default=False)

    @property
    def stochastic(self) -> ArrayLike:
        return self.eta

    def init(self, x: Latents) -> State:
        return Memory(jnp.zeros_like(x), jnp.zeros((x.shape[0], 1, 1, 1), x.dtype))

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        if self.plus_plus:
            guided, x0 = with_negative(denoise, x, at.sigma)
        else:
            x0 = guided = denoise(x, at.sigma)
        down, up = ancestral(at.sigma, at.sigma_next, self.eta)
        h, ends = log_ratio(at.sigma, down), down == 0
        weight = jnp.where(ends, 0.0, h * h * phi(2, -h) * state.rate)
        ratio = down / at.sigma
        x = x0 + ratio * (x - x0) + weight * (x0 - state.x0)
        if self.plus_plus:
            x = x + jnp.where(ends | (at.index == 0), 1.0, ratio) * (guided - x0)
        x = renoise(x, up * self.s_noise, lambda: noise(at.sigma, at.sigma_next))
        unusable = ends | (h == 0)
        rate = jnp.where(unusable, 0.0, 1 / jnp.where(unusable, 1.0, h))
        return x, Memory(x0, jnp.broadcast_to(rate, state.rate.shape).astype(x.dtype))
