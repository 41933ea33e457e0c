"""The second stage: diffusion in the latent space of a frozen autoencoder."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from sdjax.errors import InputError
from sdjax.model import Conditions, Model, Params
from sdjax.models.lora import merge
from sdjax.training import lora as low_rank
from sdjax.training import losses
from sdjax.training.encoding import conditions, empty, empty_prompt, latents, of
from sdjax.training.fresh import fresh
from sdjax.training.lora import Lora
from sdjax.training.losses import DiffusionLoss, Draws
from sdjax.training.remat import rematerialised
from sdjax.training.stage import Batch, Gradients
from sdjax.types import Array, Latents

DTYPES = ("float32", "bfloat16")
TRAINABLE = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class SecondStage:
    """Training of a UNet, and of text encoders by choice, on latents: a `training.stage.Stage`.

    Rombach et al. 2022 (arXiv 2112.10752), equation 3. Fields:

    - `model`: the networks and the schedule, whose `prediction` says what is learnt.
    - `trained`: names of networks; the trees of the others are `frozen`.
    - `dtype`: what networks compute in, "float32" or "bfloat16"; params and losses stay float32.
    - `remat`: compute blocks twice instead of keeping what they made (`training.remat`).
    - `lora`: train low-rank updates of the trained networks (`training.lora`); params are then the
      updates, and `frozen` holds all networks.

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
    lora: Lora | None = None

    def __post_init__(self) -> None:
        _check(self)

    def init(self, key: Key[Array, ""]) -> tuple[Params, Any]:
        """Draw the trained networks' params anew; with `lora`, updates that change nothing yet."""
        params = {}
        for name in self.trained:
            at, module = jax.random.fold_in(key, TRAINABLE.index(name)), getattr(self.model, name)
            params[name] = low_rank.init(self.lora, module, at) if self.lora else fresh(module, at)
        return params, ()

    def first_extra(self, params: Params) -> tuple:
        """Nothing: all is learnt by gradients."""
        return ()

    def networks(self, params: Params, frozen: Params) -> Params:
        """All networks' trees, as sampling and saving take them."""
        if self.lora is None:
            return frozen | params
        return merge(frozen, params, self.lora.scale, dtype=jnp.float32)

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
        networks = self.networks(params, frozen)
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
                more = {"added_text": given.pooled, "added_time_ids": of(batch, "time_ids")}
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
        if "context" in batch and set(self.trained) != {"unet"}:
            raise InputError(
                f"a batch has cached text states, and {', '.join(self.trained)} are trained: train "
                "the unet alone, or give ids"
            )
        if not self.loss.caption_dropout:
            return conditions(self.model, networks, batch, self.dtype)

        def choose(value: Array, instead: Any) -> Array:
            mask = dropped.reshape(-1, *(1,) * (value.ndim - 1))
            return jnp.where(mask, jnp.asarray(instead, value.dtype), value)

        if self.model.zero_negative:
            given = conditions(self.model, networks, batch, self.dtype)
            return jax.tree.map(lambda value: choose(value, jnp.zeros_like(value)), given)
        if "context" not in batch:
            prompts = empty_prompt(self.model)
            ids = {name: choose(of(batch, name), prompts[name]) for name in prompts}
            return conditions(self.model, networks, batch | ids, self.dtype)
        none = networks.get("empty") or empty(self.model, networks)
        states = {name: choose(of(batch, name), value) for name, value in none.items()}
        return conditions(self.model, networks, batch | states)


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
    if stage.lora is not None:
        low_rank.check(stage.lora, {name: getattr(model, name) for name in stage.trained})
    if model.unet.num_class_embeds is not None or model.unet.in_channels != (
        model.vae.latent_channels
    ):
        raise InputError(
            f"the {model.family or 'given'} UNet reads {model.unet.in_channels} channels of which "
            f"{model.vae.latent_channels} are latents: training with masks or small images beside "
            "the latents is not supported, use a text-to-image model"
        )
