"""`Reading`: the stage that trains the measure, on renders spoilt as a generator's pictures are."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sdjax.model import Params
from sdjax.training.fresh import cut
from sdjax.training.scenes.labels import VIEWS
from sdjax.training.scenes.reader import SIDE, Read, Reader, shrink
from sdjax.training.scenes.world import COLOURS, COUNTS, KINDS, PLACES
from sdjax.training.stage import Batch, Gradients

READER = Reader(
    views=tuple(map(len, VIEWS.values())),
    kinds=len(KINDS),
    colours=len(COLOURS),
    places=len(PLACES),
)
assert COUNTS == (1, 2, 3)  # the reader counts 0..3


def apply(params: Params, pixels: Float[Array, "b h w 3"]) -> Read:
    """What the reader with these params reads from pictures in -1..1, 64 pixels a side."""
    read: Any = READER.apply({"params": params}, pixels)
    return read


@dataclass(frozen=True)
class Reading:
    """Cross-entropies of every attribute, and the deviance of the map of objects.

    Batch: `pixels` uint8 [b, h, w, 3], square; `labels` and `spots` as `labels.labels` and
    `labels.spots` give them. Trains "measure". `spoil` is how much the pictures are spoilt, 0..1.
    """

    spoil: float = 1.0

    def init(self, key: Key[Array, ""]) -> tuple[Params, tuple]:
        """Draw the reader's params."""
        empty = jnp.zeros((1, SIDE, SIDE, 3))
        shapes = jax.eval_shape(READER.init, key, empty)["params"]
        leaves, tree = jax.tree.flatten(shapes)
        drawn = cut(jax.random.normal, key, [leaf.shape for leaf in leaves])
        values = [_first(a) for a in drawn]
        params = jax.tree.unflatten(tree, values)
        params["sharp"] = jnp.ones_like(params["sharp"])
        return {"measure": params}, ()

    def first_extra(self, params: Params) -> tuple:
        """Nothing: all is learnt by gradients."""
        return ()

    def gradients(
        self,
        params: Params,
        extra: tuple,
        frozen: Params,
        batch: Batch,
        keys: Key[Array, " b"],
        step: Int[Array, ""],
    ) -> Gradients:
        """Gradients of the mean over images of the summed losses."""
        pixels = shrink(batch["pixels"].astype(jnp.float32)) / 127.5 - 1
        pixels = jax.vmap(lambda x, key: _spoil(x, key, self.spoil))(pixels, keys)

        def loss(params: Params) -> tuple[Array, dict[str, Array]]:
            read = apply(params["measure"], pixels)
            parts = losses(read, batch["labels"], batch["spots"].astype(jnp.float32))
            means = {name: part.mean() for name, part in parts.items()}
            total = sum(means.values(), start=jnp.float32(0))
            return total, {"loss": total, **means}

        grads, metrics = jax.grad(loss, has_aux=True)(params)
        return Gradients(grads, extra, metrics)


def losses(
    read: Read, labels: Int[Array, "b n"], spots: Float[Array, "b y x kinds"]
) -> dict[str, Float[Array, " b"]]:
    """Each image's losses by attribute."""
    parts = {
        name: _entropy(logits, labels[:, i])
        for i, (name, logits) in enumerate(zip(VIEWS, read.views, strict=True))
    }
    count, colour, place = jnp.moveaxis(labels[:, len(VIEWS) :].reshape(-1, len(KINDS), 3), 2, 0)
    parts["count"] = _entropy(read.counts, count).sum(-1)
    parts["colour"] = _entropy(read.colours, colour).sum(-1)
    parts["place"] = _entropy(read.places, place).sum(-1)
    parts["spots"] = _deviance(read.spots, spots).sum((1, 2, 3))
    return parts


def _first(noise: Array) -> Array:
    """A kernel of variance 2/fan-in, as ReLUs ask for (He et al. 2015, arXiv 1502.01852), or 0."""
    return noise * (2 / math.prod(noise.shape[:-1])) ** 0.5 if noise.ndim > 1 else 0 * noise


def _entropy(logits: Float[Array, "*b n"], label: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """Cross-entropy; 0 where the label is -1."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(label, 0)[..., None], -1)
    return -chosen[..., 0] * (label >= 0)


def _deviance(read: Float[Array, "*b"], true: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Half of Poisson's: unlike a square's, its gradient lives where almost nothing is seen yet."""
    return read - true + true * (jnp.log(true + 1e-6) - jnp.log(read + 1e-6))


def _spoil(x: Float[Array, "h w 3"], key: Key[Array, ""], most: float) -> Float[Array, "h w 3"]:
    """Shift, blur, coarsen, tint and roughen one picture a little."""
    keys = jax.random.split(key)  # two draws, cut up: each more takes seconds to compile
    chance = jax.random.uniform(keys[0], (6,))
    rough = jax.random.normal(keys[1], (x.shape[0] + 2, *x.shape[1:]))
    rough, tint = rough[:-2], rough[-2:, 0]
    side = x.shape[0]

    padded = jnp.pad(x, ((2, 2), (2, 2), (0, 0)), "edge")
    row, column = (chance[:2] * 5).astype(int)
    x = jax.lax.dynamic_slice(padded, (row, column, 0), x.shape)
    blur = most * chance[2] ** 2 * 0.3
    for axis in (0, 1):
        x = x + blur * (jnp.roll(x, 1, axis) + jnp.roll(x, -1, axis) - 2 * x)
    coarse = jax.image.resize(_blocks(x, side // 2), x.shape, "linear")
    x = x + most * 0.7 * chance[3] ** 2 * (coarse - x)
    x = x * (1 + most * 0.06 * tint[0]) + most * 0.03 * tint[1]
    patches = jax.image.resize(4 * _blocks(rough, side // 4), x.shape, "linear")
    return x + most * 0.06 * (chance[4] ** 2 * rough + chance[5] ** 2 * patches)


def _blocks(x: Float[Array, "h w 3"], side: int) -> Float[Array, "side side 3"]:
    """The means of side x side equal blocks."""
    size = x.shape[0] // side
    return x.reshape(side, size, side, size, 3).mean((1, 3))
