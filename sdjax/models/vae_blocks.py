"""The autoencoder's encoder and decoder."""

import flax.linen as nn
from jaxtyping import Array, Float

from sdjax.models.attention import attention
from sdjax.models.layers import Conv, Dense, GroupNorm
from sdjax.models.resnet import Downsample, ResnetBlock

EPSILON = 1e-6
"""Of every norm in the autoencoder; the UNet's default is 1e-5."""


class Encoder(nn.Module):
    """From pixels to the mean and log-variance of each latent, side by side in the channels.

    `channels` are the widths from the image's size downward; each level but the last halves it.
    """

    channels: tuple[int, ...]
    layers: int
    groups: int
    features: int
    attend: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w features"]:
        """Return [b, H/factor, W/factor, features]."""
        last = len(self.channels) - 1
        x = Conv(self.channels[0], name="conv_in")(x)
        for i, width in enumerate(self.channels):
            block = EncoderBlock(width, self.layers, self.groups, i < last, name=f"down_blocks_{i}")
            x = block(x)
        x = MidBlock(self.channels[-1], self.groups, self.attend, name="mid_block")(x)
        x = GroupNorm(self.groups, EPSILON, act="silu", name="conv_norm_out")(x)
        return Conv(self.features, name="conv_out")(x)


class Decoder(nn.Module):
    """From latents to pixels; `channels` as in `Encoder`, walked from the last to the first."""

    channels: tuple[int, ...]
    layers: int
    groups: int
    features: int
    attend: bool

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W features"]:
        """Return [b, h*factor, w*factor, features]."""
        last = len(self.channels) - 1
        x = Conv(self.channels[-1], name="conv_in")(z)
        x = MidBlock(self.channels[-1], self.groups, self.attend, name="mid_block")(x)
        for i, width in enumerate(reversed(self.channels)):
            layers = self.layers + 1
            x = DecoderBlock(width, layers, self.groups, i < last, name=f"up_blocks_{i}")(x)
        x = GroupNorm(self.groups, EPSILON, act="silu", name="conv_norm_out")(x)
        return Conv(self.features, name="conv_out")(x)


class EncoderBlock(nn.Module):
    """Residual blocks, then half the size, padded below and to the right only."""

    channels: int
    layers: int
    groups: int
    downsample: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b _h _w channels"]:
        """Return [b, h/2, w/2, channels], or [b, h, w, channels] without `downsample`."""
        for i in range(self.layers):
            x = ResnetBlock(self.channels, self.groups, EPSILON, name=f"resnets_{i}")(x)
        return Downsample(self.channels, 0, name="downsamplers_0")(x) if self.downsample else x


class DecoderBlock(nn.Module):
    """Residual blocks, then double the size."""

    channels: int
    layers: int
    groups: int
    upsample: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b _h _w channels"]:
        """Return [b, 2h, 2w, channels], or [b, h, w, channels] without `upsample`."""
        for i in range(self.layers):
            x = ResnetBlock(self.channels, self.groups, EPSILON, name=f"resnets_{i}")(x)
        return Upsample(self.channels, name="upsamplers_0")(x) if self.upsample else x


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 channels"]:
        """Return [b, 2h, 2w, channels]."""
        return Conv(self.channels, double=True, name="conv")(x)


class MidBlock(nn.Module):
    """A residual block, attention over all pixels, a residual block."""

    channels: int
    groups: int
    attend: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return [b, h, w, c]."""
        x = ResnetBlock(self.channels, self.groups, EPSILON, name="resnets_0")(x)
        if self.attend:
            x = PixelAttention(self.groups, name="attentions_0")(x)
        return ResnetBlock(self.channels, self.groups, EPSILON, name="resnets_1")(x)


class PixelAttention(nn.Module):
    """Self-attention over pixels with one head as wide as the map, added to its input."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return [b, h, w, c]."""
        b, h, w, c = x.shape
        y = GroupNorm(self.groups, EPSILON, name="group_norm")(x).reshape(b, h * w, c)
        q, k, v = (Dense(c, name=name)(y)[:, :, None, :] for name in ("to_q", "to_k", "to_v"))
        y = Dense(c, name="to_out_0")(attention(q, k, v)[:, :, 0])
        return x + y.reshape(x.shape)
