"""DPM-Solver with steps of its own choice: an error estimate and a controller."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from sdjax.diffusion.samplers.dpm_fast import between, curved, slope, straight
from sdjax.diffusion.stochastic import ancestral, renoise, root
from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, State, Step, StepNoise, pytree, static

Number = Float[Array, "b 1 1 1"]


class Memory(NamedTuple):
    """What the controller knows; it outlives the intervals of a schedule."""

    x_low: Latents  # the lower order's result of the last accepted step
    h: Number  # the next step's length in log sigma
    fit: Number  # 1 / error of the last accepted step, 0 before the first
    fit_before: Number  # and of the one before
    nfe: Int[Array, "b"]  # evaluations so far, `order` an attempt


class Loop(NamedTuple):
    """One interval under way."""

    x: Latents
    t: Number  # -log sigma
    memory: Memory
    attempts: Int[Array, ""]


@pytree
class DPMAdaptive:
    """DPM-Solver-12 or -23 with adaptive steps. Order `order`, as many evaluations for an attempted
    step.

    Lu et al. (2206.00927), appendix C's adaptive algorithm, with k-diffusion's controller
    (`sample_dpm_adaptive`): the difference of two orders over max(atol, rtol max(|x_low|,
    |x_before|)), root mean square over the image, is its error; the step is multiplied by
    1 + atan(f - 1), f a product of powers of the last three errors (PID), and accepted where that
    is at least `accept_safety`. Each image has its own error, controller and steps, and comes out
    as it would alone.

    One step of `sample` follows the ODE over a whole interval, from sigma to sigma_next, in a
    `while_loop`: sigmas [sigma_max, sigma_min] are k-diffusion's call, and with more levels the run
    stops at each. A step to 0 is the denoised estimate, one evaluation. By name, for profiles and
    tasks, only the ends of a spacing are kept: `plan`. `carry.state.nfe` [b] of `sampling.scan`
    counts evaluations. With `eta` each accepted step draws noise, its attempt's
    number the draw; k-diffusion's tolerances are wide for that: a Gaussian's variance is 18 % short
    after 39 evaluations, and right after 209 at rtol 1e-4 and atol 1e-5. Sigmas may rise
    (inversion) at `eta` 0; a rising interval adds no noise.

    Gradients in forward mode only (`jax.jvp`, `jax.jacfwd`). An image whose controller is lost, at
    an estimate that is not finite or after `max_attempts` in one interval, ends as NaN.
    """

    order: int = static(default=3)
    rtol: ArrayLike = 0.05
    atol: ArrayLike = 0.0078
    h_init: ArrayLike = 0.05
    pcoeff: ArrayLike = 0.0
    icoeff: ArrayLike = 1.0
    dcoeff: ArrayLike = 0.0
    accept_safety: ArrayLike = 0.81
    eta: ArrayLike = 0.0
    s_noise: ArrayLike = 1.0
    max_attempts: int = static(default=1000)

    def __post_init__(self) -> None:
        if isinstance(self.order, bool) or self.order not in (2, 3):
            raise InputError(f"order must be 2 or 3, got {self.order!r}")

    def plan(self, sigmas: Float[np.ndarray, "n"]) -> tuple["DPMAdaptive", Float[np.ndarray, "m"]]:
        """This sampler, and the levels of its run, if it ends at 0: the first, the last above 0,
        and 0. How many there were between them says nothing to a sampler that chooses its steps.
        """
        if sigmas[-1] != 0 or len(sigmas) < 3:
            return self, sigmas
        return self, sigmas[[0, -2, -1]]

    @property
    def stochastic(self) -> ArrayLike:
        return self.eta

    def init(self, x: Latents) -> State:
        none = jnp.zeros((x.shape[0], 1, 1, 1), x.dtype)
        h = jnp.abs(jnp.asarray(self.h_init, x.dtype))
        return Memory(x, none + h, none, none, jnp.zeros(x.shape[0], jnp.int32))

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        ends = at.sigma_next == 0
        goal = jnp.broadcast_to(jnp.where(ends, at.sigma, at.sigma_next), state.h.shape)
        start = jnp.broadcast_to(at.sigma, goal.shape)

        def more(loop: Loop) -> Array:
            going = _away(loop, start, goal) & jnp.isfinite(loop.memory.h)
            return jnp.any(going) & (loop.attempts < self.max_attempts)

        def attempt(loop: Loop) -> Loop:
            return self._attempt(denoise, loop, start, goal, noise)

        first = Loop(x, -jnp.log(start), state, jnp.zeros((), jnp.int32))
        loop = jax.lax.while_loop(more, attempt, first)
        x, memory = jnp.where(_away(loop, start, goal), jnp.nan, loop.x), loop.memory

        def finish(x: Latents) -> Latents:
            return jnp.where(ends, denoise(x, at.sigma), x)

        x = jax.lax.cond(jnp.any(ends), finish, lambda x: x, x)
        last = jnp.broadcast_to(ends, start.shape)[:, 0, 0, 0]
        return x, memory._replace(nfe=memory.nfe + last)

    def _attempt(
        self, denoise: Denoiser, loop: Loop, start: Number, goal: Number, noise: StepNoise
    ) -> Loop:
        x, t, memory, attempts = loop
        going = _away(loop, start, goal) & jnp.isfinite(memory.h)
        falls, stop = goal <= start, -jnp.log(goal)
        there = t + jnp.where(falls, memory.h, -memory.h)
        inside = jnp.where(falls, jnp.minimum(stop, there), jnp.maximum(stop, there))
        there = jnp.where(going, inside, there)  # an image that waits stays off h = 0
        sigma, sigma_next = jnp.exp(-t), jnp.exp(-there)
        eta = jnp.where(falls, self.eta, 0.0)
        down = jnp.maximum(ancestral(sigma, sigma_next, eta)[0], goal)
        down = jnp.where(going & (eta != 0), down, sigma_next)
        up = root((sigma_next - down) * (sigma_next + down))

        low, high = self._pair(denoise, x, sigma, down)
        allowed = jnp.maximum(
            self.atol, self.rtol * jnp.maximum(jnp.abs(low), jnp.abs(memory.x_low))
        )
        square = jnp.mean(jnp.square((low - high) / allowed), (1, 2, 3), keepdims=True)
        error = jnp.where(square >= 0, root(square), jnp.nan)
        fit = 1 / (error + 1e-8)
        # The first attempt stands for a past, even where it is rejected.
        last, before = (jnp.where(f > 0, f, fit) for f in (memory.fit, memory.fit_before))
        factor = self._control(fit, last, before)
        moved = going & (factor >= self.accept_safety)

        std = jnp.where(moved, up * self.s_noise, 0.0)
        high = renoise(high, std, lambda: noise(sigma, sigma_next, attempts))
        memory = Memory(
            x_low=jnp.where(moved, low, memory.x_low),
            h=jnp.where(going, memory.h * factor, memory.h),
            fit=jnp.where(going, jnp.where(moved, fit, last), memory.fit),
            fit_before=jnp.where(going, jnp.where(moved, last, before), memory.fit_before),
            nfe=memory.nfe + self.order * going[:, 0, 0, 0],
        )
        return Loop(jnp.where(moved, high, x), jnp.where(moved, there, t), memory, attempts + 1)

    def _pair(
        self, denoise: Denoiser, x: Latents, sigma: Number, down: Number
    ) -> tuple[Latents, Latents]:
        """Where two orders end, from the same evaluations."""
        eps = slope(denoise, x, sigma)
        r1 = 1 / self.order
        s1 = between(sigma, down, r1)
        eps1 = slope(denoise, straight(x, sigma, s1, eps), s1)
        second = straight(x, sigma, down, eps + (eps1 - eps) / (2 * r1))
        if self.order == 2:
            return straight(x, sigma, down, eps), second
        s2 = between(sigma, down, 2 / 3)
        eps2 = slope(denoise, curved(x, sigma, s2, eps, eps1, 1 / 2), s2)
        return second, curved(x, sigma, down, eps, eps2, 2 / 3)

    def _control(self, fit: Number, last: Number, before: Number) -> Number:
        """The factor on the step's length, from 1 / error now and at the two steps before."""
        order = jnp.where(jnp.asarray(self.eta) != 0, 1.5, self.order)  # k-diffusion's
        p, i, d = self.pcoeff, self.icoeff, self.dcoeff
        powers = ((p + i + d) / order, -(p + 2 * d) / order, d / order)
        factor = fit ** powers[0] * last ** powers[1] * before ** powers[2]
        return 1 + jnp.arctan(factor - 1)


def _away(loop: Loop, start: Number, goal: Number) -> Bool[Array, "b 1 1 1"]:
    """Which images have not arrived: k-diffusion's tolerance in log sigma."""
    left = -jnp.log(goal) - loop.t
    return jnp.where(goal <= start, left, -left) > 1e-5
