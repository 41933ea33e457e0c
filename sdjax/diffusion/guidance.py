"""Denoiser -> Denoiser: guidance, and whatever else changes an estimate."""

import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from sdjax.types import Denoiser, Latents, Sigma


def cfg(denoise: Denoiser, guidance_scale: ArrayLike) -> Denoiser:
    """Classifier-free guidance: negative + scale (positive - negative). Ho and Salimans
    (2207.12598), eq. 6.

    `denoise` works on twice the batch, its context negatives first, then positives; the result
    works on the batch. `guidance_scale` is a number, [b] or [b, 1, 1, 1]; 1 is no guidance, at
    twice the cost.
    """
    return Partial(_cfg, partial(denoise), guidance_scale)


def clip(denoise: Denoiser, limit: ArrayLike) -> Denoiser:
    """The estimate kept within -limit .. limit: `clip_sample`, for models of pixels."""
    return Partial(_clip, partial(denoise), limit)


def partial(denoise: Denoiser) -> Partial:
    """A denoiser that may be an argument under jit; equal functions share one program."""
    return denoise if isinstance(denoise, Partial) else Partial(denoise)


def _cfg(denoise: Denoiser, guidance_scale: ArrayLike, x: Latents, sigma: Sigma) -> Latents:
    scale = jnp.asarray(guidance_scale, x.dtype)
    if scale.ndim == 1:
        scale = scale[:, None, None, None]
    both = sigma if sigma.ndim == 0 else jnp.concatenate([sigma, sigma])
    negative, positive = jnp.split(denoise(jnp.concatenate([x, x]), both), 2)
    return negative + scale * (positive - negative)


def _clip(denoise: Denoiser, limit: ArrayLike, x: Latents, sigma: Sigma) -> Latents:
    return jnp.clip(denoise(x, sigma), -jnp.asarray(limit), limit)
