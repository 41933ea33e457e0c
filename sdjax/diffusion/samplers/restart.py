"""Restart sampling: Heun's method, and back up again by noise."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from sdjax.diffusion.samplers.heun import Heun
from sdjax.diffusion.spacings import karras
from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, State, Step, StepNoise, pytree

Segments = Mapping[float, tuple[int, int, float]]


@pytree
class Restart:
    """Heun's method on levels that may rise again: where they do, noise is added and nothing
    evaluated. Order 2 between the rises, two evaluations a step, one where it ends at 0.

    Xu et al. (2306.14878), algorithm 1. `Restart.schedule` makes the levels, for profiles and tasks
    with A1111's choice of restarts; on levels that only fall it is `Heun`.
    """

    s_noise: ArrayLike = 1.0

    @property
    def stochastic(self) -> bool:
        return True

    @classmethod
    def schedule(
        cls, sigmas: Float[np.ndarray, "n"], segments: Segments | None = None
    ) -> Float[np.ndarray, "m"]:
        """Levels with restarts in them, from ones that fall to 0.

        `segments` {low: (levels, times, high)}: from the level nearest `low`, `times` times up to
        that nearest `high` and down again on `levels` of Karras et al.'s levels, both ends
        included. None is A1111's choice: under 20 steps no restart, else the budget is split: one
        restart of 9 steps, from 36 steps on two of a quarter each, between 0.1 and 2, and the rest
        on Karras et al.'s levels whatever `sigmas` were between their ends.
        """
        sigmas = np.asarray(sigmas, np.float64)
        if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas[-1] != 0 or (np.diff(sigmas) >= 0).any():
            raise InputError("sigmas of a restart schedule must be [n + 1], falling to 0")
        if segments is None:
            sigmas, segments = _usual(sigmas)
        found = {}
        for low, (levels, times, high) in segments.items():
            if levels < 2 or times < 0:
                raise InputError(
                    "a restart segment needs 2 levels or more and times of 0 or more, "
                    f"got {levels} and {times}"
                )
            found[int(np.argmin(np.abs(sigmas - low)))] = (levels, times, high)
        run = list(sigmas[:1])
        for i, sigma in enumerate(sigmas[1:], 1):
            run.append(sigma)
            levels, times, high = found.get(i, (0, 0, 0.0))
            top = int(np.argmin(np.abs(sigmas - high)))
            if times and sigma > 0 and top < i:
                run.extend(np.tile(karras(levels, sigma, sigmas[top])[:-1], times))
        return np.array(run)

    def plan(self, sigmas: Float[np.ndarray, "n"]) -> tuple["Restart", Float[np.ndarray, "m"]]:
        """This sampler for a run, and the levels of the run: with restarts, if it ends at 0."""
        return self, self.schedule(sigmas) if sigmas[-1] == 0 else sigmas

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        rises = at.sigma_next > at.sigma
        level = jnp.where(rises, at.sigma, at.sigma_next)  # harmless where the result is not used
        falling = at._replace(sigma_next=level)

        def down(x: Latents) -> Latents:
            return Heun().step(denoise, x, falling, (), noise)[0].astype(x.dtype)

        def up(x: Latents) -> Latents:
            gap = jnp.where(rises, (at.sigma_next - at.sigma) * (at.sigma_next + at.sigma), 1.0)
            fresh = noise(at.sigma, at.sigma_next)
            return (x + self.s_noise * jnp.sqrt(gap) * fresh).astype(x.dtype)

        fallen = jax.lax.cond(jnp.all(rises), lambda x: x, down, x)
        risen = jax.lax.cond(jnp.any(rises), up, lambda x: x, x)
        return jnp.where(rises, risen, fallen), state


def _usual(sigmas: Float[np.ndarray, "n"]) -> tuple[Float[np.ndarray, "m"], Segments]:
    steps = len(sigmas) - 1
    if steps < 20:
        return sigmas, {}
    each, times = (9, 1) if steps < 36 else (steps // 4, 2)
    fewer = karras(steps - each * times, sigmas[-2], sigmas[0])
    return fewer, {0.1: (each + 1, times, 2.0)}
