"""What the second stage trains on: latents and text states, made by frozen networks or cached."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key

from sdjax.errors import InputError
from sdjax.model import Conditions, Model, Params, encode_text
from sdjax.models.vae import draw
from sdjax.training.losses import LATENT, PURPOSES
from sdjax.training.stage import Batch
from sdjax.types import Array, Latents


def latents(
    model: Model, networks: Params, batch: Batch, keys: Key[Array, " b"], dtype: str = "float32"
) -> Latents:
    """A batch's latents, drawn from the autoencoder's distribution and scaled: float32."""
    if "latents" in batch:
        return jnp.asarray(batch["latents"], jnp.float32)
    mean, logvar = moments(model, networks, batch, dtype)
    z = draw(mean, logvar, latent_noise(keys, mean.shape))
    return (z - (model.vae.shift_factor or 0.0)) * model.vae.scaling_factor


def latent_noise(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b h w z"]:
    """The unit noise of each image's draw from the autoencoder's distribution."""

    def one(key: Key[Array, ""]) -> Array:
        return jax.random.normal(jax.random.split(key, PURPOSES)[LATENT], shape[1:])

    return jax.vmap(one)(keys)


def moments(
    model: Model, networks: Params, batch: Batch, dtype: str = "float32"
) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
    """Mean and log-variance of a batch's latents, unscaled: float32, without gradients."""
    if "mean" in batch:
        mean, logvar = batch["mean"], of(batch, "logvar")
    else:
        pixels = of(batch, "pixels").astype(jnp.float32) / 127.5 - 1
        params = {"params": _network(networks, "vae")}
        encoded: Any = model.vae.apply(params, pixels.astype(dtype), method="encode")
        mean, logvar = jax.lax.stop_gradient(encoded)
    return jnp.asarray(mean, jnp.float32), jnp.asarray(logvar, jnp.float32)


def conditions(model: Model, networks: Params, batch: Batch, dtype: str = "float32") -> Conditions:
    """A batch's text states, and SDXL's pooled ones, from ids or as they were cached."""
    if "context" in batch:
        pooled = of(batch, "pooled") if model.unet.addition_embed_type else None
        return Conditions(batch["context"], pooled)
    encoders, ids = {}, []
    for name, key in (("text_encoder", "ids"), ("text_encoder_2", "ids_2")):
        used = getattr(model, name) is not None
        ids.append(of(batch, key) if used else None)
        if used:
            encoders[name] = _cast(_network(networks, name), dtype)
    return encode_text(model, encoders, *ids)


def cached(model: Model, params: Params, batch: Batch, dtype: str = "float32") -> dict[str, Array]:
    """What training needs of a batch and frozen networks make of it: computed once, float32.

    `mean` and `logvar` where the batch has `pixels`; `context`, and SDXL's `pooled`, where it has
    `ids`. A pure function: jit it with the model static.
    """
    made: dict[str, Array] = {}
    if "pixels" in batch:
        made["mean"], made["logvar"] = moments(model, params, batch, dtype)
    if "ids" in batch or "ids_2" in batch:
        made |= _named(conditions(model, params, batch, dtype))
    return {name: jnp.asarray(value, jnp.float32) for name, value in made.items()}


@functools.partial(jax.jit, static_argnums=0)
def empty(model: Model, params: Params) -> dict[str, Array]:
    """Text states of the empty prompt, [1, ...]: `frozen["empty"]` of a stage on cached states.

    With them the text encoders need not be kept for conditions that are dropped.
    """
    return _named(conditions(model, params, empty_prompt(model)))


def empty_prompt(model: Model) -> dict[str, np.ndarray]:
    """The token ids of the empty prompt, [1, s]."""
    ids = {}
    for name, key in (("tokenizer", "ids"), ("tokenizer_2", "ids_2")):
        if getattr(model, name) is not None:
            ids[key] = getattr(model, name)([""]).ids
    return ids


def _named(given: Conditions) -> dict[str, Array]:
    return {name: value for name, value in given._asdict().items() if value is not None}


def _cast(params: Params, dtype: str) -> Params:
    """A text encoder's dtype is its embeddings' own."""
    return jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, params)


def of(batch: Batch, name: str) -> Array:
    """A part of a batch; InputError where it lacks it."""
    if name not in batch:
        had = ", ".join(sorted(batch)) or "nothing"
        raise InputError(f"a batch lacks {name!r}, it has {had}: this model is trained on it")
    return jnp.asarray(batch[name])


def _network(networks: Params, name: str) -> Params:
    if name not in networks:
        raise InputError(
            f"the params of {name!r} are missing: give them as frozen, or train on what was cached "
            "of them"
        )
    return networks[name]
