"""Scaled dot-product attention, for every network."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "b s h d"]:
    """Return softmax(scale * q kᵀ) v for every head.

    Vaswani et al. 2017 (arXiv 1706.03762), equation 1. `scale` is 1/sqrt(d) where it is None. With `causal`, query
    i sees keys 0..i. The softmax is float32; the result has q's dtype.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * jnp.einsum("bshd,bthd->bhst", q, k, preferred_element_type=jnp.float32)
    if causal:
        s, t = scores.shape[-2:]
        scores = jnp.where(jnp.arange(s)[:, None] >= jnp.arange(t), scores, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(q.dtype)
    return jnp.einsum("bhst,bthd->bshd", weights, v)
