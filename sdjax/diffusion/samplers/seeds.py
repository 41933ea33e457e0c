"""SEEDS and the exponential Heun method: Runge-Kutta steps of the reverse SDE in log sigma."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.diffusion.samplers.exponential import log_ratio, phi
from sdjax.diffusion.stochastic import renoise, root
from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, State, Step, StepNoise, pytree, static

SOLVERS = ("phi_1", "phi_2")


@pytree
class SEEDS2:
    """Two stages, the middle a share `r` of the way in log sigma. Order 2 at `eta` 0, two
    evaluations and two draws a step, one evaluation where it ends at 0.

    Gonzalez et al. (2305.14267), SEEDS-2, as ComfyUI's `sample_seeds_2`: with g = (1 + eta) h,
    x0 + e^-g (x - x0) plus the difference of the stages' estimates, weighed by (1 - e^-g) / 2r
    (`solver` "phi_1") or g phi_2(-g) / r ("phi_2"). The second draw goes on from the first, so
    that both stages see one path of noise. `eta` 1 is the reverse SDE, 0 the ODE.
    """

    solver: str = static(default="phi_1")
    r: ArrayLike = 0.5
    eta: ArrayLike = 1.0
    s_noise: ArrayLike = 1.0

    def __post_init__(self) -> None:
        _known(self.solver)

    @property
    def stochastic(self) -> ArrayLike:
        return self.eta

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        path = _Path(denoise, x, at, self.eta, self.s_noise, noise)

        def follow(x0: Latents) -> Latents:
            r = jnp.asarray(self.r)
            middle, fresh = path.stage(x0, r, 0.0, x0, 0.0, None, 0)
            change = path.estimate(middle, r) - x0
            weight = _second(self.solver, path.g, r)
            return path.stage(x0, 1.0, weight, change, r, fresh, 1)[0]

        return path.finish(follow), state


@pytree
class ExpHeun:
    """The exponential Heun method: both ends of the step. Order 2 at `eta` 0, two evaluations a
    step, one where it ends at 0, with `eta` one draw.

    `SEEDS2` at r = 1 (2305.14267), as ComfyUI's `sample_exp_heun_2_x0` (`eta` 0) and its
    `sample_exp_heun_2_x0_sde` (`eta` 1). `solver` as there; "phi_2" is the exponential
    Runge-Kutta method of Hochbruck and Ostermann (Acta Numerica 19, 2010), section 2.
    """

    solver: str = static(default="phi_2")
    eta: ArrayLike = 0.0
    s_noise: ArrayLike = 1.0

    def __post_init__(self) -> None:
        _known(self.solver)

    @property
    def stochastic(self) -> ArrayLike:
        return self.eta

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        path = _Path(denoise, x, at, self.eta, self.s_noise, noise)

        def follow(x0: Latents) -> Latents:
            there, _ = path.stage(x0, 1.0, 0.0, x0, 0.0, None, 0)
            change = path.estimate(there, 1.0) - x0
            # The same noise at the same end: only the drift is done again.
            return (there + _second(self.solver, path.g, 1.0) * change).astype(x.dtype)

        return path.finish(follow), state


@pytree
class SEEDS3:
    """Three stages, at shares `r1` and `r2` of the way in log sigma. Order 3 at `eta` 0, three
    evaluations and three draws a step, one evaluation where it ends at 0.

    Gonzalez et al. (2305.14267), SEEDS-3, as ComfyUI's `sample_seeds_3`. Noise as in `SEEDS2`: one
    path through all stages. With noise the order is lower.
    """

    r1: ArrayLike = 1 / 3
    r2: ArrayLike = 2 / 3
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
        path = _Path(denoise, x, at, self.eta, self.s_noise, noise)

        def follow(x0: Latents) -> Latents:
            r1, r2 = jnp.asarray(self.r1), jnp.asarray(self.r2)
            middle, fresh = path.stage(x0, r1, 0.0, x0, 0.0, None, 0)
            change = path.estimate(middle, r1) - x0
            weight = _second("phi_2", r2 * path.g, r1 / r2)
            middle, fresh = path.stage(x0, r2, weight, change, r1, fresh, 1)
            change = path.estimate(middle, r2) - x0
            weight = _second("phi_2", path.g, r2)
            return path.stage(x0, 1.0, weight, change, r2, fresh, 2)[0]

        return path.finish(follow), state


class _Path:
    """One step: its length, and stages along one path of noise."""

    def __init__(
        self,
        denoise: Denoiser,
        x: Latents,
        at: Step,
        eta: ArrayLike,
        s_noise: ArrayLike,
        noise: StepNoise,
    ) -> None:
        self.denoise, self.x, self.at, self.noise = denoise, x, at, noise
        self.s_noise = s_noise
        self.h = log_ratio(at.sigma, at.sigma_next)
        self.restless = jnp.asarray(eta) * self.h
        self.g = self.h + self.restless

    def level(self, share: ArrayLike) -> jax.Array:
        return self.at.sigma * jnp.exp(-jnp.asarray(share) * self.h)

    def estimate(self, x: Latents, share: ArrayLike) -> Latents:
        return self.denoise(x, self.level(share))

    def stage(
        self,
        x0: Latents,
        share: ArrayLike,
        weight: ArrayLike,
        change: Latents,
        before: ArrayLike,
        known: Latents | None,
        draw: int,
    ) -> tuple[Latents, Latents]:
        """Where x is at a share of the way, and its noise there; `known` is that at `before`."""
        share = jnp.asarray(share)
        drift = x0 + jnp.exp(-share * self.g) * (self.x - x0) + weight * change
        gap = (share - before) * self.restless
        old = jnp.zeros_like(self.x) if known is None else jnp.exp(-gap) * known
        levels = self.level(before), self.level(share)
        fresh = renoise(old, root(-jnp.expm1(-2 * gap)), lambda: self.noise(*levels, draw))
        return (drift + self.s_noise * levels[1] * fresh).astype(self.x.dtype), fresh

    def finish(self, follow: Callable[[Latents], Latents]) -> Latents:
        x0, more = self.denoise(self.x, self.at.sigma), self.at.sigma_next > 0

        def on(x0: Latents) -> Latents:
            return jnp.where(more, follow(x0), x0)

        return jax.lax.cond(jnp.any(more), on, lambda x0: x0, x0)


def _second(solver: str, g: jax.Array, r: ArrayLike) -> jax.Array:
    """What the difference of two estimates, r apart, weighs in a stage of length g."""
    return -jnp.expm1(-g) / (2 * jnp.asarray(r)) if solver == "phi_1" else g * phi(2, -g) / r


def _known(solver: str) -> None:
    if solver not in SOLVERS:
        raise InputError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r:.60}")
