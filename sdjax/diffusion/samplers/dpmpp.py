"""DPM-Solver++: exponential integrators in the denoised estimate."""

from typing import NamedTuple

import jax.numpy as jnp

from sdjax.diffusion.guidance import with_negative
from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, Sigma, State, Step, StepNoise, pytree, static


class Memory(NamedTuple):
    """The step before."""

    x0: Latents  # with `plus_plus` the negative's
    h: Sigma  # its length in log sigma, [b, 1, 1, 1]


@pytree
class DPMSolverPP2M:
    """The two-step multistep solver. Order 2, one evaluation a step; first order on the first step
    and into 0.

    Lu et al. (2211.01095), algorithm 2, in sigma space: with h = log(s / s') and r = h_before / h,
    the estimate is extrapolated to x0 + (x0 - x0_before) / 2r and then followed as in Euler.
    `solver` "midpoint" is the paper's; "heun" weighs the difference by (1 - (1 - e^-h) / h) / r
    instead, as diffusers does under that name.

    `first_order_at_end`: a last step that does not end at 0 is "never" first order, "always", or
    only in "short" schedules of fewer than 15 steps: diffusers' euler_at_final and
    lower_order_final.

    `plus_plus` is ComfyUI's `dpmpp_2m_cfg_pp`, after CFG++ (Chung et al., 2406.08070): the denoiser
    is `guidance.cfg`'s, the step leaves its estimate along the negative's direction, and the
    difference is counted from the negative's estimate of the step before. The guidance scale is
    CFG++'s strength, 0 to 1 in the paper.
    """

    solver: str = static(default="midpoint")
    first_order_at_end: str = static(default="never")
    plus_plus: bool = static(default=False)

    def __post_init__(self) -> None:
        for name, known in (
            ("solver", ("midpoint", "heun")),
            ("first_order_at_end", ("never", "short", "always")),
        ):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )

    @property
    def stochastic(self) -> bool:
        return False

    def init(self, x: Latents) -> State:
        return Memory(jnp.zeros_like(x), jnp.ones((x.shape[0], 1, 1, 1), x.dtype))

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        if self.plus_plus:
            x0, negative = with_negative(denoise, x, at.sigma)
        else:
            x0 = negative = denoise(x, at.sigma)
        ratio = at.sigma_next / at.sigma
        ends = at.sigma_next == 0
        h = -jnp.log(jnp.where(ends, 0.5, ratio))
        change = (x0 - state.x0) * (h / state.h)
        if self.solver == "midpoint":
            weight = (1 - ratio) / 2
        else:
            weight = 1 + jnp.expm1(-h) / h
        first = (at.index == 0) | ends | self._last(at)
        x = x0 + ratio * (x - negative) + jnp.where(first, 0.0, weight * change)
        return x, Memory(negative, jnp.broadcast_to(h, state.h.shape))

    def _last(self, at: Step) -> jnp.ndarray:
        if self.first_order_at_end == "never":
            return at.left < 0
        if self.first_order_at_end == "always":
            return at.left == 1
        return (at.left == 1) & (at.index + at.left < 15)
