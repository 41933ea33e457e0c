"""Heun++: a step's slope from as many as three levels ahead, weighed by their noise."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from sdjax.diffusion.sampling import pick
from sdjax.diffusion.stochastic import churn
from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, State, Step, StepNoise, pytree

Levels = Float[np.ndarray, "n"]


@pytree
class HeunPP2:
    """Euler's step again, with the mean of the slopes here, at its end and at the next step's end,
    where each counts by its level. Order 1, three evaluations a step, two on the last step but
    one, one on the last.

    ComfyUI's `sample_heunpp2`, which took it from an extension of A1111's program; there is no
    paper. With s_0 the first level, slopes at s_i+1 and s_i+2 weigh s / 3 s_0 (on the last step
    but one s / 2 s_0), and the slope here the rest: Heun's method only at the start. The last step
    is Euler's even where it does not end at 0. Churn is as in `Euler`.

    `levels` are the run's own sigmas, [n + 1] or [n + 1, b, 1, 1, 1]: the method looks two levels
    ahead, and weighs by the first. None are those of the run it is in.
    """

    levels: Any = None
    s_churn: ArrayLike = 0.0
    s_tmin: ArrayLike = 0.0
    s_tmax: ArrayLike = float("inf")
    s_noise: ArrayLike = 1.0

    planned: ClassVar[tuple[str, ...]] = ("levels",)

    @property
    def stochastic(self) -> ArrayLike:
        return self.s_churn

    def during(self, sigmas: Any) -> "HeunPP2":
        """This sampler in a run along `sigmas`."""
        return self if self.levels is not None else dataclasses.replace(self, levels=sigmas)

    def plan(self, sigmas: Levels) -> tuple["HeunPP2", Levels]:
        """This sampler for a run, and the levels of the run: the same."""
        return dataclasses.replace(self, levels=sigmas), sigmas

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        if self.levels is None:
            raise InputError(
                "HeunPP2 looks ahead in the run's levels: a step alone needs HeunPP2(sigmas)"
            )
        x, sigma = churn(x, at, noise, self.s_churn, self.s_tmin, self.s_tmax, self.s_noise)
        levels = jnp.asarray(self.levels, x.dtype)
        slope = (x - denoise(x, sigma)) / sigma
        change = at.sigma_next - sigma
        euler = x + change * slope
        heun, further = at.left > 1, at.left > 2
        near = jnp.where(heun & (at.sigma_next > 0), at.sigma_next, at.sigma)
        far = pick(levels, jnp.minimum(at.index + 2, levels.shape[0] - 1))
        far = jnp.where(further & (far > 0), far, near)

        def second(euler: Latents) -> Latents:
            slope_near = (euler - denoise(euler, near)) / near

            def third(slope: Latents) -> Latents:
                there = euler + (far - near) * slope
                return (there - denoise(there, far)) / far

            slope_far = jax.lax.cond(jnp.any(further), third, lambda slope: slope, slope_near)
            whole = jnp.where(further, 3.0, 2.0) * levels[0]
            mean = slope + near / whole * (slope_near - slope)
            mean = mean + jnp.where(further, far / whole, 0.0) * (slope_far - slope)
            return jnp.where(heun, x + change * mean, euler)

        x = jax.lax.cond(jnp.any(heun), second, lambda euler: euler, euler)
        return x, state
