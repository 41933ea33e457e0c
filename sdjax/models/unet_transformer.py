"""The UNet's spatial transformer: self-attention, cross-attention to the text, and a gated MLP."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdjax.models.attention import attention
from sdjax.models.layers import Conv, Dense, GroupNorm, LayerNorm

Projected = dict[str, Any]
"""Keys and values of the text for every cross-attention, nested as the modules are."""


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be computed ahead (`project`)."""

    heads: int
    channels: int

    def setup(self) -> None:
        """Name the four maps as checkpoints do."""
        self.to_q = Dense(self.channels, use_bias=False)
        self.to_k = Dense(self.channels, use_bias=False)
        self.to_v = Dense(self.channels, use_bias=False)
        self.to_out_0 = Dense(self.channels)

    def project(self, context: Float[Array, "b t d"]) -> Projected:
        """Return keys and values, each [b, t, heads, channels/heads]."""
        return {"k": self._split(self.to_k(context)), "v": self._split(self.to_v(context))}

    def __call__(
        self, x: Float[Array, "b s c"], projected: Projected | None = None
    ) -> Float[Array, "b s c"]:
        """Attend to the projected context, or to x itself where there is none."""
        kv = self.project(x) if projected is None else projected
        k, v = kv["k"].astype(x.dtype), kv["v"].astype(x.dtype)
        y = attention(self._split(self.to_q(x)), k, v)
        return self.to_out_0(y.reshape(x.shape))

    def _split(self, x: Float[Array, "b s c"]) -> Float[Array, "b s h d"]:
        return x.reshape(*x.shape[:2], self.heads, -1)


class GEGLU(nn.Module):
    """A map to two halves, one gated by the other's GELU (Shazeer 2020, arXiv 2002.05202)."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s features"]:
        """Return [b, s, features]."""
        value, gate = jnp.split(Dense(2 * self.features, name="proj")(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """The gated MLP, four times as wide inside."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
        """Return [b, s, c]; `net_1` is the reference's dropout."""
        return Dense(self.channels, name="net_2")(GEGLU(4 * self.channels, name="net_0")(x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, MLP, each normalised before and added after.

    With `only_cross` the first attention reads the text too (the x4 upscaler).
    """

    heads: int
    channels: int
    only_cross: bool = False

    def setup(self) -> None:
        """Every LayerNorm here has epsilon 1e-5, whatever the UNet's `norm_eps`."""
        self.norm1 = LayerNorm(1e-5)
        self.attn1 = Attention(self.heads, self.channels)
        self.norm2 = LayerNorm(1e-5)
        self.attn2 = Attention(self.heads, self.channels)
        self.norm3 = LayerNorm(1e-5)
        self.ff = FeedForward(self.channels)

    def project_context(self, context: Float[Array, "b t d"]) -> Projected:
        """Return the keys and values of the attentions that read the text."""
        projected = {"attn2": self.attn2.project(context)}
        return projected | ({"attn1": self.attn1.project(context)} if self.only_cross else {})

    def __call__(self, x: Float[Array, "b s c"], projected: Projected) -> Float[Array, "b s c"]:
        """Return [b, s, c]."""
        x = x + self.attn1(self.norm1(x), projected.get("attn1"))
        x = x + self.attn2(self.norm2(x), projected["attn2"])
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (Rombach et al. 2022, arXiv 2112.10752).

    `linear` says whether the checkpoint stores the two outer maps as matrices (SD2, SDXL) or as 1x1
    convolutions (SD1); they compute the same.
    """

    heads: int
    channels: int
    depth: int
    groups: int
    linear: bool
    only_cross: bool = False

    def setup(self) -> None:
        """This GroupNorm has epsilon 1e-6, whatever the UNet's `norm_eps`."""
        self.norm = GroupNorm(self.groups, 1e-6)
        self.proj_in = self._outer()
        self.transformer_blocks = [
            TransformerBlock(self.heads, self.channels, self.only_cross) for _ in range(self.depth)
        ]
        self.proj_out = self._outer()

    def project_context(self, context: Float[Array, "b t d"]) -> Projected:
        """Return the blocks' keys and values."""
        return {
            f"transformer_blocks_{i}": block.project_context(context)
            for i, block in enumerate(self.transformer_blocks)
        }

    def __call__(self, x: Float[Array, "b h w c"], projected: Projected) -> Float[Array, "b h w c"]:
        """Return [b, h, w, c]."""
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        for i, block in enumerate(self.transformer_blocks):
            y = block(y, projected[f"transformer_blocks_{i}"])
        return x + self.proj_out(y.reshape(b, h, w, c))

    def _outer(self) -> nn.Module:
        c = self.channels
        return Dense(c) if self.linear else Conv(c, kernel_size=1, padding=0)
