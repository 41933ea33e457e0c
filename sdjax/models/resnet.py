"""The residual block that the UNet and the autoencoder share."""

import flax.linen as nn
from jaxtyping import Array, Float

from sdjax.models.layers import Conv, Dense, GroupNorm


class ResnetBlock(nn.Module):
    """Two normalised convolutions around a residual connection, moved by the time embedding.

    He et al. 2016 (arXiv 1603.05027) in its pre-activation form. `temb` is the time embedding after
    its SiLU, which all blocks share; None in the autoencoder. The sum is divided by `scale`.
    """

    channels: int
    groups: int
    epsilon: float
    scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], temb: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w channels"]:
        """Return [b, h, w, channels]."""
        h = GroupNorm(self.groups, self.epsilon, act="silu", name="norm1")(x)
        h = Conv(self.channels, name="conv1")(h)
        if temb is not None:
            h = h + Dense(self.channels, name="time_emb_proj")(temb)[:, None, None, :]
        h = GroupNorm(self.groups, self.epsilon, act="silu", name="norm2")(h)
        h = Conv(self.channels, name="conv2")(h)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, kernel_size=1, padding=0, name="conv_shortcut")(x)
        return x + h if self.scale == 1.0 else (x + h) / self.scale


class Downsample(nn.Module):
    """Halve height and width by a strided convolution.

    `padding` 0 is diffusers' asymmetric case: one row below and one column to the right.
    """

    channels: int
    padding: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 channels"]:
        """Return [b, ceil(h/2), ceil(w/2), channels] with padding 1."""
        padding = self.padding if self.padding else ((0, 1), (0, 1))
        return Conv(self.channels, stride=2, padding=padding, name="conv")(x)
