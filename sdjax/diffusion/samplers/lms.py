"""Linear multistep: slopes of earlier steps, one evaluation a step."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax.errors import InputError
from sdjax.types import Denoiser, Index, Latents, Sigma, State, Step, StepNoise, pytree, static


class Memory(NamedTuple):
    """The steps before, the latest first."""

    slopes: tuple[Latents, ...]
    sigmas: tuple[Sigma, ...]  # [b, 1, 1, 1] each


@pytree
class LMS:
    """Adams-Bashforth for uneven steps. Order `order` (1 .. 4), one evaluation a step.

    The polynomial through the last slopes, integrated over the step: Hairer, Norsett and Wanner,
    Solving Ordinary Differential Equations I, III.5, on dx/dsigma = (x - x0) / sigma (2206.00364,
    eq. 3), as in k-diffusion's `sample_lms`. The first steps have fewer slopes and lower orders.
    The weights are smooth in the sigmas, so that gradients to a schedule are right.
    """

    order: int = static(default=4)

    def __post_init__(self) -> None:
        if isinstance(self.order, bool) or self.order not in (1, 2, 3, 4):
            raise InputError(f"order must be 1, 2, 3 or 4, got {self.order!r}")

    @property
    def stochastic(self) -> bool:
        return False

    def init(self, x: Latents) -> State:
        before = range(self.order - 1)
        return Memory(
            tuple(jnp.zeros_like(x) for _ in before),
            tuple(jnp.ones((x.shape[0], 1, 1, 1), x.dtype) for _ in before),
        )

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        slope = (x - denoise(x, at.sigma)) / at.sigma
        sigma = jnp.broadcast_to(at.sigma, (x.shape[0], 1, 1, 1))
        slopes, sigmas = (slope, *state.slopes), (sigma, *state.sigmas)
        weights = adams(jnp.stack(sigmas), at.sigma_next, at.index)
        for weight, known in zip(weights, slopes, strict=True):
            x = x + weight * known
        return x, Memory(slopes[: self.order - 1], sigmas[: self.order - 1])


def adams(sigmas: Float[Array, "k b 1 1 1"], sigma_next: Sigma, index: Index) -> Array:
    """Weights [k, b, 1, 1, 1]: integrals from sigmas[0] to sigma_next of Lagrange's polynomials.

    Only the first index + 1 levels are known, the others weigh nothing. Gauss's quadrature with q
    nodes is exact up to degree 2 q - 1: two of them for the cubics.
    """
    places, shares = np.polynomial.legendre.leggauss((len(sigmas) + 1) // 2)
    half = (sigma_next - sigmas[0]) / 2
    weights = jnp.zeros_like(sigmas)
    for place, share in zip(places.tolist(), shares.tolist(), strict=True):
        at, value = sigmas[0] + (1 + place) * half, jnp.broadcast_to(share * half, sigmas.shape)
        for k, other in enumerate(sigmas):
            # Of two equal levels one is a finished image's, whose step is discarded.
            told = (k <= index) & (sigmas != other)
            away = (at - other) / jnp.where(told, sigmas - other, 1.0)
            value = value * jnp.where(told, away, 1.0)
        weights = weights + value
    known = jnp.arange(len(sigmas)).reshape(-1, 1, 1, 1, 1) <= index
    return jnp.where(known, weights, 0.0)
