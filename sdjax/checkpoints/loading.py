"""`load`: a checkpoint on disk or on the Hub to `(model, params)`."""

import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax import bundled
from sdjax.checkpoints import folder, placing
from sdjax.checkpoints.components import Network
from sdjax.checkpoints.finding import Source, find
from sdjax.checkpoints.tensors import floating
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import InputError
from sdjax.model import FrozenConfig, Model
from sdjax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from sdjax.models.fields import values
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL

CLASSES: dict[str, Any] = {
    "unet": UNet,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
"""The components with weights, and their networks."""

Progress = Callable[[int, int], None]


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
    target = None if dtype is None else floating(placing.dtype_name(dtype))
    source = find(where, config=config, ema=ema, variant=variant)
    if "unet" not in source.networks:
        raise InputError(
            f"{source.path} holds an autoencoder and no UNet: give a whole checkpoint, or load "
            "this by sdjax.checkpoints.load_vae"
        )
    if source.note:
        warnings.warn(source.note, stacklevel=2)
    model = assemble(source)
    return model, read(source, target, progress)


def load_vae(
    where: str | os.PathLike,
    *,
    dtype: Any = None,
    config: str | os.PathLike | None = None,
    variant: str | None = None,
) -> tuple[AutoencoderKL, dict[str, Any]]:
    """Load an autoencoder alone: from a VAE-only file or folder, or out of a whole checkpoint.

    Arguments and errors are those of `load`, but for the scheduler's config, which is not needed.
    """
    target = None if dtype is None else floating(placing.dtype_name(dtype))
    source = find(where, config=config, variant=variant)
    if "vae" not in source.networks:
        raise InputError(f"{source.path} holds no autoencoder: give a checkpoint with a VAE")
    if source.note:
        warnings.warn(source.note, stacklevel=2)
    module = AutoencoderKL(**values(source.networks["vae"].config))
    return module, place(source.networks["vae"], target)


def schedule(source: Source) -> Schedule:
    """The training schedule of a checkpoint, errors naming the file that has its config."""
    try:
        return Schedule.from_config(source.scheduler)
    except InputError as error:
        raise InputError(f"{source.said}: {error}") from None


def assemble(source: Source) -> Model:
    """The model of a checkpoint: everything but the weights."""
    modules = {name: CLASSES[name](**values(config)) for name, config in source.configs.items()}
    zero = source.index.get("force_zeros_for_empty_prompt", source.family.startswith("sdxl"))
    return Model(
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoder=modules.get("text_encoder"),
        text_encoder_2=modules.get("text_encoder_2"),
        tokenizer=source.tokenizers.get("tokenizer"),
        tokenizer_2=source.tokenizers.get("tokenizer_2"),
        schedule=schedule(source),
        scheduler=FrozenConfig.of(source.scheduler),
        zero_negative=bool(zero) and "text_encoder_2" in modules,
        family=source.family,
        source=source.where,
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
        return {name: place(network, dtype, done) for name, network in source.networks.items()}
    finally:
        close()


def place(
    network: Network, dtype: np.dtype | None, done: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """One component's params."""
    return placing.to_params(
        network.config, network.tensors, dtype=dtype, where=network.path, done=done
    )


def _reporter(progress: bool | Progress, total: int) -> tuple[Progress, Callable[[], None]]:
    if callable(progress):
        return progress, lambda: None
    if not progress:
        return lambda done, total: None, lambda: None
    from tqdm import tqdm

    bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading")
    return lambda done, total: bar.update(done - bar.n) and None, bar.close
