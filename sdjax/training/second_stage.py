"""The second stage: diffusion in the latent space of a frozen autoencoder."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key

from sdjax.checkpoints import naming, shapes
from sdjax.errors import InputError
from sdjax.model import Conditions, Model, Params, encode_text
from sdjax.models.vae import draw
from sdjax.training import losses
from sdjax.training.losses import DiffusionLoss, Draws
from sdjax.training.remat import rematerialised
from sdjax.training.stage import Batch, Gradients
from sdjax.types import Array, Latents

DTYPES = ("float32", "bfloat16")
TRAINABLE = ("unet", "text_encoder", "text_encoder_2")

_LATENT = 5
"""What an image's key is folded with for its latents' noise; `losses` has the smaller numbers."""


@dataclass(frozen=True)
class SecondStage:
    """Training of a UNet, and of text encoders by choice, on latents: a `training.stage.Stage`.

    Rombach et al. 2022 (arXiv 2112.10752), equation 3. Fields:

    - `model`: the networks and the schedule, whose `prediction` says what is learnt.
    - `trained`: names of networks; the trees of the others are `frozen`.
    - `dtype`: what networks compute in, "float32" or "bfloat16"; params and losses stay float32.
    - `remat`: compute blocks twice instead of keeping what they made (`training.remat`).

    A batch holds what the latents come from: `pixels` uint8 [b, H, W, 3]; or the autoencoder's
    `mean` and `logvar` [b, h, w, z]; or `latents`, scaled already. It holds what the conditions
    come from: `ids` (and `ids_2`), or text states `context` [b, s, d] (and `pooled`); for SDXL also
    `time_ids` [b, 6]. Metrics: `loss`, `mse` without weights, and `mse` by quarter of the
    timesteps (`losses.quarters`).
    """

    model: Model
    trained: tuple[str, ...] = ("unet",)
    loss: DiffusionLoss = DiffusionLoss()
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def init(self, key: Key[Array, ""]) -> tuple[Params, Any]:
        """Draw the trained networks' params anew: training from scratch."""
        params = {}
        for name in self.trained:
            at = jax.random.fold_in(key, TRAINABLE.index(name))
            params[name] = fresh(getattr(self.model, name), at)
        return params, ()

    def gradients(
        self,
        params: Params,
        extra: Any,
        frozen: Params,
        batch: Batch,
        keys: Key[Array, " b"],
        step: Int[Array, ""],
    ) -> Gradients:
        """Gradients of the mean loss over the batch; `step` plays no part."""
        look = jax.grad(self._loss, has_aux=True)
        grads, metrics = look(params, frozen, batch, keys)
        return Gradients(grads, extra, metrics)

    def _loss(
        self, params: Params, frozen: Params, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        networks = frozen | params
        schedule, loss = self.model.schedule, self.loss
        x0 = latents(self.model, networks, batch, keys, self.dtype)
        drawn = losses.draws(keys, x0.shape, loss, schedule.timesteps)
        out = self._predict(networks, batch, x0, drawn)
        wanted = losses.target(schedule, x0, drawn.noise, drawn.timesteps)
        weight = jnp.asarray(losses.weights(schedule, loss.min_snr_gamma))[drawn.timesteps]
        mean = jnp.mean(weight * losses.distances(loss, out, wanted))
        mse = losses.distances(DiffusionLoss(), out, wanted)
        metrics = {"loss": mean, "mse": mse.mean()}
        return mean, metrics | losses.quarters(mse, drawn.timesteps, schedule.timesteps)

    def _predict(self, networks: Params, batch: Batch, x0: Latents, drawn: Draws) -> Latents:
        """What the network says of the noisy latents, float32."""
        x = losses.add_noise(self.model.schedule, x0, drawn.seen, drawn.timesteps)
        with rematerialised(self.remat):
            given = self._conditions(networks, batch, drawn.dropped)
            more: dict[str, Any] = {}
            if given.pooled is not None:
                more = {"added_text": given.pooled, "added_time_ids": _of(batch, "time_ids")}
            out: Any = self.model.unet.apply(
                {"params": networks["unet"]},
                x.astype(self.dtype),
                drawn.timesteps,
                given.context.astype(self.dtype),
                **more,
            )
        return out.astype(jnp.float32)

    def _conditions(self, networks: Params, batch: Batch, dropped: Bool[Array, " b"]) -> Conditions:
        """The text states, those that are dropped replaced by what sampling will take for none."""
        given = conditions(self.model, networks, batch, self.dtype)
        if not self.loss.caption_dropout:
            return given
        if self.model.zero_negative:
            none = jax.tree.map(jnp.zeros_like, given)
        elif "empty" in networks:
            none = Conditions(networks["empty"]["context"], networks["empty"].get("pooled"))
        else:
            none = conditions(self.model, networks, empty_prompt(self.model), self.dtype)

        def choose(value: Array, instead: Array) -> Array:
            mask = dropped.reshape(-1, *(1,) * (value.ndim - 1))
            return jnp.where(mask, instead.astype(value.dtype), value)

        return jax.tree.map(choose, given, none)


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
        return jax.random.normal(jax.random.fold_in(key, _LATENT), shape[1:])

    return jax.vmap(one)(keys)


def moments(
    model: Model, networks: Params, batch: Batch, dtype: str = "float32"
) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
    """Mean and log-variance of a batch's latents, unscaled: float32, without gradients."""
    if "mean" in batch:
        mean, logvar = batch["mean"], _of(batch, "logvar")
    else:
        pixels = _of(batch, "pixels").astype(jnp.float32) / 127.5 - 1
        params = {"params": _network(networks, "vae")}
        encoded: Any = model.vae.apply(params, pixels.astype(dtype), method="encode")
        mean, logvar = jax.lax.stop_gradient(encoded)
    return jnp.asarray(mean, jnp.float32), jnp.asarray(logvar, jnp.float32)


def conditions(model: Model, networks: Params, batch: Batch, dtype: str = "float32") -> Conditions:
    """A batch's text states, and SDXL's pooled ones, from ids or as they were cached."""
    if "context" in batch:
        pooled = _of(batch, "pooled") if model.unet.addition_embed_type else None
        return Conditions(batch["context"], pooled)
    encoders, ids = {}, []
    for name, key in (("text_encoder", "ids"), ("text_encoder_2", "ids_2")):
        used = getattr(model, name) is not None
        ids.append(_of(batch, key) if used else None)
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


def fresh(module: Any, key: Key[Array, ""]) -> Params:
    """Draw a network's params: normal kernels of variance 1/fan-in; a UNet's branches end in 0.

    As in the paper's code, the last convolution of every residual branch and the network's own are
    zero, so that training starts from the identity (cf. Zhang et al. 2019, arXiv 1901.09321).
    """
    leaves = list(naming.flatten(shapes.params(module)))
    drawn = {path: _fan_in(path, leaf.shape) for path, leaf in leaves if _is_drawn(path)}
    values = _normal(key, tuple(leaf.shape for path, leaf in leaves if path in drawn))
    params: dict[str, Any] = {}
    for path, leaf in leaves:
        node = functools.reduce(lambda tree, name: tree.setdefault(name, {}), path[:-1], params)
        if path in drawn:
            node[path[-1]] = values.pop(0) / drawn[path] ** 0.5
        else:
            node[path[-1]] = jnp.full(leaf.shape, float(path[-1] == "scale"))
    return params


def _is_drawn(path: tuple[str, ...]) -> bool:
    return path[-1] in ("kernel", "embedding") and path[-2] not in ("conv2", "proj_out", "conv_out")


def _fan_in(path: tuple[str, ...], shape: tuple[int, ...]) -> int:
    return shape[-1] if path[-1] == "embedding" else math.prod(shape[:-1])


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: Key[Array, ""], sizes: tuple[tuple[int, ...], ...]) -> list[Array]:
    """All arrays from one draw: a draw for each takes minutes to compile."""
    counts = [math.prod(shape) for shape in sizes]
    parts = jnp.split(jax.random.normal(key, (sum(counts),)), np.cumsum(counts)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, sizes, strict=True)]


def _named(given: Conditions) -> dict[str, Array]:
    return {name: value for name, value in given._asdict().items() if value is not None}


def _cast(params: Params, dtype: str) -> Params:
    """A text encoder's dtype is its embeddings' own."""
    return jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, params)


def _of(batch: Batch, name: str) -> Array:
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


def _check(stage: SecondStage) -> None:
    model = stage.model
    if stage.dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {stage.dtype!r:.60}")
    if not stage.trained or len(set(stage.trained)) < len(stage.trained):
        raise InputError(f"trained must name networks, each once, got {stage.trained!r:.80}")
    known = [name for name in TRAINABLE if getattr(model, name) is not None]
    for name in stage.trained:
        if name not in known:
            raise InputError(f"trained must be among {', '.join(known)}, got {name!r:.60}")
    if model.unet.num_class_embeds is not None or model.unet.in_channels != (
        model.vae.latent_channels
    ):
        raise InputError(
            f"the {model.family or 'given'} UNet reads {model.unet.in_channels} channels of which "
            f"{model.vae.latent_channels} are latents: training with masks or small images beside "
            "the latents is not supported, use a text-to-image model"
        )
