"""Extended reverse-time SDE solvers: as much noise as one likes, up to third order."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.diffusion.stochastic import renoise, root
from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, Sigma, State, Step, StepNoise, pytree, static

POINTS = 200
SCALES = ("er", "sde", "ode")


class Memory(NamedTuple):
    """The two steps before, the latest first."""

    x0: Latents
    slope: Latents  # of the estimate over sigma
    sigma: Sigma  # [b, 1, 1, 1] each
    sigma_before: Sigma


@pytree
class ERSDE:
    """Taylor's expansion of the estimate in sigma, its integrals by a sum. One evaluation and one
    draw a step; lower orders on the first steps, first order into 0.

    Cui et al. (2309.06169), VE ER-SDE-Solver-`order` (1, 2 or 3), as ComfyUI's
    `sample_er_sde`. `scale` is the function of sigma that says how much noise there is: "er", the
    paper's and ComfyUI's sigma (exp(sigma^0.3) + 10); "sde", sigma^2, the reverse-time SDE; "ode",
    sigma, none.

    Kept of both: the integrals are sums over 200 points, each an interval's lower end, so that in
    the end a small first-order error stays. No order is claimed.
    """

    order: int = static(default=3)
    scale: str = static(default="er")
    s_noise: ArrayLike = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.order, bool) or self.order not in (1, 2, 3):
            raise InputError(f"order must be 1, 2 or 3, got {self.order!r:.60}")
        if self.scale not in SCALES:
            raise InputError(f"scale must be one of {', '.join(SCALES)}, got {self.scale!r:.60}")

    @property
    def stochastic(self) -> bool:
        return self.scale != "ode"

    def init(self, x: Latents) -> State:
        unit = jnp.ones((x.shape[0], 1, 1, 1), x.dtype)
        return Memory(jnp.zeros_like(x), jnp.zeros_like(x), unit, unit)

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        x0, ends = denoise(x, at.sigma), at.sigma_next == 0
        target = jnp.where(ends, at.sigma / 2, at.sigma_next)
        kept = self._share(target) / self._share(at.sigma)
        r = kept * target / at.sigma
        slope = (x0 - state.x0) / _gap(at.sigma, state.sigma)
        bend = 2 * (slope - state.slope) / _gap(at.sigma, state.sigma_before)
        first, second = self._integrals(at.sigma, target)
        followed = x0 + r * (x - x0)
        if self.order >= 2:
            followed = followed + jnp.where(at.index >= 1, first * slope, 0.0)
        if self.order >= 3:
            followed = followed + jnp.where(at.index >= 2, second * bend, 0.0)
        std = jnp.where(ends, 0.0, self.s_noise * target * root(1 - kept**2))
        x = jnp.where(ends, x0, followed)
        x = renoise(x, std, lambda: noise(at.sigma, at.sigma_next)).astype(x0.dtype)
        sigma = jnp.broadcast_to(at.sigma, state.sigma.shape).astype(x0.dtype)
        return x, Memory(x0, slope, sigma, state.sigma)

    def _share(self, sigma: jax.Array) -> jax.Array:
        """The scale over sigma."""
        if self.scale == "er":
            return jnp.exp(sigma**0.3) + 10
        return sigma if self.scale == "sde" else jnp.ones_like(sigma)

    def _integrals(self, sigma: Sigma, target: Sigma) -> tuple[jax.Array, jax.Array]:
        """What the first and the second derivative weigh."""
        change = target - sigma
        points = jnp.arange(POINTS).reshape(-1, 1, 1, 1, 1)
        where = target - points * (change / POINTS)
        ratio = target * self._share(target) / (where * self._share(where))
        first = change * (1 - jnp.mean(ratio, 0))
        return first, change * (change / 2 - jnp.mean((where - sigma) * ratio, 0))


def _gap(sigma: Sigma, before: Sigma) -> jax.Array:
    """Of two equal levels one is none, or a finished image's: discarded."""
    return jnp.where(sigma == before, 1.0, sigma - before)
