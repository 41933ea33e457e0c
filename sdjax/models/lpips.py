"""LPIPS: how different two images look."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from sdjax.models.layers import Conv
from sdjax.models.weights import Shapes, conv, tree
from sdjax.types import Array

SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
"""ImageNet's mean and deviation, for pixels in -1..1."""

DEPTHS = (2, 2, 3, 3, 3)
"""Convolutions in each of VGG16's five blocks."""

EPSILON = 1e-10


class LPIPS(nn.Module):
    """The learned perceptual distance of Zhang et al. 2018 (arXiv 1801.03924), v0.1 with VGG16.

    Features after each of five blocks are made unit vectors; their squared differences are weighted
    by channel, averaged over space and summed (equation 1). Parameters are named as in the `lpips`
    package. `widths` are the blocks' channels: VGG16's, unless you test.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)

    kind: ClassVar[str] = "LPIPS"

    def shapes(self) -> Shapes:
        """Return the shape of every weight by its torch key."""
        parts, inputs, number = {}, 3, 0
        for block, (width, depth) in enumerate(zip(self.widths, DEPTHS, strict=True), 1):
            for _ in range(depth):
                parts[f"net.slice{block}.{number}"] = conv(inputs, width)
                inputs, number = width, number + 2
            parts[f"lin{block - 1}.model.1"] = conv(width, 1, 1, bias=False)
            number += 1
        return tree(parts)

    @property
    def smallest(self) -> int:
        """Pixels that a side needs, to be halved four times."""
        return 16

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], y: Float[Array, "b h w 3"]
    ) -> Float[Array, " b"]:
        """Return the distance of each pair of images in -1..1, of `smallest` pixels at least."""
        net = VGG(self.widths, name="net")
        features = (net((jnp.asarray(image) - SHIFT) / SCALE) for image in (x, y))
        total = jnp.zeros(len(x), jnp.float32)
        for i, (one, other) in enumerate(zip(*features, strict=True)):
            difference = jnp.square(unit(one) - unit(other))
            total = total + Weights(name=f"lin{i}")(difference).mean((1, 2, 3))
        return total


class VGG(nn.Module):
    """VGG16's convolutions, numbered as torchvision's (Simonyan and Zisserman 2015, 1409.1556)."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> list[Array]:
        """Return the features after each block, before its pooling."""
        found = []
        number = 0
        for block, (width, depth) in enumerate(zip(self.widths, DEPTHS, strict=True), 1):
            if block > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
                number += 1
            for _ in range(depth):
                x = jax.nn.relu(Conv(width, name=f"slice{block}_{number}")(x))
                number += 2
            found.append(x)
        return found


class Weights(nn.Module):
    """A weight for each channel."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w 1"]:
        """Return the weighted sum over channels."""
        return Conv(1, kernel_size=1, padding=0, use_bias=False, name="model_1")(x)


def unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Divide by the norm over channels; where all are 0, so are the result and its gradient."""
    x = x.astype(jnp.float32)
    square = jnp.square(x).sum(-1, keepdims=True)
    some = square > 0
    return jnp.where(some, x / (lax.sqrt(jnp.where(some, square, 1.0)) + EPSILON), 0.0)
