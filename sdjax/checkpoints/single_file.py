"""Single files as CompVis, Stability and the community ship them: every network under one roof.

`read` gives each component's tensors under diffusers' names, still unread: slices, transposes and
reshapes of what the file maps.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdjax.checkpoints import compvis, detect, naming, openclip
from sdjax.checkpoints.compvis import inverse, rename
from sdjax.checkpoints.detect import TITLES, UNET, Found, Place
from sdjax.checkpoints.tensors import Tensor, Tensors
from sdjax.errors import InputError

EMA = "model_ema."

TOLERATED = re.compile(
    # The noise schedule, saved as buffers; it is rebuilt from the config.
    r"(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod"
    r"|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod"
    r"|posterior_variance|posterior_log_variance_clipped|posterior_mean_coef[12]|logvar"
    r"|lvlb_weights|denoiser\.sigmas|low_scale_model\..*)"
    # Averages of the weights, used or left by the choice of `ema`.
    r"|model_ema\..*|first_stage_model\.model_ema\..*"
    # The autoencoder's training loss, with its discriminator.
    r"|(first_stage_model\.)?loss\..*"
    # Of CLIP: constants, and what serves only to compare texts with images.
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.(transformer\.|model\.)?"
    r"((text_model\.)?embeddings\.position_ids|logit_scale|attn_mask|text_projection(\.weight)?)"
    # Markers, which `detect` has read.
    r"|v_pred|ztsnr|global_step"
)
"""Keys that may be there and are not weights of a network: the documented list."""


def read(
    tensors: Tensors, config: str | Path | None = None, ema: bool = False
) -> dict[str, tuple[dict[str, Any], Mapping[str, Tensor]]]:
    """Every component of a single file: its config, and its tensors by diffusers' key, unread.

    Components without weights (`scheduler`, `tokenizer`, `model_index`) have an empty mapping; of a
    VAE-only file there is only `vae`. A tensor keeps the file's key as its `name`, for errors.

    Args:
        tensors: the file, open.
        config: as for `detect.identify`.
        ema: take the UNet's moving average, `model_ema.*`, which training checkpoints carry beside
            the weights.

    Raises:
        InputError: as `detect.identify`; a key that is neither a weight nor in `TOLERATED`, one
            weight under two keys, or no moving average where it is asked for.
    """
    return parts(tensors, detect.identify(tensors, config), ema)


def parts(
    tensors: Tensors, found: Found, ema: bool = False
) -> dict[str, tuple[dict[str, Any], Mapping[str, Tensor]]]:
    """`read`, of a file that is identified already."""
    if ema and "unet" in found.places:
        tensors = averaged(tensors)
    read: dict[str, dict[str, Tensor]] = {part: {} for part in found.places}
    # A network's own config, not the one read: every key is there, and in its range.
    configs = {part: found.networks[part].config() for part in found.places}
    converts = {part: converter(part, configs[part], at) for part, at in found.places.items()}
    strays = []
    for key, tensor in tensors.items():
        part = next((p for p, at in found.places.items() if key.startswith(at.prefix)), "")
        renamed = list(converts[part](key, tensor)) if part else []
        for name, view in renamed:
            if name in read[part]:
                raise InputError(
                    f"{tensors.path} has one weight under two keys, "
                    f"{read[part][name].name[:100]!r} and {key[:100]!r}: remove one of them"
                )
            read[part][name] = view
        if not renamed and not TOLERATED.fullmatch(key) and not dropped(key, found):
            strays.append(key)
    if strays:
        raise InputError(
            f"{tensors.path} has {naming.count(strays)} that {found.name!r} does not know: use the "
            "config that belongs to these weights, or remove them"
        )
    whole(tensors, found, read)
    if list(found.places) == ["vae"]:
        return {"vae": (found.configs["vae"], read["vae"])}
    return {part: (cfg, read.get(part, {})) for part, cfg in found.configs.items()}


def whole(tensors: Tensors, found: Found, read: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse a file that lacks a weight, naming its key as the file would spell it."""
    for part, place in found.places.items():
        spell = write_names(part, found.networks[part].config(), place)
        wanted = naming.leaves(found.networks[part])
        missing = list(dict.fromkeys(spell(key) for key in wanted if key not in read[part]))
        if missing:
            raise InputError(
                f"{tensors.path} lacks {naming.count(missing)} of the {TITLES[part]} that "
                f"{found.name!r} describes: use a complete download, or the config that belongs to "
                "these weights"
            )


Convert = Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]
"""A file's key and tensor to diffusers' keys and views of it; nothing when it is no weight."""


def converter(part: str, config: Mapping[str, Any], place: Place) -> Convert:
    """How one component's keys, prefix included, become diffusers'."""
    start = len(place.prefix)
    if part in ("unet", "vae"):
        back = inverse(compvis.unet(config) if part == "unet" else compvis.vae(config))

        def from_compvis(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
            name = rename(key[start:], back)
            if name is None:
                return
            if part == "vae" and compvis.is_vae_projection(name) and len(tensor.shape) in (3, 4):
                if all(length == 1 for length in tensor.shape[2:]):
                    tensor = tensor.reshaped(tensor.shape[:2])
            yield name, tensor

        return from_compvis

    wrapper = "text_model." if part == "text_encoder_2" else ""
    if place.style == "openclip":
        back = inverse(openclip.table(config))
        projected = part == "text_encoder_2"

        def from_openclip(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
            for name, view in openclip.to_transformers(key[start:], tensor, back):
                if not name.startswith(openclip.PROJECTION):
                    yield wrapper + name, view
                elif projected:
                    yield name, view

        return from_openclip

    def from_transformers(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        name = key[start:].removeprefix("text_model.")
        if name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):
            if name != "embeddings.position_ids":
                yield wrapper + name, tensor

    return from_transformers


def dropped(key: str, found: Found) -> bool:
    """Whether a key belongs to the part of SD2's text encoder that Stable Diffusion leaves out."""
    place = found.places.get("text_encoder")
    if place is None or place.style != "openclip" or not key.startswith(place.prefix):
        return False
    config = found.networks["text_encoder"].config()
    return openclip.is_dropped(key[len(place.prefix) :], config)


def averaged(tensors: Tensors) -> Tensors:
    """The file with its UNet's weights replaced by their moving average.

    The average of `model.diffusion_model.a.b` is `model_ema.diffusion_modelab`: without its dots.
    """
    swapped = dict(tensors)
    for key in tensors:
        if key.startswith(UNET):
            other = EMA + key.removeprefix("model.").replace(".", "")
            if other not in tensors:
                has = "some" if any(k.startswith(EMA) for k in tensors) else "no"
                raise InputError(
                    f"{tensors.path} has {has} EMA weights, and none for {key!r} (it would be "
                    f"{other!r}): load it without ema (--ema)"
                )
            swapped[key] = tensors[other]
    return Tensors(swapped, tensors.path, tensors.metadata)


def write_names(part: str, config: Mapping[str, Any], place: Place) -> Callable[[str], str]:
    """From a component's diffusers key to the key that its single file has: `read` inverted."""
    if part in ("unet", "vae"):
        names = compvis.unet(config) if part == "unet" else compvis.vae(config)
        return lambda key: place.prefix + (rename(key, names) or key)
    if place.style == "openclip":
        table = openclip.table(config)

        def to_openclip(key: str) -> str:
            other = openclip.to_openclip(key.removeprefix("text_model."), table)
            return place.prefix + (other[0] if other else key)

        return to_openclip
    return lambda key: f"{place.prefix}text_model.{key.removeprefix('text_model.')}"
