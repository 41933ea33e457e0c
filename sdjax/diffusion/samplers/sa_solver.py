"""SA-Solver: stochastic Adams-Bashforth predictor and Adams-Moulton corrector."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.diffusion.samplers.exponential import (
    History,
    Number,
    blank,
    choose,
    last_sigma,
    limited,
    log_ratio,
    moments,
    places,
    push,
    shares,
)
from sdjax.diffusion.stochastic import root
from sdjax.errors import InputError
from sdjax.types import Denoiser, Index, Latents, Sigma, State, Step, StepNoise, pytree, static


class Memory(NamedTuple):
    """The step before: where it left from, its noise and tau; and the estimates so far."""

    x: Latents
    noise: Latents
    tau: Sigma
    history: History


@pytree
class SASolver:
    """The stochastic Adams solver. Weak order `predictor_order` (1 .. 4), one evaluation and one
    draw a step; with `tau` 0 it solves the ODE.

    Xue et al. (2309.05019), algorithm 1: the SDE whose noise is `tau` times its due (eq. 4; 1 is
    DDPM's) wherever s_tmin <= sigma <= s_tmax, by the denoised estimate (`predict_x0`) or the noise
    (appendix B), with a corrector that repeats the step with the estimate it led to and the same
    noise. Orders of 2 by x0 keep the authors' change of a weight by O(h^2), phi_2 to 1/2: "for few
    steps".

    `corrector_order` 0 is none. `lower_order_final`: the last steps have lower orders.
    """

    predictor_order: int = static(default=2)
    corrector_order: int = static(default=2)
    predict_x0: bool = static(default=True)
    lower_order_final: bool = static(default=True)
    tau: ArrayLike = 1.0
    s_tmin: ArrayLike = 0.0
    s_tmax: ArrayLike = float("inf")

    def __post_init__(self) -> None:
        for name, low in (("predictor_order", 1), ("corrector_order", 0)):
            if getattr(self, name) not in range(low, 5):
                raise InputError(f"{name} must be {low} .. 4, got {getattr(self, name)!r}")

    @property
    def stochastic(self) -> ArrayLike:
        return self.tau

    def init(self, x: Latents) -> State:
        tau = jnp.zeros((x.shape[0], 1, 1, 1), x.dtype)
        length = max(self.predictor_order, self.corrector_order - 1)
        return Memory(x, jnp.zeros_like(x), tau, blank(x, length))

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: Memory, noise: StepNoise
    ) -> tuple[Latents, State]:
        x0 = denoise(x, at.sigma)
        value = x0 if self.predict_x0 else (x - x0) / at.sigma
        if self.corrector_order:
            x = jnp.where(at.index > 0, self._correct(at, state, value), x).astype(x.dtype)
        history = push(state.history, value, at.sigma)

        inside = (self.s_tmin <= at.sigma) & (at.sigma <= self.s_tmax)
        tau = jnp.where(inside, jnp.asarray(self.tau, x.dtype), 0.0)
        drawn = jnp.where(tau > 0, noise(at.sigma, at.sigma_next), 0.0).astype(x.dtype)
        new = self._predict(x, at, history, tau, drawn)
        return new, Memory(x, drawn, jnp.broadcast_to(tau, state.tau.shape), history)

    def _predict(
        self, x: Latents, at: Step, history: History, tau: Number, noise: Latents
    ) -> Latents:
        h = log_ratio(at.sigma, at.sigma_next)
        order = limited(self.predictor_order, at.index)
        if self.lower_order_final:
            order = jnp.minimum(order, at.left)
        order = jnp.where(at.sigma_next == 0, 1, order)
        older = History(history.values[1:], history.sigmas[1:])
        nodes = [jnp.zeros_like(h), *places(older, at.sigma, h, at.index)]
        values = list(history.values)
        return self._solve(
            x, at.sigma, at.sigma_next, h, tau, noise, order, nodes, values, self.predictor_order
        )

    def _correct(self, at: Step, state: Memory, value: Latents) -> Latents:
        history = state.history
        sigma = last_sigma(history, at)
        h = log_ratio(sigma, at.sigma)
        order = jnp.minimum(self.corrector_order, jnp.maximum(at.index + 1, 1))
        if self.lower_order_final:
            order = jnp.minimum(order, at.left + 2)
        older = History(history.values[1:], history.sigmas[1:])
        nodes = [jnp.ones_like(h), jnp.zeros_like(h), *places(older, sigma, h, at.index - 1)]
        values = [value, *history.values]
        return self._solve(
            state.x,
            sigma,
            at.sigma,
            h,
            state.tau,
            state.noise,
            order,
            nodes,
            values,
            self.corrector_order,
        )

    def _solve(
        self,
        x: Latents,
        sigma: Sigma,
        sigma_next: Sigma,
        h: Number,
        tau: Number,
        noise: Latents,
        order: Index,
        nodes: list[Number],
        values: list[Latents],
        most: int,
    ) -> Latents:
        """One step by the estimates at `nodes`, in step lengths from where it leaves."""
        rate = 1 + tau**2
        z = -rate * h if self.predict_x0 else h
        powers = moments(z, most)
        candidates = []
        for p in range(1, most + 1):
            used = powers[:p]
            if p == 2 and self.predict_x0:
                used = [powers[0], jnp.full_like(powers[0], 0.5)]
            candidates.append(shares(nodes[:p], used))
        weights = choose(order, candidates)
        ratio = sigma_next / sigma
        # Around the first estimate, which the weights' sum multiplies.
        first = values[0]
        if self.predict_x0:
            keep = jnp.where(sigma_next == 0, 0.0, jnp.exp(z))
            std = sigma_next * root(1 - jnp.exp(-2 * tau**2 * h))
            new, scale = first + keep * (x - first), rate * h
        else:
            std = tau * sigma * root(1 - ratio**2)
            new, scale = x - rate * (sigma - sigma_next) * first, -rate * sigma_next * h
        for weight, other in zip(weights[1:], values[1:], strict=False):
            new = new + scale * weight * (other - first)
        return new + jnp.where(sigma_next == 0, 0.0, std) * noise
