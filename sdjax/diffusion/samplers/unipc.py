"""UniPC: a multistep predictor, and a corrector that costs no evaluation."""

from typing import NamedTuple

import jax.numpy as jnp

from sdjax.diffusion.samplers.deis import final_order
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
from sdjax.errors import InputError
from sdjax.types import Denoiser, Index, Latents, Sigma, State, Step, StepNoise, pytree, static


class Memory(NamedTuple):
    """The corrected sample that the last step left from, and the estimates before."""

    x: Latents
    history: History


@pytree
class UniPC:
    """The unified predictor-corrector. Order `order` + 1 by its corrector (`order` is 1 .. 3), one
    evaluation a step.

    Zhao et al. (2302.04867), algorithms 1 and 2, by the denoised estimate (`predict_x0`) or the
    noise. Each evaluation is used twice: for the step that follows, and before that to correct the
    step that led to it. `variant` is the paper's B(h): h for "bh1", e^h - 1 for "bh2". It is in the
    weight 1/2 that the corrector of order 1 and the predictor of order 2 have for every h, and
    cancels elsewhere.

    `lower_order_final`: the last two steps have orders 2 and 1. `uncorrected` are steps that are
    not corrected: diffusers' disable_corrector. The image itself, at sigma 0, never is.
    """

    order: int = static(default=2)
    variant: str = static(default="bh2")
    predict_x0: bool = static(default=True)
    lower_order_final: bool = static(default=True)
    uncorrected: tuple[int, ...] = static(default=())

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise InputError(f"order must be 1, 2 or 3, got {self.order!r}")
        if self.variant not in ("bh1", "bh2"):
            raise InputError(f"variant must be one of bh1, bh2, got {self.variant!r}")

    @property
    def stochastic(self) -> bool:
        return False

    def init(self, x: Latents) -> State:
        return Memory(x, blank(x, self.order))

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: Memory, noise: StepNoise
    ) -> tuple[Latents, State]:
        x0 = denoise(x, at.sigma)
        value = x0 if self.predict_x0 else (x - x0) / at.sigma
        corrected = at.index > 0
        for step in self.uncorrected:
            corrected = corrected & (at.index != step + 1)
        x = jnp.where(corrected, self._correct(at, state, value), x).astype(x.dtype)
        history = push(state.history, value, at.sigma)
        return self._predict(x, at, history), Memory(x, history)

    def _predict(self, x: Latents, at: Step, history: History) -> Latents:
        """From at.sigma on, by the estimates so far."""
        h = log_ratio(at.sigma, at.sigma_next)
        order = jnp.where(at.sigma_next == 0, 1, self._order(at, limited(self.order, at.index)))
        back = places(_older(history), at.sigma, h, at.index)
        powers, half = self._powers(h)
        candidates: list[list[Number]] = [[], [half]][: self.order]
        if self.order == 3:
            candidates.append(shares(back[:2], powers[:2]))
        weights = choose(order, candidates)
        new = self._first(x, history.values[0], at.sigma, at.sigma_next)
        scale = self._scale(at.sigma_next, h)
        for weight, r, before in zip(weights, back, history.values[1:], strict=False):
            new = new - scale * weight * (before - history.values[0]) / r
        return new

    def _correct(self, at: Step, state: Memory, value: Latents) -> Latents:
        """The step that led here, once more, with the estimate that it led to."""
        history = state.history
        sigma = last_sigma(history, at)
        h = log_ratio(sigma, at.sigma)
        before = at._replace(index=at.index - 1, left=at.left + 1)
        order = self._order(before, jnp.maximum(limited(self.order, before.index), 1))
        back = places(_older(history), sigma, h, before.index)
        powers, half = self._powers(h)
        one = jnp.ones_like(h)
        # The new estimate's weight first: all orders have it.
        candidates: list[list[Number]] = [[half]]
        for p in range(2, self.order + 1):
            candidates.append(shares([one, *back[: p - 1]], powers[:p]))
        weights = choose(order, candidates)
        first = history.values[0]
        new = self._first(state.x, first, sigma, at.sigma)
        scale = self._scale(at.sigma, h)
        new = new - scale * weights[0] * (value - first)
        for weight, r, old in zip(weights[1:], back, history.values[1:], strict=False):
            new = new - scale * weight * (old - first) / r
        return new

    def _order(self, at: Step, known: Index) -> Index:
        return final_order(known, at, self.lower_order_final, 10**9)

    def _powers(self, h: Number) -> tuple[list[Number], Number]:
        """Integrals of powers over a step, and the half that stands for them, all over z."""
        z = -h if self.predict_x0 else h
        powers = moments(z, 4)[1:]
        return powers, jnp.full_like(h, 0.5) if self.variant == "bh1" else moments(z, 1)[0] / 2

    def _scale(self, sigma_next: Sigma, h: Number) -> Number:
        return -h if self.predict_x0 else sigma_next * h

    def _first(self, x: Latents, value: Latents, sigma: Sigma, sigma_next: Sigma) -> Latents:
        x0 = value if self.predict_x0 else x - sigma * value
        return x0 + sigma_next / sigma * (x - x0)


def _older(history: History) -> History:
    """The memory without its latest step."""
    return History(history.values[1:], history.sigmas[1:])
