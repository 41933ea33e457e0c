"""PNDM and PLMS: Adams-Bashforth in the noise estimate, with either of two starts."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from sdjax.diffusion.samplers.exponential import History, Number, blank, push
from sdjax.diffusion.sampling import pick
from sdjax.errors import InputError
from sdjax.types import Denoiser, Index, Latents, Sigma, State, Step, StepNoise, pytree, static

ADAMS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Adams-Bashforth for even steps, the latest first: Liu et al. (2202.09778), eq. 12."""


@pytree
class PNDM:
    """Pseudo numerical methods for diffusion models. Order 4 in steps of even size, one evaluation
    a step after the start.

    Liu et al. (2202.09778), algorithm 2. Its transfer (eq. 9 and 11) is Euler's step in sigma; the
    slope is an even-step Adams-Bashforth sum of the last four noise estimates, so that where steps
    grow or shrink the order is 2 at best. The start is either PLMS's (the default; CompVis's, and
    Stable Diffusion's own: the first step is taken again with the mean of both ends' estimates, two
    evaluations) or, with `runge_kutta`, three steps of the classical fourth-order method (four
    evaluations each).

    Quirks of diffusers, for its profile. `prediction` "v_prediction" sums the network's outputs and
    turns the sum into noise, instead of summing noises. `landings` are as in `DDIM`. `departure` is
    the level that the second go at PLMS's first step leaves from, `halves` [2, n] the levels that a
    Runge-Kutta step's middle is moved to, and is taken to be at; None is right.

    `unrolled` asks for a step's first estimate outside of any loop, for who watches it
    (`Momentum`); the program then holds the network twice.
    """

    runge_kutta: bool = static(default=False)
    prediction: str = static(default="epsilon")
    landings: ArrayLike | None = None
    departure: ArrayLike | None = None
    halves: tuple[ArrayLike, ArrayLike] | None = None
    unrolled: bool = static(default=False)

    planned: ClassVar[tuple[str, ...]] = ("landings", "departure", "halves")

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "v_prediction"):
            raise InputError(
                f"prediction must be one of epsilon, v_prediction, got {self.prediction!r}"
            )

    @property
    def stochastic(self) -> bool:
        return False

    def init(self, x: Latents) -> State:
        return blank(x, 3)

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: History, noise: StepNoise
    ) -> tuple[Latents, State]:
        landing = at.sigma_next
        if self.landings is not None:
            landing = pick(jnp.asarray(self.landings, x.dtype), at.index)
        start = at.index < 3 if self.runge_kutta else (at.index == 0) & (at.left > 1)
        start = start & (at.sigma_next > 0)
        value, more = self._stages(denoise, x, at, landing, jnp.any(start))
        slope = self._slope(adams_bashforth(value, state, at.index), x, at.sigma)
        new = unscaled(x + (landing - at.sigma) * slope, landing, at.sigma_next).astype(x.dtype)
        left = at.sigma
        if self.runge_kutta:
            mean = (value + 2 * more[0] + 2 * more[1] + more[2]) / 6
        else:
            mean = (value + more[0]) / 2
            if self.departure is not None:
                left = jnp.asarray(self.departure, x.dtype)
        there = unscaled(x, at.sigma, left)
        there = there + (at.sigma_next - left) * self._slope(mean, there, left)
        new = jnp.where(start, there, new).astype(x.dtype)
        return new, push(state, value, at.sigma)

    def _stages(
        self, denoise: Denoiser, x: Latents, at: Step, landing: Sigma, start: Bool[Array, ""]
    ) -> tuple[Latents, Float[Array, "stages b h w c"]]:
        """The value at x and, in a step of the start, those of its further stages.

        One scan, so that the program holds the network once however many stages there are; or, if
        `unrolled`, the first stage before it.
        """
        safe = jnp.where(at.sigma_next > 0, at.sigma_next, at.sigma)
        stages = [(at.sigma, at.sigma)]  # where the latest value leads, the level it is taken for
        if self.runge_kutta:
            aim = middle = (at.sigma + safe) / 2
            if self.halves is not None:
                aim, middle = (pick(jnp.asarray(half, x.dtype), at.index) for half in self.halves)
            stages += [(aim, middle), (middle, middle), (safe, safe)]
        else:
            stages += [(landing, safe)]
        each = (x.shape[0], 1, 1, 1)
        table = [
            jnp.stack([jnp.broadcast_to(stage[k], each).astype(x.dtype) for stage in stages])
            for k in (0, 1)
        ]
        wanted = jnp.stack([jnp.array(True), *[start] * (len(stages) - 1)])

        def evaluate(value: Latents, to: Sigma, level: Sigma) -> Latents:
            there = x + (to - at.sigma) * self._slope(value, x, at.sigma)
            return self._value(denoise, unscaled(there, to, level), level).astype(x.dtype)

        def stage(value: Latents, entry: Any) -> tuple[Latents, Latents]:
            wanted, to, level = entry
            value = jax.lax.cond(wanted, evaluate, lambda value, *_: value, value, to, level)
            return value, value

        if self.unrolled:
            value = evaluate(jnp.zeros_like(x), *(row[0] for row in table))
            return value, jax.lax.scan(stage, value, (wanted[1:], *(row[1:] for row in table)))[1]
        values = jax.lax.scan(stage, jnp.zeros_like(x), (wanted, *table))[1]
        return values[0], values[1:]

    def _value(self, denoise: Denoiser, x: Latents, sigma: Sigma) -> Latents:
        """What is summed: noise, or v."""
        x0 = denoise(x, sigma)
        eps = (x - x0) / sigma
        return eps if self.prediction == "epsilon" else (eps - sigma * x0) / jnp.sqrt(1 + sigma**2)

    def _slope(self, value: Latents, x: Latents, sigma: Sigma) -> Latents:
        if self.prediction == "epsilon":
            return value
        scale = jnp.sqrt(1 + sigma**2)
        return (value + sigma / scale * x) / scale


@pytree
class IPNDM:
    """PNDM without a start: the first steps have lower orders. One evaluation a step; order 4 but
    for the start in steps of even size, 2 where they grow or shrink smoothly.

    Zhang and Chen (2204.13902), section 3.3 (iPNDM): the same Adams-Bashforth sums. `blind_start`
    keeps a quirk of diffusers, whose first level has no signal at all: there the network's estimate
    is divided away, and the first step goes to noise alone.
    """

    blind_start: bool = static(default=False)

    @property
    def stochastic(self) -> bool:
        return False

    def init(self, x: Latents) -> State:
        return blank(x, 3)

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: History, noise: StepNoise
    ) -> tuple[Latents, State]:
        x0 = denoise(x, at.sigma)
        eps = (x - x0) / at.sigma
        if self.blind_start:
            x0 = jnp.where(at.index == 0, 0.0, x0)
        slope = adams_bashforth(eps, state, at.index)
        # From x0, for levels so high that x holds no digits of it.
        x = x0 + at.sigma_next * eps + (at.sigma_next - at.sigma) * (slope - eps)
        return x, push(state, eps, at.sigma)


def adams_bashforth(value: Latents, state: History, index: Index) -> Latents:
    """The even-step sum of `value` and up to three before it."""
    order = jnp.minimum(index, 3)
    total = jnp.zeros_like(value)
    for k, known in enumerate((value, *state.values)):
        weight: Number = jnp.zeros(())
        for p in range(k, 4):
            weight = weight + jnp.where(order == p, ADAMS[p][k], 0.0)
        total = total + weight * known
    return total


def unscaled(x: Latents, sigma: Sigma, to: Sigma) -> Latents:
    """The same variance-preserving latents x / sqrt(1 + sigma^2), read as if at level `to`."""
    return x * jnp.sqrt((1 + to**2) / (1 + sigma**2))
