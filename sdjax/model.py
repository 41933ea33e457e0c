"""`Model`, a hashable bundle of networks; `denoiser`, where a network meets the mathematics."""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Float, Int

from sdjax.diffusion.plan import Plan
from sdjax.diffusion.schedules import Schedule, planned_timestep, to_x0
from sdjax.errors import InputError
from sdjax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL
from sdjax.text import Tokenizer
from sdjax.types import Array, Denoiser, Latents, Sigma, pytree, static

TextEncoder = CLIPTextModel | CLIPTextModelWithProjection
Params = Any


@dataclasses.dataclass(frozen=True)
class FrozenConfig:
    """A JSON object that is hashable and compares by content."""

    json: str

    @classmethod
    def of(cls, config: dict[str, Any]) -> "FrozenConfig":
        """Freeze a dictionary of JSON values."""
        return cls(json.dumps(config, sort_keys=True))

    def dict(self) -> dict[str, Any]:
        """A fresh dictionary."""
        return json.loads(self.json)


@dataclasses.dataclass(frozen=True)
class Model:
    """Networks, tokenizers and noise schedule of a latent diffusion model: static under jit.

    The weights are another value: `params`, a dictionary with one tree for each network, under the
    network's name here.
    """

    unet: UNet
    vae: AutoencoderKL
    text_encoder: TextEncoder | None
    text_encoder_2: CLIPTextModelWithProjection | None
    tokenizer: Tokenizer | None
    tokenizer_2: Tokenizer | None
    schedule: Schedule
    scheduler: FrozenConfig
    """scheduler_config.json: the sampler, spacing and scales that the model's makers chose."""
    zero_negative: bool = False
    """An absent negative prompt is zeros instead of the empty prompt (SDXL base)."""
    family: str = ""
    """The shipped config that this model is an instance of, for people to read."""
    steps: int = dataclasses.field(default=20, compare=False)
    """How many steps the model's makers advise."""
    guidance_scale: float = dataclasses.field(default=7.5, compare=False)
    """The guidance that they advise."""
    source: str = dataclasses.field(default="", compare=False)
    """Where the weights came from, for people to read."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels that the model was trained at."""
        side = self.unet.sample_size or 64
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.vae.factor, width * self.vae.factor


class Conditions(NamedTuple):
    """What the networks make of prompts: the same for all steps."""

    context: Any
    """Text states [b, s, d], or the tree that `UNet.project_context` makes of them."""
    pooled: Float[Array, "b p"] | None
    """Pooled text features (SDXL)."""


def encode_text(
    model: Model,
    params: Params,
    ids: Int[Array, "b s"] | None,
    ids_2: Int[Array, "b s"] | None = None,
    *,
    clip_skip: int = 0,
) -> Conditions:
    """Token ids to text states, as each family was trained.

    SD1 and SD2 take the last hidden state after the final norm. SDXL (Podell et al. 2023,
    arXiv:2307.01952, section 2.2) joins the penultimate states of its encoders along channels,
    without the norm, and adds the second encoder's projected feature. `clip_skip` leaves out that
    many more layers.
    """
    pooled_text = model.unet.addition_embed_type == "text_time"
    states, pooled = [], None
    for name, tokens in (("text_encoder", ids), ("text_encoder_2", ids_2)):
        encoder = getattr(model, name)
        if encoder is None:
            continue
        out = encoder.apply(
            {"params": _widen(params[name])},
            tokens,
            layer=-1 - pooled_text - clip_skip,
            final_norm=not pooled_text,
        )
        states.append(out.states)
        pooled = out.projected if pooled_text else None
    return Conditions(jnp.concatenate(states, axis=-1), pooled)


def project(model: Model, params: Params, context: Float[Array, "b s d"]) -> Any:
    """All cross-attention keys and values of text states: computed once, used at every step."""
    context = context.astype(compute_dtype(params["unet"]))
    return model.unet.apply({"params": params["unet"]}, context, method="project_context")


@pytree
class _Static:
    """A hashable value inside a pytree."""

    value: Any = static()


def denoiser(
    model: Model,
    params: Params,
    context: Any,
    *,
    pooled: Float[Array, "b p"] | None = None,
    time_ids: Float[Array, "b n"] | None = None,
    class_labels: Int[Array, " b"] | None = None,
    concat: Float[Array, "b h w k"] | None = None,
    timesteps: Any = None,
) -> Denoiser:
    """E[x0 | x] by the model's UNet: (x, sigma) -> x0 in float32.

    `context` is what `project` returns, or text states [b, s, d]. `pooled` and `time_ids` are
    SDXL's added conditions, `class_labels` the x4 upscaler's noise level, `concat` the channels
    that inpainting and upscaling put beside the latents (mask and masked image; small image).
    `timesteps` is a `Plan`, or its pair (sigmas, timesteps): at exactly these noise levels the
    network sees exactly these timesteps, elsewhere the schedule's own
    (`schedules.planned_timestep`).

    The network computes in bfloat16 if its params are bfloat16, else in float32; this is the only
    border at which anything is cast.
    """
    if not isinstance(context, dict):
        context = project(model, params, context)
    at: Any = timesteps
    if isinstance(timesteps, Plan):
        at = timesteps.sigmas, timesteps.timesteps
    elif timesteps is not None and not (isinstance(timesteps, tuple) and len(timesteps) == 2):
        raise InputError(
            "timesteps must be a plan, or its pair (plan.sigmas, plan.timesteps): timesteps alone "
            "do not say at which noise levels they stand"
        )
    extras = dict(added_text=pooled, added_time_ids=time_ids, class_labels=class_labels)
    return Partial(_denoise, _Static(model), params["unet"], context, extras, concat, at)


def _denoise(
    model: _Static,
    unet: Params,
    context: Any,
    extras: dict[str, Any],
    concat: Array | None,
    timesteps: tuple[Array, Array] | None,
    x: Latents,
    sigma: Sigma,
) -> Latents:
    network, schedule = model.value.unet, model.value.schedule
    dtype = compute_dtype(unet)
    scaled = x / jnp.sqrt(1 + sigma**2)
    if concat is not None:
        scaled = jnp.concatenate([scaled, concat.astype(scaled.dtype)], axis=-1)
    timestep = planned_timestep(schedule, sigma, *(timesteps or ()))
    timestep = jnp.broadcast_to(timestep.reshape(-1), x.shape[:1])
    out = network.apply({"params": unet}, scaled.astype(dtype), timestep, context, **extras)
    return to_x0(schedule, out.astype(jnp.float32), x, sigma)


def decode(model: Model, params: Params, latents: Latents) -> Float[Array, "b H W 3"]:
    """Latents to pixels in 0..1, clipped."""
    vae = params["vae"]
    z = latents / model.vae.scaling_factor + (model.vae.shift_factor or 0.0)
    z = z.astype(compute_dtype(vae))
    pixels: Any = model.vae.apply({"params": vae}, z, method="decode")
    return jnp.clip(pixels.astype(jnp.float32) / 2 + 0.5, 0, 1)


def compute_dtype(params: Params) -> Any:
    """Bfloat16 if the weights are, else float32: float16's range is too small."""
    return jnp.bfloat16 if jax.tree.leaves(params)[0].dtype == jnp.bfloat16 else jnp.float32


def _widen(params: Params) -> Params:
    """Float16 as float32: a text encoder's dtype is its embeddings' own."""
    return jax.tree.map(lambda p: p.astype(jnp.float32) if p.dtype == jnp.float16 else p, params)
