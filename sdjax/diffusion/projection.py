"""Guidance that is not linear: parts of the difference are stretched, turned or left out.

These depend on what the two estimates are taken of, the image, its noise or v: `prediction` is one
of "sample", "epsilon" and "v_prediction", each method's own by default. diffusers takes what its
network predicts. All reductions are over one image.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
from jax.tree_util import Partial
from jax.typing import ArrayLike

from sdjax.diffusion.guidance import Scale, partial, scale_at, sides
from sdjax.diffusion.schedules import PREDICTIONS
from sdjax.diffusion.stochastic import Around, root
from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, Sigma, State, Step, StepNoise, pytree, static


def rescale(
    denoise: Denoiser,
    guidance_scale: Scale,
    strength: ArrayLike = 0.7,
    prediction: str = "epsilon",
) -> Denoiser:
    """Classifier-free guidance with the standard deviation of the positive. Lin et al.
    (2305.08891), section 3.4.

    `strength` mixes: 0 is `cfg`, 1 has exactly the positive's deviation. diffusers'
    `guidance_rescale` takes the network's own prediction, ComfyUI's RescaleCFG v.
    """
    return Partial(
        _rescale, _Kind(_checked(prediction)), partial(denoise), guidance_scale, strength
    )


def apg(
    denoise: Denoiser,
    guidance_scale: Scale,
    eta: ArrayLike = 0.0,
    norm: ArrayLike = float("inf"),
    prediction: str = "sample",
) -> Denoiser:
    """Adaptive projected guidance: the part along the positive, which oversaturates, shrinks to
    `eta`. Sadat et al. (2410.02416).

    positive + (scale - 1) (orthogonal + eta parallel), the difference first shortened to `norm`
    where it is longer. `Momentum` around the sampler adds the paper's third part.
    """
    return APG(partial(denoise), guidance_scale, eta, norm, None, _checked(prediction))


def zero_star(
    denoise: Denoiser,
    guidance_scale: Scale,
    above: ArrayLike = float("inf"),
    prediction: str = "epsilon",
) -> Denoiser:
    """CFG-Zero*: the negative is scaled to lie nearest to the positive; the first steps may stand
    still. Fan et al. (2503.18886).

    s negative + scale (positive - s negative), s = <positive, negative> / |negative|^2. Where sigma
    > `above` the prediction is 0, without an evaluation: in Euler's step x then stays as it is for
    "epsilon". The paper stands still for 4 % of the steps, and predicts a flow's velocity.
    """
    kind = _Kind(_checked(prediction))
    return Partial(_zero_star, kind, partial(denoise), guidance_scale, above)


def tangential(denoise: Denoiser, guidance_scale: Scale, prediction: str = "epsilon") -> Denoiser:
    """TCFG: of the negative only what lies along the first singular vector of both counts. Kwon et
    al. (2503.18137).

    The paper's decomposition of the two stacked predictions, in closed form.
    """
    return Partial(_tangential, _Kind(_checked(prediction)), partial(denoise), guidance_scale)


def perp_neg(
    denoise: Denoiser, guidance_scale: Scale, negative_weight: ArrayLike = 1.0
) -> Denoiser:
    """Perp-Neg: of the negative only what is perpendicular to the positive is taken away.
    Armandpour et al. (2304.04968).

    `denoise` works on three times the batch: empty prompts, negatives, positives. empty + scale
    (p - weight n_perpendicular), p and n counted from empty.
    """
    return Partial(_perp_neg, partial(denoise), guidance_scale, negative_weight)


@pytree
class APG:
    """A denoiser of `apg`, whose running average `Momentum` keeps."""

    denoise: Any
    guidance_scale: Any
    eta: ArrayLike
    norm: ArrayLike
    average: Any
    prediction: str = static(default="sample")

    def __call__(self, x: Latents, sigma: Sigma) -> Latents:
        return self.guided(x, sigma, *self.change(x, sigma))

    def change(self, x: Latents, sigma: Sigma) -> tuple[Latents, Latents]:
        """The positive, and the difference with what is left of earlier ones."""
        negative, positive = _pair(self.prediction, self.denoise, x, sigma)
        change = positive - negative
        return positive, change if self.average is None else change + self.average

    def guided(self, x: Latents, sigma: Sigma, positive: Latents, change: Latents) -> Latents:
        """The estimate from both."""
        length = root(_dot(change, change))
        change = change * jnp.minimum(1.0, self.norm / jnp.where(length > 0, length, 1.0))
        along = _share(change, positive) * positive
        update = change - along + self.eta * along
        out = positive + (scale_at(self.guidance_scale, x, sigma) - 1) * update
        return _estimate(self.prediction, out, x, sigma)


@pytree
class Momentum(Around):
    """A sampler that runs under `apg` with momentum. Sadat et al. (2410.02416).

    Each step's difference is added to `momentum` times the average before it; -0.5 is the paper's.
    A step's first evaluation counts, and its others see the same average. The denoiser is `apg`'s,
    or clips or thresholds its estimate.
    """

    sampler: Any
    momentum: ArrayLike = -0.5

    def init(self, x: Latents) -> State:
        return self.sampler.init(x), jnp.zeros_like(x)

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        inner, average = state
        here, seen, found = get_opaque_trace_state(), [average], False

        def watched(node: Any) -> Any:
            nonlocal found
            if not isinstance(node, APG):
                return node
            found = True
            guide = dataclasses.replace(node, average=self.momentum * average)

            def guided(x: Latents, sigma: Sigma) -> Latents:
                positive, change = guide.change(x, sigma)
                if len(seen) == 1 and get_opaque_trace_state() == here:
                    seen.append(change)
                return guide.guided(x, sigma, positive, change)

            return guided

        guided = jax.tree.map(watched, denoise, is_leaf=lambda node: isinstance(node, APG))
        if not found:
            raise InputError(
                f"Momentum needs the denoiser that apg returns, got {type(denoise).__name__}"
            )
        x, inner = self.sampler.step(guided, x, at, inner, noise)
        if len(seen) == 1:
            raise InputError(
                f"{type(self.sampler).__name__} asks for estimates in a loop or under a condition "
                "only: Momentum cannot follow it"
            )
        return x, (inner, seen[-1])


@pytree
class _Kind:
    """What is predicted, static inside a `Partial`."""

    name: str = static()


def _checked(prediction: str) -> str:
    if prediction not in PREDICTIONS:
        raise InputError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    return prediction


def _rescale(
    kind: _Kind,
    denoise: Denoiser,
    guidance_scale: Scale,
    strength: ArrayLike,
    x: Latents,
    sigma: Sigma,
) -> Latents:
    negative, positive = _pair(kind.name, denoise, x, sigma)
    out = negative + scale_at(guidance_scale, x, sigma) * (positive - negative)
    wanted, found = _deviation(positive), _deviation(out)
    ratio = jnp.where(found > 0, wanted / jnp.where(found > 0, found, 1.0), 1.0)
    return _estimate(kind.name, out * (1 + strength * (ratio - 1)), x, sigma)


def _zero_star(
    kind: _Kind,
    denoise: Denoiser,
    guidance_scale: Scale,
    above: ArrayLike,
    x: Latents,
    sigma: Sigma,
) -> Latents:
    moves = sigma <= above

    def guided(x: Latents) -> Latents:
        negative, positive = _pair(kind.name, denoise, x, sigma)
        nearest = _share(positive, negative) * negative
        return nearest + scale_at(guidance_scale, x, sigma) * (positive - nearest)

    out = jax.lax.cond(jnp.any(moves), guided, jnp.zeros_like, x)
    return _estimate(kind.name, jnp.where(moves, out, 0.0), x, sigma)


def _tangential(
    kind: _Kind, denoise: Denoiser, guidance_scale: Scale, x: Latents, sigma: Sigma
) -> Latents:
    negative, positive = _pair(kind.name, denoise, x, sigma)
    pp, pn, nn = _dot(positive, positive), _dot(positive, negative), _dot(negative, negative)
    # The leading eigenvector (cos, sin) of [[pp, pn], [pn, nn]]; atan2 has no gradient at (0, 0).
    flat = (pn == 0) & (pp == nn)
    angle = jnp.arctan2(jnp.where(flat, 0.0, 2 * pn), jnp.where(flat, 1.0, pp - nn)) / 2
    leading = jnp.cos(angle) * positive + jnp.sin(angle) * negative
    kept = _share(negative, leading) * leading
    out = kept + scale_at(guidance_scale, x, sigma) * (positive - kept)
    return _estimate(kind.name, out, x, sigma)


def _perp_neg(
    denoise: Denoiser, guidance_scale: Scale, weight: ArrayLike, x: Latents, sigma: Sigma
) -> Latents:
    empty, negative, positive = sides(denoise, 3, x, sigma)
    positive, negative = positive - empty, negative - empty
    away = negative - _share(negative, positive) * positive
    return empty + scale_at(guidance_scale, x, sigma) * (positive - jnp.asarray(weight) * away)


def _pair(kind: str, denoise: Denoiser, x: Latents, sigma: Sigma) -> list[Latents]:
    return [_prediction(kind, x0, x, sigma) for x0 in sides(denoise, 2, x, sigma)]


def _prediction(kind: str, x0: Latents, x: Latents, sigma: Sigma) -> Latents:
    """What a network would have said: the image, the noise, or v = alpha noise - sigma' image of
    variance-preserving latents (Salimans and Ho, 2202.00512).
    """
    if kind == "sample":
        return x0
    noise = (x - x0) / sigma
    return noise if kind == "epsilon" else (noise - sigma * x0) / jnp.sqrt(1 + sigma**2)


def _estimate(kind: str, out: Latents, x: Latents, sigma: Sigma) -> Latents:
    """The inverse of `_prediction`."""
    if kind == "sample":
        return out
    if kind == "epsilon":
        return x - sigma * out
    return x / (1 + sigma**2) - sigma / jnp.sqrt(1 + sigma**2) * out


def _dot(a: Latents, b: Latents) -> Any:
    return jnp.sum(a * b, axis=(1, 2, 3), keepdims=True)


def _share(a: Latents, b: Latents) -> Any:
    """How much of b there is in a: <a, b> / <b, b>; 0 where b is."""
    square = _dot(b, b)
    return jnp.where(square > 0, _dot(a, b) / jnp.where(square > 0, square, 1.0), 0.0)


def _deviation(a: Latents) -> Any:
    return root(jnp.var(a, axis=(1, 2, 3), keepdims=True))
