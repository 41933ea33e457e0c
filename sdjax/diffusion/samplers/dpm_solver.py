"""DPM-Solver and DPM-Solver++, multistep and singlestep, ODE and SDE, orders 1 to 3."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from sdjax.diffusion.samplers.deis import final_order
from sdjax.diffusion.samplers.exponential import (
    History,
    Number,
    blank,
    limited,
    log_ratio,
    phi,
    push,
)
from sdjax.diffusion.stochastic import root
from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, Sigma, State, Step, StepNoise, pytree, static

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
SOLVERS = ("midpoint", "heun")


class Piece(NamedTuple):
    """One step from `sigma` over `h` in lambda, but for the estimates."""

    keep: Number  # x0 + keep (x - x0) is the first-order step
    unit: Number  # what phi_k of `z` is multiplied by
    z: Number
    std: Number  # of the noise that is added


def piece(algorithm: str, sigma: Sigma, sigma_next: Sigma) -> Piece:
    """A step's coefficients. Into 0 every algorithm goes to the estimate, without noise."""
    h = log_ratio(sigma, sigma_next)
    ratio = sigma_next / sigma
    if algorithm == "dpmsolver++":
        return Piece(ratio, h, -h, jnp.zeros_like(h))
    if algorithm == "sde-dpmsolver++":
        return Piece(ratio**2, 2 * h, -2 * h, sigma_next * root(1 - ratio**2))
    if algorithm == "dpmsolver":
        return Piece(ratio, -sigma_next * h, h, jnp.zeros_like(h))
    ends = sigma_next == 0
    std = jnp.where(ends, 0.0, sigma * root(1 - ratio**2))
    return Piece(jnp.where(ends, 0.0, 2 * ratio - 1), -2 * sigma_next * h, h, std)


@pytree
class DPMSolver:
    """The multistep solvers. Order `order` (1 .. 3; strongly 1 for SDEs), one evaluation a step,
    and one draw where `algorithm` says sde.

    "dpmsolver++" (Lu et al., 2211.01095, algorithm 2) extrapolates the denoised estimate,
    "dpmsolver" (2206.00927) the noise; the SDE forms are 2211.01095's (section 5). In sigma space,
    with h = log(s / s') and the scaled slope D1 of the estimates, the midpoint solver takes D1 at
    the step's middle and heun integrates it exactly. The first steps, and one into 0, have lower
    orders: where the estimate moves in the first already, that leaves order 2.

    `order` 3 integrates the parabola through the last three estimates. `reference` keeps two slips
    of the authors' code and diffusers: the parabola's square term counts half, which leaves order 2
    with a small constant, and in "sde-dpmsolver++" its weight has -1/2 for +1/2.

    `lower_order_final`: schedules of fewer than 15 steps end with orders 2 and 1; `euler_at_final`:
    all end with order 1. Rising sigmas invert the ODEs.
    """

    order: int = static(default=2)
    algorithm: str = static(default="dpmsolver++")
    solver: str = static(default="midpoint")
    lower_order_final: bool = static(default=False)
    euler_at_final: bool = static(default=False)
    reference: bool = static(default=False)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def stochastic(self) -> bool:
        return self.algorithm.startswith("sde")

    def init(self, x: Latents) -> State:
        return blank(x, self.order - 1)

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: History, noise: StepNoise
    ) -> tuple[Latents, State]:
        x0 = denoise(x, at.sigma)
        value = estimate(self.algorithm, x, x0, at.sigma)
        order = final_order(limited(self.order, at.index), at, self.lower_order_final)
        order = jnp.where(at.sigma_next == 0, 1, order)
        if self.euler_at_final:
            order = jnp.where(at.left == 1, 1, order)
        part = piece(self.algorithm, at.sigma, at.sigma_next)
        h = log_ratio(at.sigma, at.sigma_next)
        x = x0 + part.keep * (x - x0)
        if self.order > 1:
            r0 = _length(state.sigmas[0], at.sigma, h, at.index > 0)
            slope = (value - state.values[0]) / r0
            weight = _slope_weight(self.solver, part)
            if self.order == 2:
                x = x + jnp.where(order >= 2, weight * slope, 0.0)
            else:
                r1 = _length(state.sigmas[1], state.sigmas[0], h, at.index > 1)
                older = (state.values[0] - state.values[1]) / r1
                bend = (slope - older) / (r0 + r1)
                third = part.unit * phi(2, part.z) * (slope + r0 * bend)
                third = third + self._square(part) * bend
                x = x + jnp.where(order == 2, weight * slope, jnp.where(order == 3, third, 0.0))
        if self.stochastic:
            x = x + part.std * noise(at.sigma, at.sigma_next)
        return x, push(state, value, at.sigma)

    def _square(self, part: Piece) -> Number:
        if not self.reference:
            return 2 * part.unit * phi(3, part.z)
        return _halved(self.algorithm, part)


class Group(NamedTuple):
    """Where a group of steps began, and its evaluations."""

    x: Latents
    history: History


@pytree
class DPMSolverSingle:
    """The singlestep solvers. Order `order` (1 .. 3) over groups of `order` steps, one evaluation a
    step, and one draw where `algorithm` says sde.

    DPM-Solver (2206.00927, algorithms 1 and 2) and ++ (2211.01095, algorithm 1), with the
    intermediate points on the schedule itself, as diffusers walks them: the second (third) step of
    a group starts again from the group's beginning, with two (three) evaluations. `solver` is as in
    `DPMSolver`; at order 3 "midpoint" takes the latest estimate's slope alone, which is third order
    for points even in log sigma.

    `lower_order_final`: a group that ends with the schedule ends with order 1; a step into 0 always
    does. `reference` keeps diffusers' -1/2 for +1/2 in the SDE's parabola.
    """

    order: int = static(default=2)
    algorithm: str = static(default="dpmsolver++")
    solver: str = static(default="midpoint")
    lower_order_final: bool = static(default=False)
    reference: bool = static(default=False)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def stochastic(self) -> bool:
        return self.algorithm.startswith("sde")

    def init(self, x: Latents) -> State:
        return Group(x, blank(x, self.order - 1))

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: Group, noise: StepNoise
    ) -> tuple[Latents, State]:
        x0 = denoise(x, at.sigma)
        value = estimate(self.algorithm, x, x0, at.sigma)
        history = state.history
        order = at.index % self.order + 1
        last = at.left == 1
        if self.lower_order_final:
            order = jnp.where(last & (order == self.order), 1, order)
        order = jnp.where(at.sigma_next == 0, 1, order)
        start = jnp.where(order == 1, x, state.x).astype(x.dtype)

        part = piece(self.algorithm, at.sigma, at.sigma_next)
        new = x0 + part.keep * (x - x0)
        std = part.std
        if self.order > 1:
            base, first = history.sigmas[0], history.values[0]
            two, h = self._over(base, at, order == 2)
            r = _length(base, at.sigma, h, order == 2)
            slope = (value - first) / r
            moved = self._first(start, first, base, two) + _slope_weight(self.solver, two) * slope
            new = jnp.where(order == 2, moved, new)
            std = jnp.where(order == 2, two.std, std)
        if self.order > 2:
            base, first = history.sigmas[1], history.values[1]
            three, h = self._over(base, at, order == 3)
            r0 = _length(base, at.sigma, h, order == 3)
            r1 = _length(base, history.sigmas[0], h, order == 3)
            outer = (value - first) / r0
            inner = (history.values[0] - first) / r1
            rest = self._first(start, first, base, three)
            linear = three.unit * phi(2, three.z)
            if self.solver == "midpoint":
                moved = rest + linear * outer
            else:
                gap = jnp.where(order == 3, r0 - r1, 1.0)
                slope = (r0 * inner - r1 * outer) / gap
                bend = 2 * (outer - inner) / gap
                square = three.unit * phi(3, three.z)
                if self.reference:
                    square = _halved(self.algorithm, three)
                moved = rest + linear * slope + square * bend
            new = jnp.where(order == 3, moved, new)
            std = jnp.where(order == 3, three.std, std)
        if self.stochastic:
            new = new + std * noise(at.sigma, at.sigma_next)
        return new, Group(start, push(history, value, at.sigma))

    def _over(self, base: Sigma, at: Step, here: Any) -> tuple[Piece, Number]:
        """The step from the group's beginning, harmless where it is not taken."""
        base = jnp.where(here, base, at.sigma)
        return piece(self.algorithm, base, at.sigma_next), log_ratio(base, at.sigma_next)

    def _first(self, x: Latents, value: Latents, base: Sigma, part: Piece) -> Latents:
        x0 = value if self.algorithm.endswith("++") else x - base * value
        return x0 + part.keep * (x - x0)


def estimate(algorithm: str, x: Latents, x0: Latents, sigma: Sigma) -> Latents:
    """What an algorithm extrapolates: x0 (++) or the noise."""
    return x0 if algorithm.endswith("++") else (x - x0) / sigma


def _slope_weight(solver: str, part: Piece) -> Number:
    if solver == "midpoint":
        return part.unit * phi(1, part.z) / 2
    return part.unit * phi(2, part.z)


def _halved(algorithm: str, part: Piece) -> Number:
    """The square term's weight as the reference has it."""
    if algorithm == "sde-dpmsolver++":
        return -phi(2, part.z) - 0.5
    return part.unit * phi(3, part.z)


def _length(sigma: Sigma, sigma_next: Sigma, h: Number, known: Any) -> Number:
    """log(sigma / sigma_next) in units of h; 1 where there was no such step."""
    there = known & (sigma != sigma_next)
    return jnp.where(there, jnp.log(jnp.where(there, sigma / sigma_next, 2.0)) / h, 1.0)


def _check(sampler: Any) -> None:
    if sampler.order not in (1, 2, 3):
        raise InputError(f"order must be 1, 2 or 3, got {sampler.order!r}")
    for name, known in (("algorithm", ALGORITHMS), ("solver", SOLVERS)):
        if getattr(sampler, name) not in known:
            raise InputError(
                f"{name} must be one of {', '.join(known)}, got {getattr(sampler, name)!r}"
            )
