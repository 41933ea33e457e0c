"""The discriminator that judges patches of images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from sdjax.errors import InputError
from sdjax.models.convolution import conv2d
from sdjax.models.layers import GroupNorm
from sdjax.types import Array

EPSILON = 1e-5
SLOPE = 0.2
NORMS = ("batch", "group", "none")
WIDEST = 8
"""Times `ndf`: the most channels of a layer."""


class Discriminator(nn.Module):
    """PatchGAN: a logit for each of many overlapping patches (Isola et al. 2017, 1611.07004).

    `n_layers` strided convolutions of 4x4, each but the first followed by a norm, then two of
    stride 1: at 3 layers each logit sees 70x70 pixels. Parameters are named as in CompVis's
    NLayerDiscriminator (`main.0.weight`, ...) and drawn as there, from N(0, 0.02).

    `norm` is "batch" (the reference; statistics are always the batch's own, so there is no state),
    "group" (8 groups, each image by itself) or "none".
    """

    ndf: int = 64
    n_layers: int = 3
    norm: str = "batch"

    @property
    def smallest(self) -> int:
        """Pixels that a side needs for one logit."""
        return 3 * 2**self.n_layers

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w 1"]:
        """Return logits, high for real images of at least `smallest` pixels in each direction."""
        if self.norm not in NORMS:
            raise InputError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        x = jnp.asarray(x)
        at = 0
        for i in range(self.n_layers + 1):
            features = self.ndf * min(2**i, WIDEST)
            normed = i > 0 and self.norm != "none"
            bias = not (normed and self.norm == "batch")
            stride = 2 if i < self.n_layers else 1
            x = PatchConv(features, stride, bias, name=f"main_{at}")(x)
            if normed and self.norm == "batch":
                x = BatchNorm(name=f"main_{at + 1}")(x)
            elif normed:
                x = GroupNorm(8, EPSILON, name=f"main_{at + 1}")(x)
            x = jax.nn.leaky_relu(x, SLOPE)
            at += 3 if normed else 2
        return PatchConv(1, 1, True, name=f"main_{at}")(x)


class PatchConv(nn.Module):
    """A 4x4 convolution padded by 1."""

    features: int
    stride: int
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b _h _w features"]:
        """Return half the size at stride 2, one pixel less at stride 1."""
        shape = (4, 4, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape)
        y = conv2d(x, kernel.astype(x.dtype), self.stride, ((1, 1), (1, 1)))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(x.dtype)
        return y


class BatchNorm(nn.Module):
    """Normalise each channel over the batch and space (Ioffe and Szegedy 2015, 1502.03167)."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalise x; statistics are float32."""

        def near_one(key: Array, shape: tuple[int, ...]) -> Array:
            return 1 + 0.02 * jax.random.normal(key, shape)

        scale = self.param("scale", near_one, (x.shape[-1],)).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
        y = x.astype(jnp.float32)
        mean = y.mean((0, 1, 2))
        var = jnp.square(y - mean).mean((0, 1, 2))
        return ((y - mean) * (lax.rsqrt(var + EPSILON) * scale) + bias).astype(x.dtype)
