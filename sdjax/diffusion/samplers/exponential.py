"""What exponential integrators share: phi functions, polynomial weights, and a memory of steps.

In lambda = -log sigma the solution is exact but for one integral over an estimate, and a solver is
a polynomial put in its place: Hochbruck and Ostermann, Exponential integrators (Acta Numerica 19,
2010), section 2; Zhang and Chen (2204.13902); Lu et al. (2206.00927, eq. 3.4).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sdjax.types import Index, Latents, Sigma, Step

Number = Float[Array, "..."]


class History(NamedTuple):
    """Steps before, the latest first."""

    values: tuple[Latents, ...]  # what the solver keeps of an evaluation
    sigmas: tuple[Sigma, ...]  # and where it was, [b, 1, 1, 1]


def blank(x: Latents, length: int) -> History:
    """A memory of `length` steps that have not been."""
    ones = jnp.ones((x.shape[0], 1, 1, 1), x.dtype)
    return History((jnp.zeros_like(x),) * length, (ones,) * length)


def push(history: History, value: Latents, sigma: Sigma) -> History:
    """The latest first, the oldest forgotten."""
    length = len(history.values)
    sigma = jnp.broadcast_to(sigma, (value.shape[0], 1, 1, 1)).astype(value.dtype)
    return History((value, *history.values)[:length], (sigma, *history.sigmas)[:length])


def log_ratio(sigma: Sigma, sigma_next: Sigma) -> Number:
    """The step's length in lambda, log(sigma / sigma_next); where it ends at 0, a halving's."""
    ends = sigma_next == 0
    return -jnp.log(jnp.where(ends, 0.5, sigma_next / sigma))


def last_sigma(history: History, at: Step) -> Sigma:
    """The level that the step before left from; harmless where there was none."""
    before = history.sigmas[0]
    return jnp.where((at.index > 0) & (before != at.sigma), before, 2 * at.sigma)


def places(history: History, sigma: Sigma, h: Number, known: Index) -> list[Number]:
    """Where the steps before stood, in step lengths `h` from `sigma`: -1 is one step back.

    `known` counts those that have been; the others stand where they harm no arithmetic.
    """
    where = []
    for k, other in enumerate(history.sigmas):
        at = jnp.log(sigma / other) / h
        # Level for level the same is a finished image, whose step is discarded.
        where.append(jnp.where((k < known) & (at != 0), at, -1.0 - k))
    return where


def phi(order: int, z: Number) -> Number:
    """The integral of e^((1 - t) z) t^(k-1) / (k-1)! over 0 .. 1: (e^z - 1) / z for k = 1."""
    return phis(order, z)[-1]


def phis(count: int, z: Number) -> list[Number]:
    """`phi` of orders 1 .. count.

    The recursion phi_{k+1} = (phi_k - 1 / k!) / z cancels near 0: there the last is its series, and
    the others come down from it.
    """
    near = jnp.abs(z) < 1
    small, large = jnp.where(near, z, 0.0), jnp.where(near, 1.0, z)
    down = jnp.zeros_like(small)
    for j in reversed(range(13)):
        down = down * small + 1 / math.factorial(j + count)
    up = jnp.expm1(large) / large
    below, above = [down], [up]
    for k in range(1, count):
        above.append((above[-1] - 1 / math.factorial(k)) / large)
        below.insert(0, below[0] * small + 1 / math.factorial(count - k))
    return [jnp.where(near, b, a) for a, b in zip(above, below, strict=True)]


def moments(z: Number, count: int) -> list[Number]:
    """Integrals of e^((1 - t) z) t^j over 0 .. 1, for j below `count`."""
    return [math.factorial(j) * value for j, value in enumerate(phis(count, z))]


def shares(nodes: Sequence[Number], moments: Sequence[Number]) -> list[Number]:
    """What each node counts in an integral: its Lagrange polynomial, with moments for powers.

    Also the solution w of sum_k nodes_k^j w_k = moments_j (Vandermonde's system).
    """
    result = []
    for i, own in enumerate(nodes):
        # Ascending, of prod_k (t - other_k) / (own - other_k).
        coefficients: list[Number] = [jnp.ones_like(jnp.asarray(moments[0]))]
        for k, other in enumerate(nodes):
            if k == i:
                continue
            gap = own - other
            gap = jnp.where(gap == 0, 1.0, gap)
            nought = [jnp.zeros_like(coefficients[0])]
            raised, lowered = nought + coefficients, [*coefficients, *nought]
            coefficients = [(a - other * b) / gap for a, b in zip(raised, lowered, strict=True)]
        total = jnp.zeros_like(coefficients[0])
        for c, moment in zip(coefficients, moments, strict=True):
            total = total + c * moment
        result.append(total)
    return result


def choose(order: ArrayLike, candidates: Sequence[Sequence[Number]]) -> list[Number]:
    """Of the weights for orders 1, 2, ... those of `order`, which images need not share.

    Candidate p has p weights or fewer; what is missing is 0.
    """
    longest = max(len(c) for c in candidates)
    chosen: list[Number] = [jnp.zeros(())] * longest
    for p, weights in enumerate(candidates, 1):
        for k, weight in enumerate(weights):
            chosen[k] = chosen[k] + jnp.where(jnp.asarray(order) == p, weight, 0.0)
    return chosen


def limited(most: int, index: Index) -> Index:
    """The order that the steps so far allow, at most `most`."""
    return jnp.minimum(most, index + 1)
