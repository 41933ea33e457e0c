"""DEIS: exponential Adams-Bashforth in the noise estimate."""

import jax.numpy as jnp

from sdjax.diffusion.samplers.exponential import (
    History,
    blank,
    choose,
    limited,
    log_ratio,
    moments,
    places,
    push,
    shares,
)
from sdjax.errors import InputError
from sdjax.types import Denoiser, Index, Latents, State, Step, StepNoise, pytree, static


@pytree
class DEIS:
    """Diffusion exponential integrator sampler. Order `order` (1 .. 4), one evaluation a step.

    Zhang and Chen (2204.13902), algorithm 1 with the polynomial in log rho (their
    rhoAB in log rho; rho is sigma here): the noise estimates of the last steps, extrapolated in
    log sigma and integrated exactly. Order 1 is Euler; order 2 is DPM-Solver's multistep form with
    `heun`, which integrates the same line. The first steps, and one into 0, have lower orders:
    where the estimate moves in the first already, that leaves order 2.

    `lower_order_final`: schedules of fewer than 15 steps end with orders 2 and 1, as in diffusers.
    """

    order: int = static(default=3)
    lower_order_final: bool = static(default=False)

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise InputError(f"order must be 1, 2, 3 or 4, got {self.order!r}")

    @property
    def stochastic(self) -> bool:
        return False

    def init(self, x: Latents) -> State:
        return blank(x, self.order - 1)

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: History, noise: StepNoise
    ) -> tuple[Latents, State]:
        x0 = denoise(x, at.sigma)
        eps = (x - x0) / at.sigma
        h = log_ratio(at.sigma, at.sigma_next)
        order = final_order(limited(self.order, at.index), at, self.lower_order_final)
        order = jnp.where(at.sigma_next == 0, 1, order)
        nodes = [jnp.zeros_like(h), *places(state, at.sigma, h, at.index)]
        powers = moments(h, self.order)
        orders = range(1, self.order + 1)
        weights = choose(order, [shares(nodes[:p], powers[:p])[1:] for p in orders])
        x = x0 + at.sigma_next / at.sigma * (x - x0)
        for weight, before in zip(weights, state.values, strict=True):
            x = x - at.sigma_next * h * weight * (before - eps)
        return x, push(state, eps, at.sigma)


def final_order(order: Index, at: Step, lower: bool, below: int = 15) -> Index:
    """At most 2 and 1 in the last two steps of a schedule of fewer than `below`, if asked."""
    if not lower:
        return order
    short = at.index + at.left < below
    return jnp.where(short, jnp.minimum(order, at.left), order)
