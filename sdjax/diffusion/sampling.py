"""From noise to an image: the one `lax.scan`, whole or in segments."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sdjax.diffusion.brownian import BrownianTree
from sdjax.diffusion.noise import Tape, White
from sdjax.errors import InputError
from sdjax.types import Denoiser, Draw, Index, Latents, Noise, Sampler, Sigma, State, Step

Sigmas = Float[Array, "n"] | Float[Array, "n b 1 1 1"] | np.ndarray
"""Noise levels [n+1], or one schedule an image [n+1, b, 1, 1, 1]."""


class Carry(NamedTuple):
    """An unfinished image between two segments: what `scan` takes and gives, to be donated."""

    x: Latents
    state: State


def sample(
    sampler: Sampler, denoise: Denoiser, x: Latents, sigmas: Sigmas, noise: Any = None
) -> Latents:
    """Follow `sigmas` from x (at noise level sigmas[0]) to the last level, usually 0: then x is the
    image.

    Not jitted: callers jit. `noise` is a `Noise`, or keys [b] for the sampler's own kind
    (`noise_of`); a sampler that draws refuses None.

    A step that does not change sigma ends its image: shorter schedules are padded by repeating
    their last value (`spacings.pad`), and every image comes out as it would alone. Gradients flow
    to every argument.
    """
    return scan(sampler, denoise, begin(sampler, x), sigmas, noise).x


def noise_of(sampler: Sampler, keys: Key[Array, "b"], shape: tuple[int, ...]) -> Noise:
    """What a sampler draws where nothing else is asked for: white noise, or of one Brownian path an
    image if its class says `brownian`. `shape` is one image's.
    """
    return (BrownianTree if getattr(sampler, "brownian", False) else White)(keys, shape)


def begin(sampler: Sampler, x: Latents) -> Carry:
    """The carry before the first step; x becomes float32 (float64 stays, where enabled)."""
    x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    state = sampler.init(x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.shape(leaf)[:1] != x.shape[:1]:
            where = jax.tree_util.keystr(path) or "a leaf"
            raise InputError(
                f"{type(sampler).__name__}.init returned {where} of shape {list(jnp.shape(leaf))}: "
                f"a state's leaves are [{x.shape[0]}, ...], one row an image"
            )
    return Carry(x, state)


def scan(
    sampler: Sampler,
    denoise: Denoiser,
    carry: Carry,
    sigmas: Sigmas,
    noise: Any = None,
    start: int | Int[Array, ""] = 0,
    length: int | None = None,
) -> Carry:
    """Steps start .. start + length - 1 of the schedule, all of them by default.

    `start` may be traced and `length` is static, so that one compiled program serves every segment
    of equal length:

        segment = jax.jit(scan, static_argnames="length", donate_argnums=2)
        carry = begin(sampler, x)
        for start in range(0, n, 4):
            carry = segment(sampler, denoise, carry, sigmas, noise, start, length=4)

    which shows progress without host callbacks, gives what `sample` gives, and may overhang the
    end: steps past it cost nothing. `carry.x` between segments is the noisy image at sigmas[start].
    """
    x = carry.x
    _check(x, sigmas)
    sigmas = jnp.asarray(sigmas, x.dtype)
    total = sigmas.shape[0] - 1
    length = total if length is None else length
    if hasattr(sampler, "during"):
        sampler = sampler.during(sigmas)
    source = _noise(sampler, noise, x)
    if isinstance(source, Tape):
        source.check(total, x.shape)

    moving = jnp.cumprod(sigmas[1:] != sigmas[:-1], axis=0, dtype=jnp.int32)
    steps = jnp.sum(moving, axis=0)  # an image's own count: [] or [b, 1, 1, 1]

    def advance(carry: Carry, i: Int[Array, ""]) -> Carry:
        at = _step(sigmas, steps, i)

        def bound(sigma: Sigma, sigma_next: Sigma, draw: Draw = 0) -> Latents:
            return source(at.index, sigma, sigma_next, draw)

        new = Carry(*sampler.step(denoise, carry.x, at, carry.state, bound))
        return jax.tree.map(lambda a, b: _where(i < steps, a, b), new, carry)

    def body(carry: Carry, i: Int[Array, ""]) -> tuple[Carry, None]:
        if isinstance(start, int) and start + length <= total:  # cannot overhang
            return advance(carry, i), None
        return jax.lax.cond(i < total, advance, lambda carry, i: carry, carry, i), None

    return jax.lax.scan(body, carry, jnp.arange(length) + start)[0]


def _step(sigmas: Float[Array, "n ..."], steps: Index, i: Int[Array, ""]) -> Step:
    """Where step i stands; an image that is finished stands at its last step again, an empty one at
    sigma 1.
    """
    index = jnp.clip(i, 0, jnp.maximum(steps - 1, 0))
    sigma, sigma_next = (
        pick(sigmas, index),
        pick(sigmas, jnp.minimum(index + 1, sigmas.shape[0] - 1)),
    )
    empty = steps == 0
    return Step(
        index=index,
        left=jnp.maximum(steps - index, 1),
        sigma=jnp.where(empty, jnp.ones_like(sigma), sigma),
        sigma_next=jnp.where(empty, jnp.zeros_like(sigma), sigma_next),
    )


def pick(table: Float[Array, "n ..."], index: Index) -> Float[Array, "..."]:
    """table[index], where both may be one for all ([n], scalar) or one an image ([n, b, 1, 1, 1],
    [b, 1, 1, 1]).
    """
    if index.ndim == 0 or table.ndim == 1:
        return table[index]
    return jnp.take_along_axis(table, index[None], axis=0)[0]


def _where(keep: Array, new: Array, old: Array) -> Array:
    """`new` for the images that moved. `keep` is [] or [b, 1, 1, 1], leaves are [b, ...] of any
    rank.
    """
    keep = keep if keep.ndim == 0 else keep.reshape(keep.shape[0], *(1,) * (new.ndim - 1))
    return jnp.where(keep, new, old).astype(old.dtype)


def _noise(sampler: Sampler, noise: Any, x: Latents) -> Noise:
    """Keys become noise; None an error, at once where the sampler is known to draw."""
    refusal = InputError(
        f"{type(sampler).__name__} draws noise at every step, but noise is None: pass keys [b] "
        "(sdjax.diffusion.noise.keys(seeds)) or a Noise"
    )
    if noise is None:
        # A sampler's `stochastic` says whether it will draw; else drawing itself is the sign.
        stochastic = getattr(sampler, "stochastic", None)

        def missing(index: Index, sigma: Sigma, sigma_next: Sigma, draw: Draw = 0) -> Latents:
            if stochastic is None:
                raise refusal
            return jnp.full_like(
                x, jnp.nan
            )  # not reached when eta or churn is 0; loud if a traced one is not

        if (
            not isinstance(stochastic, jax.core.Tracer)
            and stochastic is not None
            and np.any(stochastic)
        ):
            raise refusal
        return missing
    if isinstance(noise, jax.Array) and jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
        if noise.shape != x.shape[:1]:
            raise InputError(
                f"noise keys must be one an image, [{x.shape[0]}], got {list(noise.shape)}: "
                "use sdjax.diffusion.noise.keys(seeds)"
            )
        return noise_of(sampler, noise, x.shape[1:])
    if not callable(noise):
        raise InputError(f"noise must be keys [b] or a Noise, got {type(noise).__name__}")
    return noise


def _check(x: Latents, sigmas: Sigmas) -> None:
    shape = jnp.shape(sigmas)
    image = len(shape) == 5 and shape[1] == x.shape[0] and shape[2:] == (1, 1, 1)
    if not (len(shape) == 1 or image) or shape[0] < 2:
        raise InputError(
            f"sigmas must be [n+1] or [n+1, {x.shape[0]}, 1, 1, 1] with n of at least 1, "
            f"got {list(shape)}"
        )
    if not isinstance(sigmas, np.ndarray):
        return
    if not (np.isfinite(sigmas).all() and (sigmas >= 0).all()):
        raise InputError("sigmas must be finite and not negative")
    moves = sigmas[1:] != sigmas[:-1]
    if (moves[1:] & ~moves[:-1]).any():
        raise InputError(
            "sigmas must not repeat a level before their end: a repeated level ends the run, so "
            "give each once (spacings.pad repeats the last)"
        )
    if ((sigmas[:-1] == 0) & moves).any():
        raise InputError("sigmas must be above 0 but at their end: there is no step from 0")
