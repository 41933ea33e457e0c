"""Which model a single file holds: from its keys, shapes and markers, or from the config given.

Layouts: CompVis (SD1: `cond_stage_model.transformer.`), Stability (SD2: `cond_stage_model.model.`;
SDXL and its refiner: `conditioner.embedders.`). Markers: the tensors `v_pred` and `ztsnr`, the
metadata of https://github.com/Stability-AI/ModelSpec, and a `.ckpt`'s global_step.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sdjax import config as shipped
from sdjax.checkpoints.components import CONFIGS, configured
from sdjax.checkpoints.files import read_json
from sdjax.checkpoints.fitting import tokenizer_of
from sdjax.checkpoints.tensors import Tensor, Tensors
from sdjax.config import Configs
from sdjax.errors import InputError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
PLACES = {
    UNET: ("unet", "compvis"),
    VAE: ("vae", "compvis"),
    "cond_stage_model.transformer.": ("text_encoder", "transformers"),
    "cond_stage_model.model.": ("text_encoder", "openclip"),
    "conditioner.embedders.0.transformer.": ("text_encoder", "transformers"),
    "conditioner.embedders.1.model.": ("text_encoder_2", "openclip"),
    "conditioner.embedders.0.model.": ("text_encoder_2", "openclip"),
}
"""A single file's prefixes: whose weights stand under each, and in whose names."""

BARE_VAE = ("encoder.conv_in.weight", "decoder.conv_in.weight")
STEPS = {875000: "epsilon", 110000: "v_prediction"}
"""The global_step in the published 512-base-ema.ckpt (2.0) and v2-1_768-ema-pruned.ckpt."""

OWN = "give its own config, --config (config=) with a .toml file or a diffusers folder"
TITLES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}
TITLES["text_encoder_2"] = "OpenCLIP text encoder"


class Place(NamedTuple):
    """Where in a single file a component stands, and in whose names."""

    prefix: str
    style: str


class Found(NamedTuple):
    """What a single file is."""

    name: str  # a shipped config's, or the path that was given
    configs: Configs  # component to its config, markers applied
    networks: dict[str, Any]  # component with weights to its config, read
    places: dict[str, Place]  # the components that the file has
    note: str | None  # one line for the user, when something was assumed


def identify(tensors: Tensors, config: str | Path | None = None) -> Found:
    """The family, configs and layout of a single file; reads no weights but a global step.

    Args:
        tensors: the file, open.
        config: a shipped config's name, a .toml file or a diffusers folder; None to detect it.

    Raises:
        InputError: not a Stable Diffusion single file, a part is missing, a config of no network
            here, shapes that differ from the config's, a marker that contradicts it, or nothing
            that tells two models apart.
    """
    refuse_others(tensors)
    places = layout(tensors)
    note = None
    if config is not None:
        name, configs = str(config), read_config(config)
        contradicts(tensors, configs, name)
    elif "unet" in places:
        name = family(tensors, places)
        configs = shipped.read(name)
        apply_markers(tensors, configs)
    else:
        xl = "xl" in tensors.metadata.get("modelspec.architecture", "")
        name = "sdxl" if xl else "sd1"
        configs = shipped.read(name)
        if not xl:
            note = (
                f"{tensors.path} is a VAE alone, taken for one of Stable Diffusion 1 or 2 "
                "(scaling factor 0.18215): give --config sdxl if it is SDXL's"
            )
    # Nothing of a config is used unchecked.
    said = f"config {name!r}"
    networks = {part: configured(part, configs[part], said) for part in CONFIGS if part in configs}
    complete(tensors, configs, places, name)
    compare(tensors, networks, places, name)
    return Found(name, configs, networks, places, note)


def layout(tensors: Tensors) -> dict[str, Place]:
    """Which components the file has, and under which prefix."""
    places: dict[str, Place] = {}
    for prefix, (component, style) in PLACES.items():
        if any(key.startswith(prefix) for key in tensors):
            if component in places:
                raise InputError(
                    f"{tensors.path} has two of the {TITLES[component]}, under "
                    f"{places[component].prefix!r} and {prefix!r}: remove one of them"
                )
            places[component] = Place(prefix, style)
    if not places and any(key in tensors for key in BARE_VAE):
        places["vae"] = Place("", "compvis")
    return places


def family(tensors: Tensors, places: Mapping[str, Place]) -> str:
    """The name of the shipped config for a file with a UNet.

    Raises:
        InputError: unknown input channels or context width, or SD2 with no sign of its prediction.
    """
    first = tensors.get(f"{UNET}input_blocks.0.0.weight")
    if first is None or len(first.shape) != 4:
        raise InputError(
            f"{tensors.path} is not a checkpoint of Stable Diffusion 1, 2 or XL: it has no "
            f"convolution {UNET}input_blocks.0.0.weight"
        )
    channels = first.shape[1]
    if "text_encoder_2" in places:
        base = "sdxl" if "text_encoder" in places else "sdxl-refiner"
    elif "text_encoder" in places:
        base = "sd2" if places["text_encoder"].style == "openclip" else "sd1"
    else:
        width = context_width(tensors)
        base = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}.get(width or 0, "")
        if not base:
            raise InputError(
                f"{tensors.path} is not a checkpoint of Stable Diffusion 1, 2 or XL: its UNet has "
                f"a context of width {width}, where they have 768, 1024, 2048 or 1280: {OWN}"
            )
    if base == "sd2" and channels == 7:
        return "x4-upscaler"
    if channels == 9 and base != "sdxl-refiner":
        return f"{base}-inpaint"
    if channels != 4:
        kind = {5: ", as depth-to-image has", 8: ", as InstructPix2Pix has"}.get(channels, "")
        raise InputError(
            f"{tensors.path}: {first.name!r} takes {channels} channels{kind}, where sdjax knows 4, "
            "9 (inpainting) and 7 (the SD2 x4 upscaler)"
        )
    if base != "sd2":
        return base
    prediction = marked_prediction(tensors)
    if prediction is None:
        raise InputError(
            f"{tensors.path} is Stable Diffusion 2, and nothing in it says what its UNet predicts: "
            "give --config (config=) sd2 for the 768-pixel velocity models or sd2-base for the "
            "512-pixel epsilon ones"
        )
    return "sd2" if prediction == "v_prediction" else "sd2-base"


def marked_prediction(tensors: Tensors) -> str | None:
    """What the UNet predicts, "epsilon" or "v_prediction", if the file says so."""
    if "v_pred" in tensors:
        return "v_prediction"
    said = tensors.metadata.get("modelspec.prediction_type", "").lower().replace("-", "_")
    if said in ("epsilon", "eps"):
        return "epsilon"
    if said in ("v", "v_pred", "v_prediction"):
        return "v_prediction"
    architecture = tensors.metadata.get("modelspec.architecture", "")
    if architecture.endswith("768-v"):
        return "v_prediction"
    if architecture.endswith(("v2-512", "v2-inpainting")):
        return "epsilon"
    step = tensors.metadata.get("global_step")
    if step is None and "global_step" in tensors and tensors["global_step"].size == 1:
        step = str(tensors["global_step"].read().reshape(()).item())
    try:
        return STEPS.get(int(float(step))) if step else None
    except (ValueError, OverflowError):
        return None


def apply_markers(tensors: Tensors, configs: Configs) -> None:
    """Set the scheduler's prediction, and zero terminal SNR, to what the file says."""
    configs["scheduler"] |= marks(marked_prediction(tensors), "ztsnr" in tensors)


def marks(prediction: str | None, zero_snr: bool) -> dict[str, Any]:
    """What a file's markers set in its family's scheduler.

    With zero terminal SNR the last timestep is pure noise and sampling must begin there, hence
    trailing timesteps (Lin et al. 2023, arXiv 2305.08891, section 3.3).
    """
    said: dict[str, Any] = {} if prediction is None else {"prediction_type": prediction}
    if zero_snr:
        said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return said


def contradicts(tensors: Tensors, configs: Configs, name: str) -> None:
    """Refuse a given config whose schedule is not the one that the file's marker tensors say."""
    scheduler = configs.get("scheduler", {})
    for key, setting, value in (
        ("v_pred", "prediction_type", "v_prediction"),
        ("ztsnr", "rescale_betas_zero_snr", True),
    ):
        if key in tensors and scheduler and scheduler.get(setting) != value:
            shown = json.dumps(value)
            raise InputError(
                f"{tensors.path} is marked {key!r}, and config {name!r} does not have {setting} = "
                f"{shown} for its scheduler: leave --config out, or give one that has it"
            )


def complete(tensors: Tensors, configs: Configs, places: Mapping[str, Place], name: str) -> None:
    """Refuse a file with a part missing, or with one that its config does not describe."""
    needed = [part for part in CONFIGS if part in configs]
    has = f"{tensors.path} holds {listed(places)}"
    extra = [part for part in places if part not in configs]
    if extra:
        raise InputError(f"{has}, and config {name!r} describes no {listed(extra)}: {OWN}")
    if list(places) == ["vae"]:
        return
    missing = [part for part in needed if part not in places]
    if missing:
        raise InputError(
            f"{has}, and no {listed(missing)}, which {name!r} needs: use the full checkpoint or "
            "the model's diffusers folder"
        )


def compare(
    tensors: Tensors, networks: Mapping[str, Any], places: Mapping[str, Place], name: str
) -> None:
    """Refuse a file whose characteristic widths are not the config's networks'.

    Every shape is checked next, by `naming.check`; these few tell a wrong config from a damaged
    file.
    """
    signs: list[tuple[str, dict[int, int]]] = []  # key, and the lengths of some of its axes
    if "unet" in places:
        unet = networks["unet"]
        axes = {0: unet.block_out_channels[0], 1: unet.in_channels}
        signs.append((f"{UNET}input_blocks.0.0.weight", axes))
        context = next(contexts(tensors), None)
        if context is not None:
            signs.append((context.name, {1: unet.cross_attention_dim}))
    if "vae" in places:
        vae, prefix = networks["vae"], places["vae"].prefix
        first, last = vae.block_out_channels[0], vae.block_out_channels[-1]
        signs.append((f"{prefix}encoder.conv_in.weight", {0: first}))
        signs.append((f"{prefix}decoder.conv_in.weight", {0: last, 1: vae.latent_channels}))
    for part in ("text_encoder", "text_encoder_2"):
        if part in places:
            text, prefix = networks[part].text, places[part].prefix
            axes = {0: text.vocab_size, 1: text.hidden_size}
            table = "embeddings.token_embedding.weight"
            for key in ("token_embedding.weight", f"text_model.{table}", table):
                signs.append((prefix + key, axes))
    for key, axes in signs:
        shape = tensors[key].shape if key in tensors else None
        if shape and any(len(shape) <= axis or shape[axis] != n for axis, n in axes.items()):
            needs = " and ".join(f"{n} on axis {axis}" for axis, n in axes.items())
            raise InputError(
                f"{tensors.path}: {key!r} has shape {list(shape)}, where {name!r} has {needs}: if "
                f"the model is another one, {OWN}"
            )


def contexts(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The UNet's cross-attention keys' projections."""
    return (
        tensor
        for key, tensor in tensors.items()
        if key.startswith(UNET) and key.endswith("attn2.to_k.weight")
    )


def context_width(tensors: Mapping[str, Tensor]) -> int | None:
    """The width of the text states that the UNet attends to."""
    return next((tensor.shape[-1] for tensor in contexts(tensors) if tensor.shape), None)


def refuse_others(tensors: Tensors) -> None:
    """Name what a file is, when it is weights of another kind."""
    where = tensors.path
    if "edm_mean" in tensors or any(key.startswith("edm_vpred.") for key in tensors):
        raise InputError(
            f"{where} is trained with EDM's noise conditioning (Playground 2.5 or CosXL, by its "
            "edm_ keys), which sdjax does not know"
        )
    kinds = {
        r"lora_(unet|te|te1|te2)_|.*\.lora_(up|down|A|B)\.": "a LoRA, not a whole model",
        r"control_model\.|controlnet_": "a ControlNet, not a whole model",
        r"(model\.diffusion_model\.)?(double_blocks|joint_blocks)\.": "Flux or SD3, which sdjax "
        "does not know",
        r"(unet\.)?(down_blocks|up_blocks|mid_block)\.|(encoder|decoder)\.mid_block\.": "one "
        "network in diffusers' names: load the folder that it belongs to",
        r"(text_model\.)?(embeddings|encoder\.layers)\.": "a text encoder alone: load the folder "
        "or the full checkpoint that it belongs to",
        r"input_blocks\.": "a UNet alone, without VAE and text encoder: use the full checkpoint "
        "or the model's diffusers folder",
    }
    for pattern, kind in kinds.items():
        if any(re.match(pattern, key) for key in tensors):
            raise InputError(f"{where} is {kind}")
    if not layout(tensors):
        few = ", ".join(repr(key) for key in list(tensors)[:3]) or "no tensors at all"
        raise InputError(
            f"{where} is not a checkpoint of Stable Diffusion: nothing in it is under "
            f"{UNET!r} or {VAE!r}, it has {few}"
        )


def read_config(config: str | Path) -> Configs:
    """The configs of a shipped name, a .toml file, or a diffusers folder.

    Raises:
        InputError: none of these, JSON that is not an object, no VAE or no noise schedule.
    """
    is_name = config in shipped.names()
    configs = shipped.read(config) if is_name or not Path(config).is_dir() else read_folder(config)
    if "vae" not in configs:
        raise InputError(
            f"config {str(config)!r} describes no VAE: it needs [vae], or vae/config.json"
        )
    if "unet" in configs and "scheduler" not in configs:
        raise InputError(
            f"config {str(config)!r} describes a UNet and no noise schedule: it needs [scheduler], "
            "or scheduler/scheduler_config.json"
        )
    for part in ("text_encoder", "text_encoder_2"):
        if part in configs:
            pad = "!" if configs[part].get("hidden_act") == "gelu" else "<|endoftext|>"
            configs.setdefault(tokenizer_of(part), {}).setdefault("pad_token", pad)
    return configs


def read_folder(config: str | Path) -> Configs:
    """The configs of a diffusers folder, weights or none beside them."""
    folder = Path(config)
    files = {"model_index": folder / "model_index.json"}
    for part in CONFIGS:
        files[part] = folder / part / "config.json"
    for part in ("scheduler", "low_res_scheduler"):
        files[part] = folder / part / "scheduler_config.json"
    for part in ("tokenizer", "tokenizer_2"):
        files[part] = folder / part / "tokenizer_config.json"
    configs: Configs = {}
    for part, file in files.items():
        if file.is_file():
            configs[part] = read_json(file)
    return configs


def listed(parts: Iterable[str]) -> str:
    """Components as words: "UNet, VAE and text encoder"."""
    words = [TITLES.get(part, part) for part in parts]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
