"""The UNet's down, middle and up blocks."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax.models.layers import Conv
from sdjax.models.resnet import Downsample, ResnetBlock
from sdjax.models.unet_config import Block
from sdjax.models.unet_transformer import Projected, SpatialTransformer

Skips = tuple[Float[Array, "b _h _w _c"], ...]


class DownBlock(nn.Module):
    """Residual blocks, each with its transformer if there is attention, then half the size."""

    block: Block
    downsample: bool
    padding: int = 1

    def setup(self) -> None:
        """Name the parts as checkpoints do."""
        self.resnets = _resnets(self.block)
        self.attentions = _attentions(self.block)
        downsamplers = [Downsample(self.block.channels, self.padding)]
        self.downsamplers = downsamplers if self.downsample else []

    def project_context(self, context: Float[Array, "b t d"]) -> Projected:
        """Return the transformers' keys and values."""
        return _project(self.attentions, context)

    def __call__(
        self, x: Float[Array, "b h w c"], temb: Float[Array, "b t"], projected: Projected
    ) -> tuple[Float[Array, "b _h _w _c"], Skips]:
        """Return the block's output, and every map that the way up will read."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[i](x, projected[f"attentions_{i}"])
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, tuple(skips)


class MidBlock(nn.Module):
    """A residual block, then pairs of transformer and residual block, at the smallest size.

    Its self-attention is always that: `only_cross` is not for the middle.
    """

    block: Block

    def setup(self) -> None:
        """Name the parts as checkpoints do."""
        self.resnets = _resnets(self.block)
        self.attentions = _attentions(self.block)

    def project_context(self, context: Float[Array, "b t d"]) -> Projected:
        """Return the transformers' keys and values."""
        return _project(self.attentions, context)

    def __call__(
        self, x: Float[Array, "b h w c"], temb: Float[Array, "b t"], projected: Projected
    ) -> Float[Array, "b h w c"]:
        """Return [b, h, w, c]."""
        x = self.resnets[0](x, temb)
        for i, attention in enumerate(self.attentions):
            x = self.resnets[i + 1](attention(x, projected[f"attentions_{i}"]), temb)
        return x


class UpBlock(nn.Module):
    """Residual blocks over x and a skip side by side, their transformers, then the next size."""

    block: Block
    upsample: bool

    def setup(self) -> None:
        """Name the parts as checkpoints do."""
        self.resnets = _resnets(self.block)
        self.attentions = _attentions(self.block)
        self.upsamplers = [Upsample(self.block.channels)] if self.upsample else []

    def project_context(self, context: Float[Array, "b t d"]) -> Projected:
        """Return the transformers' keys and values."""
        return _project(self.attentions, context)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        skips: Skips,
        temb: Float[Array, "b t"],
        projected: Projected,
        size: tuple[int, int],
    ) -> Float[Array, "b _h _w _c"]:
        """Read the skips from the last to the first; `size` is where an upsampling leads to."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips[-1 - i]], axis=-1), temb)
            if self.attentions:
                x = self.attentions[i](x, projected[f"attentions_{i}"])
        for upsampler in self.upsamplers:
            x = upsampler(x, size)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to the size of the skip that waits there, then a convolution.

    That size is not always the double: 5 pixels became 3 on the way down.
    """

    channels: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], size: tuple[int, int]
    ) -> Float[Array, "b H W channels"]:
        """Return [b, *size, channels]."""
        h, w = x.shape[1:3]
        double = size == (2 * h, 2 * w)
        if not double:
            x = x[:, np.arange(size[0]) * h // size[0]][:, :, np.arange(size[1]) * w // size[1]]
        return Conv(self.channels, double=double, name="conv")(x)


def _project(
    attentions: list[SpatialTransformer] | tuple[SpatialTransformer, ...],
    context: Float[Array, "b t d"],
) -> Projected:
    return {f"attentions_{i}": a.project_context(context) for i, a in enumerate(attentions)}


def _resnets(block: Block) -> list[ResnetBlock]:
    resnet = (block.channels, block.groups, block.epsilon, block.scale)
    return [ResnetBlock(*resnet) for _ in range(block.layers)]


def _attentions(block: Block) -> list[SpatialTransformer]:
    return [
        SpatialTransformer(
            block.heads, block.channels, depth, block.groups, block.linear, block.only_cross
        )
        for depth in block.depths
    ]
