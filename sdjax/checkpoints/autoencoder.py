"""An autoencoder alone, as a diffusers folder: config.json and its weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax.checkpoints import folder, naming, placing, safetensors
from sdjax.checkpoints.files import read_json, write_json
from sdjax.checkpoints.saving import FILES, compare, entry, is_taken, whole_folder
from sdjax.checkpoints.tensors import floating
from sdjax.errors import InputError
from sdjax.models.vae import AutoencoderKL
from sdjax.models.vq import VQModel

Autoencoder = AutoencoderKL | VQModel

CONFIG = "config.json"
CLASSES: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


def save_vae(
    where: str | os.PathLike,
    module: Autoencoder,
    params: Mapping[str, Any],
    scaling_factor: float | None = None,
    *,
    dtype: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write an autoencoder that torch's diffusers loads too, by its class's `from_pretrained`.

    The folder appears under its name only when it is whole.

    Args:
        where: the folder to make.
        module: the autoencoder.
        params: its nested dict.
        scaling_factor: what `training.first_stage.measure_scale` found; None keeps the module's.
        dtype: "float32", "bfloat16" or "float16" to cast to; None keeps what the params have.
        overwrite: replace an autoencoder that is there.

    Returns:
        The path.

    Raises:
        InputError: something is there already, or the params are not the module's.
    """
    path = Path(where)
    target = None if dtype is None else floating(placing.dtype_name(dtype))
    if scaling_factor is not None:
        changes = {"scaling_factor": float(scaling_factor)}
        module = type(module).from_config(module.config() | changes)
    compare(module, params, "vae")
    taken = is_taken(path, overwrite)
    if taken and not (path / CONFIG).is_file():
        raise InputError(f"{path} is not an autoencoder, so it is not replaced: give another path")
    with whole_folder(path) as part:
        write_json(part / CONFIG, module.config())
        entries = [
            entry(naming.torch_key(leaf_path), leaf_path, leaf, target, "vae")
            for leaf_path, leaf in naming.flatten(params)
        ]
        safetensors.write(part / FILES["diffusers"], entries)
    return path


def load_autoencoder(
    where: str | os.PathLike, *, dtype: Any = None, variant: str | None = None
) -> tuple[Autoencoder, dict[str, Any]]:
    """Load the folder of a KL or VQ autoencoder, by what its config says it is.

    `load_vae` reads single files and whole checkpoints too, and KL autoencoders only.

    Args:
        where: a folder with config.json and weights.
        dtype: "float32", "bfloat16" or "float16" to cast to; None keeps what is stored.
        variant: of the files, such as "fp16".

    Raises:
        InputError: one sentence naming the file, the key and how to mend it.
    """
    path = Path(where)
    target = None if dtype is None else floating(placing.dtype_name(dtype))
    config = read_json(path / CONFIG)
    kind = config.get("_class_name")
    if kind not in CLASSES:
        wanted = " or ".join(map(repr, CLASSES))
        raise InputError(f"{path / CONFIG}: '_class_name' must be {wanted}, got {str(kind)[:80]!r}")
    try:
        module = CLASSES[kind].from_config(config)
    except InputError as error:
        raise InputError(f"{path / CONFIG}: {error}") from None
    tensors = folder.weights(path, variant)
    return module, placing.to_params(module, tensors, dtype=target, where=tensors.path)
