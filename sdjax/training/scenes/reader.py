"""`Reader`: a small network that reads a scene's attributes from its pixels."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdjax.models.convolution import upsample_nearest
from sdjax.models.layers import Conv, Dense

SIDE = 64
"""Pictures are averaged to this many pixels a side: what matters is larger than a VAE's blur."""


class Read(NamedTuple):
    """Logits of every attribute, and the map of objects from which they were counted."""

    views: tuple[Float[Array, "b n"], ...]
    counts: Float[Array, "b kinds 4"]
    colours: Float[Array, "b kinds colours"]
    places: Float[Array, "b kinds places"]
    spots: Float[Array, "b y x kinds"]


class Reader(nn.Module):
    """Reads [b, 64, 64, 3] in -1..1.

    A map of 16x16 cells says how much of an object of each kind stands in each. Its sum is the
    count, its columns the place, and what it points at the colour; so an object's colour is never
    mixed up with its neighbour's. What concerns the whole picture is read from means and maxima.
    """

    views: tuple[int, ...]
    kinds: int
    colours: int
    places: int
    width: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Read:
        """Read the pictures."""
        width = self.width
        x = nn.relu(Conv(width // 2, name="stem")(_fold(x)))
        x = nn.relu(Conv(width, 1, padding=0, name="fold")(_fold(x)))
        x = x + nn.relu(Conv(width, name="near")(x))
        far = nn.relu(Conv(width + 16, name="far_1")(_pool(x)))
        far = far + nn.relu(Conv(width + 16, name="far_2")(far))
        near = x + upsample_nearest(Conv(width, 1, padding=0, name="back")(far))
        near = x + nn.relu(Conv(width, name="objects")(nn.relu(near)))

        spots = nn.softplus(Conv(self.kinds, 1, padding=0, name="spots")(near) - 5)
        total = spots.sum((1, 2))
        sharp = self.param("sharp", nn.initializers.constant(1.0), (self.kinds, 1))
        count = -sharp * jnp.square(total[..., None] - jnp.arange(4.0))
        share = spots / (total[:, None, None] + 1e-3)
        seen = jnp.einsum("byxk,byxc->bkc", share, near)
        colour = Dense(self.colours, name="colour")(nn.relu(Dense(48, name="pigment")(seen)))
        place = Dense(self.places, name="place")(share.sum(1).swapaxes(1, 2) * 4)

        whole = jnp.concatenate([far.mean((1, 2)), far.max((1, 2))], -1)
        whole = nn.relu(Dense(80, name="whole")(whole))
        views = tuple(Dense(n, name=f"view_{i}")(whole) for i, n in enumerate(self.views))
        return Read(views, count, colour, place, spots)


def _fold(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c4"]:
    """Halve the sides, putting each square of four pixels into the channels."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).swapaxes(2, 3)
    return x.reshape(b, h // 2, w // 2, 4 * c)


def _pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The largest of each square of four."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


def shrink(pixels: Float[Array, "b h w 3"]) -> Float[Array, "b side side 3"]:
    """Average square pictures of any size to `SIDE` pixels."""
    b, h, w, _ = pixels.shape
    if h % SIDE == 0 and w % SIDE == 0:
        return pixels.reshape(b, SIDE, h // SIDE, SIDE, w // SIDE, 3).mean((2, 4))
    return jax.image.resize(pixels, (b, SIDE, SIDE, 3), "linear", antialias=True)
