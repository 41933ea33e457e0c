"""What a caller asked for, checked and made one value per image before anything starts."""

import math
import operator
import warnings
from typing import Any, NamedTuple

import numpy as np

from sdjax.errors import InputError
from sdjax.model import Model

_LARGEST = float(np.finfo(np.float32).max)
"""Above it a number is infinite to a program."""


class Settings(NamedTuple):
    """One value per image throughout, but for the size, which a batch shares."""

    prompts: list[str]
    negative_prompts: list[str | None]
    seeds: list[int]
    steps: list[int]
    guidance_scales: list[float]
    height: int
    width: int
    latents: np.ndarray | None
    """Starting noise of unit variance [b, h, w, c], where the caller gave it."""


def resolve(
    model: Model,
    prompts: Any,
    negative_prompts: Any,
    seeds: Any,
    steps: Any,
    guidance_scale: Any,
    height: int | None,
    width: int | None,
    latents: Any,
    clip_skip: int = 0,
) -> Settings:
    """Check every setting and give each image its own; InputError names the one that cannot be."""
    check_model(model)
    encoders = [e for e in (model.text_encoder, model.text_encoder_2) if e is not None]
    layers = min(encoder.text.num_hidden_layers for encoder in encoders)
    _whole("clip_skip", clip_skip, 0, layers - 1)
    given = {
        "prompts": _listed(prompts),
        "negative_prompts": _listed(negative_prompts),
        "seeds": [_whole("seeds", s, 0, 2**64 - 1) for s in _listed(seeds)],
        "steps": [_whole("steps", s, 1, 1000) for s in _listed(steps)],
        "guidance_scale": [_finite("guidance_scale", g) for g in _listed(guidance_scale)],
    }
    for name in ("prompts", "negative_prompts"):
        for value in given[name]:
            if not (isinstance(value, str) or (value is None and name == "negative_prompts")):
                raise InputError(f"{name} must be text, got {value!r}")
    counts = {name: len(values) for name, values in given.items()}
    if latents is not None:
        latents = np.asarray(latents, np.float32)
        counts["latents"] = len(latents) if latents.ndim else 0
    size = max(counts.values())
    for name, count in counts.items():
        if count not in (1, size) or (name == "latents" and count != size):
            wanted = f"1 or {size}" if name != "latents" else str(size)
            longest = max(counts, key=lambda n: counts[n])
            raise InputError(
                f"{name} has {count} entries where {longest} has {size}: "
                f"give {wanted}, one per image"
            )
    every = {name: values * (size // len(values)) for name, values in given.items()}
    rows, columns = model.size
    height = side(model.vae.factor, "height", rows if height is None else height)
    width = side(model.vae.factor, "width", columns if width is None else width)
    if latents is not None:
        shape = latent_shape(model, height, width)
        if latents.shape[1:] != shape:
            raise InputError(
                f"latents must be [b, {', '.join(map(str, shape))}] for {height}x{width} pixels, "
                f"got {list(latents.shape)}"
            )
        if not np.isfinite(latents).all():
            raise InputError("latents must be finite, got NaN or infinity")
    return Settings(
        every["prompts"],
        every["negative_prompts"],
        every["seeds"],
        every["steps"],
        every["guidance_scale"],
        height,
        width,
        latents,
    )


def latent_shape(model: Model, height: int, width: int) -> tuple[int, int, int]:
    """Shape of one image's latents [h, w, c]."""
    return height // model.vae.factor, width // model.vae.factor, model.vae.latent_channels


def side(factor: int, name: str, value: Any) -> int:
    """A height or width in pixels that the latent grid can hold."""
    value = _whole(name, value, 1, 65536)
    factor = max(factor, 8)  # both are powers of two
    if value % factor:
        low, high = value // factor * factor, -(-value // factor) * factor
        mend = f"try {low} or {high}" if low else f"try {high}"
        raise InputError(f"{name} must be a multiple of {factor}, got {value}: {mend}")
    return value


def check_model(model: Model) -> None:
    """Refuse a model whose UNet wants to be told more than texts and timesteps."""
    name = model.source or "this model"
    channels = model.vae.latent_channels
    if (
        model.unet.in_channels not in (channels, 2 * channels + 1)
        or model.unet.num_class_embeds is not None
    ):
        raise InputError(
            f"{name} cannot make pictures from text alone (its UNet reads "
            f"{model.unet.in_channels} channels): build a denoiser with "
            "sdjax.denoiser(..., concat=, class_labels=)"
        )
    if model.unet.time_cond_proj_dim is not None:
        raise InputError(
            f"{name} is distilled, and its UNet is told the guidance scale (time_cond_proj_dim), "
            "which sdjax does not do yet: use the model that it was distilled from, with an LCM "
            "LoRA for few steps"
        )


def _listed(value: Any) -> list[Any]:
    if hasattr(value, "ndim"):  # numpy's or jax's
        value = np.asarray(value).tolist()
    if value is None or isinstance(value, str | int | float):
        return [value]
    values = list(value)
    if not values:
        raise InputError("prompts and other per-image settings need at least one entry, got none")
    return values


def _whole(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        top = "2**64 - 1" if high == 2**64 - 1 else str(high)
        raise InputError(f"{name} must be a whole number from {low} to {top}, got {value!r}")
    return number


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise InputError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= _LARGEST:
        raise InputError(f"{name} must be finite in float32, got {number:g}: 7.5 is usual")
    return number


def check_limits(method: Any, guidance_scales: list[float]) -> None:
    """Refuse scales that a method of guidance has no use for, by its `limits`."""
    low, high = getattr(method, "limits", (-math.inf, math.inf))
    for scale in guidance_scales:
        if not low <= scale <= high:
            raise InputError(
                f"guidance_scale must be from {low:g} to {high:g} for {type(method).__name__}, "
                f"got {scale:g}"
            )


def tokens(model: Model, settings: Settings, count: int) -> dict[str, np.ndarray]:
    """What the networks are told: [b, count, ...] of as many sides as are asked for, the prompt the
    last, its negative before it, and before that the empty prompt.

    ids and ids_2 are token ids for the encoders that the model has; time_ids are SDXL's sizes
    (Podell et al. 2023, arXiv:2307.01952, section 2.2): original size, crop and target size, or for
    its refiner original size, crop and aesthetic score; absent is 1 where a negative is zeros.
    """
    nothing = [None] * len(settings.prompts)
    asked: list[Any] = [nothing, settings.negative_prompts, settings.prompts][-count:]
    sides = [[text or "" for text in side] for side in asked]
    told: dict[str, np.ndarray] = {}
    for name, tokenizer in (("ids", model.tokenizer), ("ids_2", model.tokenizer_2)):
        if tokenizer is None:
            continue
        encoded = [tokenizer(side) for side in sides]
        told[name] = np.stack([e.ids for e in encoded], axis=1)
        if name == "ids" or model.tokenizer is None:
            _warn_of_cuts([text for e in encoded for text in e.dropped])
    if model.unet.addition_embed_type == "text_time":
        told["time_ids"] = np.stack(
            [_sizes(model, settings, i < count - 1) for i in range(count)], axis=1
        )
    if count > 1 and model.zero_negative:
        told["absent"] = np.asarray([[t is None for t in side] for side in asked], np.float32).T
    return told


def _sizes(model: Model, settings: Settings, negative: bool) -> np.ndarray:
    size = (settings.height, settings.width)
    unet: Any = model.unet  # these fields are set wherever there are sizes to tell
    text: Any = model.text_encoder_2
    pooled = text.text.projection_dim
    count = (unet.projection_class_embeddings_input_dim - pooled) // unet.addition_time_embed_dim
    score = 2.5 if negative else 6.0  # the scores that diffusers' refiner takes by default
    row = (*size, 0, 0, *size) if count == 6 else (*size, 0, 0, score)
    return np.tile(np.asarray(row, np.float32), (len(settings.prompts), 1))


def _warn_of_cuts(cut: list[str]) -> None:
    for text in dict.fromkeys(cut):
        if text:
            warnings.warn(
                f"a prompt is longer than the text encoder reads; left out: {text!r}", stacklevel=4
            )
