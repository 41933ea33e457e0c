"""`load`: a checkpoint on disk or on the Hub to `(model, params)`."""

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdjax import bundled
from sdjax.checkpoints import detect, fitting, folder, naming, single_file
from sdjax.checkpoints.finding import find, readable
from sdjax.checkpoints.tensors import Tensor, Tensors, floating
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import InputError
from sdjax.model import FrozenConfig, Model
from sdjax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL
from sdjax.text import Tokenizer

CLASSES: dict[str, Any] = {
    "unet": UNet,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
"""The components with weights, in the order in which they are read."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Network:
    """A component before its weights are read: the module, its tensors, and where they are."""

    module: Any
    tensors: dict[str, Tensor]
    path: Path

    @property
    def nbytes(self) -> int:
        """What the file holds of it."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Source:
    """A checkpoint before its weights are read: everything is known of it, and checked."""

    path: Path
    networks: dict[str, Network]
    index: Mapping[str, Any]
    scheduler: dict[str, Any]
    tokenizers: dict[str, Tokenizer]
    note: str = ""
    """What had to be assumed, in one line."""

    @property
    def family(self) -> str:
        """The shipped config that the networks are an instance of."""
        return family({name: n.module for name, n in self.networks.items()}, self.scheduler)


def load(
    where: str | os.PathLike = bundled.NAME,
    *,
    dtype: Any = None,
    config: str | os.PathLike | None = None,
    ema: bool = False,
    variant: str | None = None,
    progress: bool | Progress = False,
) -> tuple[Model, dict[str, Any]]:
    """Load a model and its weights, without torch and without running anything of the file's.

    Every header is checked before the first weight is read; then tensors are mapped, cast and
    placed one by one, so that memory holds the params and one tensor.

    Args:
        where: a diffusers folder, a single file (.safetensors, .ckpt), a model's folder in the
            Hub's cache, or a Hub id ("org/name"). "scenes" is the small model that comes with
            sdjax, whatever the working folder holds: a folder of that name is "./scenes".
        dtype: "float32", "bfloat16" or "float16" to cast to; None keeps what is stored. Networks
            compute in bfloat16 where their weights are bfloat16 and in float32 otherwise, float16
            being too narrow: on an accelerator, load a float16 checkpoint as "bfloat16".
        config: for a single file, the name of a shipped config or a TOML file of the same form.
        ema: for a single file, take the UNet's moving average.
        variant: for a folder, the variant of the files, such as "fp16".
        progress: True for a bar on stderr, or a function of bytes read and bytes in all.

    Returns:
        The model, and its params: component ("unet", "vae", "text_encoder", ...) to nested dict.

    Raises:
        InputError: one sentence naming the file, the key and how to mend it.
    """
    target = None if dtype is None else floating(naming.dtype_name(dtype))
    source = open_checkpoint(where, config=config, ema=ema, variant=variant)
    if "unet" not in source.networks:
        raise InputError(
            f"{source.path} holds an autoencoder and no UNet: give a whole checkpoint, or load "
            "this by sdjax.checkpoints.load_vae"
        )
    if source.note:
        warnings.warn(source.note, stacklevel=2)
    model = assemble(source, os.fspath(where))
    return model, read(source, target, progress)


def load_vae(
    where: str | os.PathLike,
    *,
    dtype: Any = None,
    config: str | os.PathLike | None = None,
    variant: str | None = None,
) -> tuple[AutoencoderKL, dict[str, Any]]:
    """Load an autoencoder alone: from a VAE-only file or folder, or out of a whole checkpoint.

    Arguments and errors are those of `load`.
    """
    target = None if dtype is None else floating(naming.dtype_name(dtype))
    source = open_checkpoint(where, config=config, variant=variant)
    if "vae" not in source.networks:
        raise InputError(f"{source.path} holds no autoencoder: give a checkpoint with a VAE")
    if source.note:
        warnings.warn(source.note, stacklevel=2)
    network = source.networks["vae"]
    params = naming.to_params(network.module, network.tensors, dtype=target, where=network.path)
    return network.module, params


def open_checkpoint(
    where: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    ema: bool = False,
    variant: str | None = None,
) -> Source:
    """Find a checkpoint, read its configs and headers, and hold them against each other.

    Raises:
        InputError: as `load`, but for what only the weights themselves show.
    """
    found = find(where, config=config, ema=ema, variant=variant)
    with readable(found.path):
        if isinstance(found.opened, folder.Folder):
            return open_folder(found.opened)
        if isinstance(found.opened, Tensors):
            return open_file(found.opened, config, ema)
    alone = found.opened
    said, weights = found.path / "config.json", alone.tensors
    vae = network("vae", alone.config, weights, said, weights.path)
    return Source(found.path, {"vae": vae}, {}, {}, {})


def open_folder(opened: folder.Folder) -> Source:
    """`open_checkpoint` for a diffusers folder."""
    path, networks = opened.path, {}
    for name, part in opened.networks.items():
        with_file = part.path / "config.json"
        networks[name] = network(name, part.config, part.tensors, with_file, part.tensors.path)
    tokenizers = {name: Tokenizer.load(where) for name, where in opened.tokenizers.items()}
    scheduler = opened.schedulers["scheduler"]
    schedule(scheduler, path / "scheduler" / "scheduler_config.json")
    return complete(Source(path, networks, opened.index, scheduler, tokenizers))


def open_file(tensors: Tensors, config: str | os.PathLike | None, ema: bool) -> Source:
    """`open_checkpoint` for a single file."""
    path = tensors.path
    chosen = None if config is None else os.fspath(config)
    found = detect.identify(tensors, chosen)
    parts = single_file.parts(tensors, found, ema)
    networks = {
        name: network(name, parts[name][0], parts[name][1], path, path)
        for name in CLASSES
        if name in parts
    }
    plain = {name: dict(part[0]) for name, part in parts.items() if name not in CLASSES}
    tokenizers = {
        name: Tokenizer.clip(padding(plain[name], found.name))
        for name in folder.TOKENIZERS
        if name in plain
    }
    scheduler = plain.get("scheduler", {})
    if "unet" in networks:
        schedule(scheduler, Path(found.name))
    index, note = plain.get("model_index", {}), found.note or ""
    source = Source(path, networks, index, scheduler, tokenizers, note)
    return complete(source) if "unet" in networks else source


def padding(config: Mapping[str, Any], name: str) -> str:
    """The pad token in a tokenizer's config: a text, or a dict of its flags, as older ones have."""
    token = config.get("pad_token", "<|endoftext|>")
    token = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(token, str):
        raise InputError(f"config {name!r}: 'pad_token' must be text, got {token!r:.80}")
    return token


def complete(source: Source) -> Source:
    """Check that the networks fit together.

    Raises:
        InputError: a network is missing, or two do not fit (`fitting`).
    """
    modules = {name: n.module for name, n in source.networks.items()}
    unet, vae = modules["unet"], modules.get("vae")
    if vae is None or not {"text_encoder", "text_encoder_2"} & set(modules):
        what = "autoencoder" if vae is None else "text encoder"
        raise InputError(f"{source.path} has a UNet and no {what}: give a whole checkpoint")
    fitting.check_text(modules, source.tokenizers, source.path)
    fitting.check_latents(unet, vae, source.path)
    return source


def network(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], said: Path, path: Path
) -> Network:
    """A module from its config (which `said` holds), with the tensors that `path` has for it."""
    try:
        module = CLASSES[name].from_config(config)
    except InputError as error:
        raise InputError(f"{said}: {error}") from None
    return Network(module, naming.check(module, tensors, path), path)


def schedule(config: Mapping[str, Any], path: Path) -> Schedule:
    """The training schedule of a scheduler's config, errors naming its file."""
    try:
        return Schedule.from_config(dict(config))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def assemble(source: Source, where: str) -> Model:
    """The model of a checkpoint: everything but the weights."""
    modules = {name: n.module for name, n in source.networks.items()}
    zero = source.index.get("force_zeros_for_empty_prompt", source.family.startswith("sdxl"))
    return Model(
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoder=modules.get("text_encoder"),
        text_encoder_2=modules.get("text_encoder_2"),
        tokenizer=source.tokenizers.get("tokenizer"),
        tokenizer_2=source.tokenizers.get("tokenizer_2"),
        schedule=schedule(source.scheduler, source.path),
        scheduler=FrozenConfig.of(source.scheduler),
        zero_negative=bool(zero) and "text_encoder_2" in modules,
        family=source.family,
        source=where,
        **advised(source.index, source.path),
    )


def advised(index: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The fields of `Model` for what a model's makers advise, from its index."""
    given = index.get(folder.ADVICE, {})
    known = {"steps": Model.steps, "guidance_scale": Model.guidance_scale}
    known |= {n: v for n, v in given.items() if n in known} if isinstance(given, dict) else {}
    steps, scale = known.values()
    good = type(steps) is int and 1 <= steps <= 1000
    if not (good and type(scale) in (int, float) and math.isfinite(scale)):
        raise InputError(
            f"{path}: {folder.ADVICE!r} must have steps from 1 to 1000 and a finite "
            f"guidance_scale, got {given!r:.80}"
        )
    return {"steps": steps, "guidance_scale": float(scale)}


def read(source: Source, dtype: np.dtype | None, progress: bool | Progress) -> dict[str, Any]:
    """Every component's params."""
    total = sum(n.nbytes for n in source.networks.values())
    report, close = _reporter(progress, total)
    so_far = 0

    def done(nbytes: int) -> None:
        nonlocal so_far
        so_far += nbytes
        report(so_far, total)

    try:
        return {
            name: naming.to_params(n.module, n.tensors, dtype=dtype, where=n.path, done=done)
            for name, n in source.networks.items()
        }
    finally:
        close()


def family(modules: Mapping[str, Any], scheduler: Mapping[str, Any]) -> str:
    """The name of the shipped config that networks are an instance of."""
    unet, encoder = modules.get("unet"), modules.get("text_encoder")
    if unet is None:
        return ""
    inpaint = "-inpaint" if unet.in_channels == 9 else ""
    if unet.num_class_embeds is not None:
        return "x4-upscaler"
    if unet.addition_embed_type == "text_time":
        return f"sdxl{inpaint}" if encoder is not None else "sdxl-refiner"
    if encoder is None or encoder.text.hidden_act == "quick_gelu":
        return f"sd1{inpaint}"
    if inpaint:
        return "sd2-inpaint"
    return "sd2" if scheduler.get("prediction_type") == "v_prediction" else "sd2-base"


def _reporter(progress: bool | Progress, total: int) -> tuple[Progress, Callable[[], None]]:
    if callable(progress):
        return progress, lambda: None
    if not progress:
        return lambda done, total: None, lambda: None
    from tqdm import tqdm

    bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading")
    return lambda done, total: bar.update(done - bar.n) and None, bar.close
