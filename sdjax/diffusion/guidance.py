"""Denoiser -> Denoiser: guidance, and whatever else changes an estimate.

A guided denoiser takes a network that works on several sides at once: k times the batch, all
negatives first, then all positives. One true batch is one evaluation of the network, k times as
wide. What is linear in the estimates is here; `projection` has the methods that are not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Float

from sdjax.diffusion.sampling import pick
from sdjax.diffusion.stochastic import ancestral
from sdjax.errors import InputError
from sdjax.types import Array, Denoiser, Latents, Sigma, pytree

_CURVED = ("apg", "perp_neg", "rescale", "tangential", "zero_star")


def __getattr__(name: str) -> Any:
    """`projection`'s methods are guidance too, and it stands on this module."""
    if name not in _CURVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sdjax.diffusion import projection

    return getattr(projection, name)


Scale = ArrayLike | Callable[[Sigma], Any]
"""A number, one an image ([b] or [b, 1, 1, 1]), or a function of sigma such as `PerStep`."""


def cfg(denoise: Denoiser, guidance_scale: Scale, plain: Denoiser | None = None) -> Denoiser:
    """Classifier-free guidance: negative + scale (positive - negative). Ho and Salimans
    (2207.12598), eq. 6.

    `denoise` works on twice the batch, its context negatives first, then positives; the result
    works on the batch. `guidance_scale` 1 is no guidance, at twice the cost, unless the positives
    have a denoiser of their own, `plain`, which then answers where it is 1 for all images.
    """
    return Partial(
        _cfg, partial(denoise), guidance_scale, None if plain is None else partial(plain)
    )


@pytree
class PerStep:
    """A guidance scale for each step: `scales` [n] for `sigmas` [n+1], or [n, b, 1, 1, 1] and
    [n+1, b, 1, 1, 1].

    Between two levels it is the step's that goes down from the upper one, so that solvers with
    midpoints keep one scale throughout a step.
    """

    sigmas: Any
    scales: Any

    def __call__(self, sigma: Sigma) -> Float[Array, "..."]:
        ends, scales = (jnp.asarray(v, sigma.dtype) for v in (self.sigmas[1:], self.scales))
        if sigma.ndim and ends.ndim == 1:
            ends = ends.reshape(-1, 1, 1, 1, 1)
        index = jnp.sum(ends >= sigma, axis=0)
        return pick(scales, jnp.minimum(index, scales.shape[0] - 1))


def interval(guided: Denoiser, plain: Denoiser, low: ArrayLike, high: ArrayLike) -> Denoiser:
    """Guidance only where low < sigma <= high. Kynkaanniemi et al. (2404.07724).

    Elsewhere the positives' own denoiser, `plain`, answers alone: half the cost. Only a batch whose
    images stand on both sides of a bound pays for both. `low` and `high` are numbers or [b, 1, 1,
    1].
    """
    return Partial(_interval, partial(guided), partial(plain), low, high)


def cfg_plus_plus(
    denoise: Denoiser,
    strength: ArrayLike,
    sigmas: Any,
    plain: Denoiser | None = None,
    eta: ArrayLike = 0.0,
) -> Denoiser:
    """CFG++: the guided estimate, renoised along the negative's direction. Chung et al.
    (2406.08070).

    Its step x0_strength + (s'/s)(x - x0_negative) is Euler's, and DDIM's, under a guidance scale of
    strength / (1 - s'/s): a `PerStep` for the levels that will be run, `sigmas` [n+1] or [n+1, b,
    1, 1, 1]. With `eta`, s' is where DDIM or Euler ancestral lands before it adds noise. Other
    solvers take the same scale for their own steps. `strength` is a number or [b, 1, 1, 1], 0 to 1.
    """
    levels = jnp.asarray(sigmas, jnp.float32)
    above = jnp.where(levels[:-1] > 0, levels[:-1], 1)
    down = jax.vmap(lambda sigma, lower: ancestral(sigma, lower, eta)[0])(above, levels[1:])
    ratio = down / above
    left = jnp.where(ratio < 1, 1 - ratio, 1)  # padding goes nowhere
    if jnp.ndim(strength) and left.ndim == 1:
        left = left.reshape(-1, 1, 1, 1, 1)
    return cfg(denoise, PerStep(levels, jnp.asarray(strength) / left), plain)


def composed(denoise: Denoiser, weights: Sequence[ArrayLike] | ArrayLike) -> Denoiser:
    """Several prompts at once: negative + sum of weight_i (prompt_i - negative). Liu et al.
    (2206.01714), section 4.

    `denoise` works on 1 + k times the batch: negatives, first prompts, ..., k-th prompts. `weights`
    are k numbers, or k of [b, 1, 1, 1]; a negative one is the paper's negation. One weight is
    `cfg`.
    """
    return Partial(_composed, partial(denoise), tuple(jnp.asarray(w) for w in _listed(weights)))


def autoguidance(denoise: Denoiser, worse: Denoiser, guidance_scale: Scale) -> Denoiser:
    """Guided by a worse version of the same model: worse + scale (denoise - worse). Karras et al.
    (2406.02507).

    Both work on the batch, under the same condition: two evaluations, of which the second is
    usually of a smaller or less trained network.
    """
    return Partial(_autoguidance, partial(denoise), partial(worse), guidance_scale)


def clip(denoise: Denoiser, limit: ArrayLike) -> Denoiser:
    """The estimate kept within -limit .. limit: `clip_sample`, for models of pixels."""
    return Partial(_clip, partial(denoise), limit)


def threshold(
    denoise: Denoiser,
    ratio: ArrayLike = 0.995,
    limit: ArrayLike = 1.0,
    maximum: ArrayLike = float("inf"),
) -> Denoiser:
    """Dynamic thresholding: clip each image at a quantile of its own, and scale that to `limit`.
    Saharia et al. (2205.11487), section 2.3.

    The quantile `ratio` of |x0| counts where it lies between `limit` and `maximum`, diffusers'
    `sample_max_value`, which is 1 there by default: then it is `clip`.
    """
    return Partial(_threshold, partial(denoise), ratio, limit, maximum)


def remat(denoise: Denoiser) -> Denoiser:
    """The same estimate, computed again for its gradient: a run then keeps one x a step and no
    activation of the network. Chen et al. (1604.06174).
    """
    return Partial(_remat, partial(denoise))


def partial(denoise: Denoiser) -> Denoiser:
    """A denoiser that may be an argument under jit; equal functions share one program."""
    plain = jax.tree_util.all_leaves([denoise])  # a function, or what jax cannot look into
    return Partial(denoise) if plain else denoise


def sides(denoise: Denoiser, count: int, x: Latents, sigma: Sigma) -> list[Latents]:
    """The estimates of a denoiser of `count` times the batch."""
    levels = sigma if sigma.ndim == 0 else jnp.concatenate([sigma] * count)
    return jnp.split(denoise(jnp.concatenate([x] * count), levels), count)


def with_negative(denoise: Denoiser, x: Latents, sigma: Sigma) -> tuple[Latents, Latents]:
    """The guided estimate and the negative's own, for the cost of the first: for samplers that step
    along the negative's direction, as CFG++ (2406.08070). `denoise` is `cfg`'s, or clips or
    thresholds its estimate.
    """
    here = get_opaque_trace_state()
    seen: list[Latents] = []

    def is_cfg(node: Any) -> bool:
        return isinstance(node, Partial) and node.func is _cfg

    def watched(node: Any) -> Any:
        if not is_cfg(node):
            return node
        network, guidance_scale, _ = node.args

        def guided(x: Latents, sigma: Sigma) -> Latents:
            negative, positive = sides(network, 2, x, sigma)
            if get_opaque_trace_state() == here:  # under a cond it belongs to another program
                seen.append(negative)
            return negative + scale_at(guidance_scale, x, sigma) * (positive - negative)

        return guided

    x0 = jax.tree.map(watched, denoise, is_leaf=is_cfg)(x, sigma)
    if len(seen) != 1:
        raise InputError(
            "a CFG++ sampler needs the denoiser that guidance.cfg returns: take cfg for guidance, "
            "at a guidance_scale other than 1"
        )
    return x0, seen[0]


def thresholded(
    x0: Latents, ratio: ArrayLike, limit: ArrayLike, maximum: ArrayLike = float("inf")
) -> Latents:
    """Each image clipped at a quantile of its own, and that scaled to `limit`: Saharia et al.
    (2205.11487), section 2.3.
    """
    rows = jnp.abs(x0).reshape(x0.shape[0], -1)
    bound = jnp.clip(jnp.quantile(rows, jnp.asarray(ratio), axis=1), limit, maximum)
    bound = bound[:, None, None, None]
    return jnp.clip(x0, -bound, bound) / bound * limit


def scale_at(guidance_scale: Scale, x: Latents, sigma: Sigma) -> Float[Array, "..."]:
    """A scale that broadcasts against x."""
    value = guidance_scale(sigma) if callable(guidance_scale) else guidance_scale
    scale = jnp.asarray(value, x.dtype)
    return scale[:, None, None, None] if scale.ndim == 1 else scale


def _cfg(
    denoise: Denoiser, guidance_scale: Scale, plain: Denoiser | None, x: Latents, sigma: Sigma
) -> Latents:
    scale = scale_at(guidance_scale, x, sigma)

    def guided(x: Latents) -> Latents:
        negative, positive = sides(denoise, 2, x, sigma)
        return negative + scale * (positive - negative)

    if plain is None:
        return guided(x)
    return jax.lax.cond(jnp.any(scale != 1), guided, lambda x: plain(x, sigma), x)


def _interval(
    guided: Denoiser, plain: Denoiser, low: ArrayLike, high: ArrayLike, x: Latents, sigma: Sigma
) -> Latents:
    inside = (low < sigma) & (sigma <= high)

    def where(wanted: Any, denoise: Denoiser) -> Latents:
        return jax.lax.cond(jnp.any(wanted), lambda x: denoise(x, sigma), jnp.zeros_like, x)

    return jnp.where(inside, where(inside, guided), where(~inside, plain))


def _listed(weights: Any) -> list[Any]:
    return list(weights) if isinstance(weights, list | tuple) or jnp.ndim(weights) else [weights]


def _composed(denoise: Denoiser, weights: tuple[Any, ...], x: Latents, sigma: Sigma) -> Latents:
    negative, *prompts = sides(denoise, 1 + len(weights), x, sigma)
    towards = [w * (p - negative) for w, p in zip(weights, prompts, strict=True)]
    return negative + sum(towards[1:], towards[0])


def _autoguidance(
    denoise: Denoiser, worse: Denoiser, guidance_scale: Scale, x: Latents, sigma: Sigma
) -> Latents:
    base = worse(x, sigma)
    return base + scale_at(guidance_scale, x, sigma) * (denoise(x, sigma) - base)


def _clip(denoise: Denoiser, limit: ArrayLike, x: Latents, sigma: Sigma) -> Latents:
    return jnp.clip(denoise(x, sigma), -jnp.asarray(limit), limit)


def _threshold(
    denoise: Denoiser,
    ratio: ArrayLike,
    limit: ArrayLike,
    maximum: ArrayLike,
    x: Latents,
    sigma: Sigma,
) -> Latents:
    return thresholded(denoise(x, sigma), ratio, limit, maximum)


def _remat(denoise: Denoiser, x: Latents, sigma: Sigma) -> Latents:
    return jax.checkpoint(lambda denoise, x, sigma: denoise(x, sigma))(denoise, x, sigma)
