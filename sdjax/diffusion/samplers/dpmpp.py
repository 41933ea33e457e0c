"""DPM-Solver++: exponential integrators in the denoised estimate."""

from typing import NamedTuple

import jax.numpy as jnp

from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, Sigma, State, Step, StepNoise, pytree, static


class Memory(NamedTuple):
    """The step before."""

    x0: Latents
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
    """

    solver: str = static(default="midpoint")
    first_order_at_end: str = static(default="never")

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
        x0 = denoise(x, at.sigma)
        ratio = at.sigma_next / at.sigma
        ends = at.sigma_next == 0
        h = -jnp.log(jnp.where(ends, 0.5, ratio))
        change = (x0 - state.x0) * (h / state.h)
        if self.solver == "midpoint":
            weight = (1 - ratio) / 2
        else:
            weight = 1 + jnp.expm1(-h) / h
        first = (at.index == 0) | ends | self._last(at)
        x = x0 + ratio * (x - x0) + jnp.where(first, 0.0, weight * change)
        return x, Memory(x0, jnp.broadcast_to(h, state.h.shape))

    def _last(self, at: Step) -> jnp.ndarray:
        if self.first_order_at_end == "never":
            return at.left < 0
        if self.first_order_at_end == "always":
            return at.left == 1
        return (at.left == 1) & (at.index + at.left < 15)
