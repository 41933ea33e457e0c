"""A model as one file, in the layout of its family: `single_file.read` inverted.

Loading, saving and loading again changes no bit.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sdjax import config as shipped
from sdjax.checkpoints import detect, naming, openclip, safetensors
from sdjax.checkpoints.detect import UNET, VAE, Place
from sdjax.checkpoints.single_file import write_names
from sdjax.diffusion import profiles
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import InputError


def places(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Place]:
    """The layout that a model's family is published in, from its configs.

    OpenCLIP's encoders have the exact GELU; CLIP-L its approximation by a sigmoid (`quick_gelu`).
    """
    where = {"unet": Place(UNET, "compvis"), "vae": Place(VAE, "compvis")}
    where = {part: place for part, place in where.items() if part in configs}
    first, second = "text_encoder" in configs, "text_encoder_2" in configs
    if second:
        where["text_encoder_2"] = Place(f"conditioner.embedders.{int(first)}.model.", "openclip")
        if first:
            place = Place("conditioner.embedders.0.transformer.", "transformers")
            where["text_encoder"] = place
    elif first:
        exact = configs["text_encoder"].get("hidden_act") == "gelu"
        style = ("model", "openclip") if exact else ("transformer", "transformers")
        where["text_encoder"] = Place(f"cond_stage_model.{style[0]}.", style[1])
    return where


def write(
    path: str | os.PathLike,
    model: Any,
    params: Mapping[str, Mapping[str, Any]],
    dtype: np.dtype | None = None,
) -> None:
    """Write a model as one safetensors file, in the layout of its family.

    Args:
        path: where; an existing file is replaced once the new one is whole.
        model: the bundle, for its networks' configs and its scheduler's.
        params: component to nested dict.
        dtype: what to cast to; None keeps each array's.

    What the layout cannot say, the networks' configs, the reader takes from a shipped config or
    from `config=`; the prediction is written as metadata, and as `v_pred` and `ztsnr` where these
    apply.
    """
    modules = {part: getattr(model, part) for part in params}
    configs = {part: module.config() for part, module in modules.items() if module is not None}
    scheduler = model.scheduler.dict() if hasattr(model.scheduler, "dict") else model.scheduler
    entries: list[safetensors.Entry] = []
    for part, place in places(configs).items():
        entries.extend(_entries(part, configs[part], place, params[part], dtype))
    prediction, zero_snr = markers(scheduler)
    velocity = prediction == "v_prediction"
    empty = np.zeros((0,), np.float32)
    if velocity:
        entries.append(safetensors.Entry("v_pred", (0,), empty.dtype, lambda: empty))
    if zero_snr:
        entries.append(safetensors.Entry("ztsnr", (0,), empty.dtype, lambda: empty))
    metadata = {"format": "pt", "modelspec.sai_model_spec": "1.0.0"}
    metadata["modelspec.prediction_type"] = "v" if velocity else "epsilon"
    safetensors.write(path, entries, metadata)


def markers(scheduler: Mapping[str, Any]) -> tuple[str, bool]:
    """What a file can say of a scheduler: what the UNet predicts, and zero terminal SNR."""
    velocity = scheduler.get("prediction_type") == "v_prediction"
    zero_snr = bool(scheduler.get("rescale_betas_zero_snr"))
    return "v_prediction" if velocity else "epsilon", zero_snr


def lost(model: Any) -> str:
    """What a single file of a model will not say, in a few words; "" where it says all.

    A file's reader takes its family's scheduler, with the markers applied. What matters of a config
    is the run that it gives, so the two runs are compared, and the training schedules.
    """
    own, name = model.scheduler.dict(), model.family or "sd1"
    other = shipped.read(name)["scheduler"] | detect.marks(*markers(own))
    same = Schedule.from_config(own) == Schedule.from_config(other)
    if same and _run(own, model.steps) == _run(other, model.steps):
        return ""
    kinds = [config.get("_class_name", "no class") for config in (own, other)]
    return (
        f"the model's scheduler ({kinds[0]}), in place of which {name}'s own ({kinds[1]}) is read"
    )


def _run(config: Mapping[str, Any], steps: int) -> Any:
    """What a scheduler's config comes to, comparable; a config of no run equals nothing."""
    try:
        plan = profiles.diffusers(config, steps)._replace(note=None)
    except InputError:
        return object()
    leaves, tree = jax.tree.flatten(plan)
    return tree, [np.asarray(leaf).tobytes() for leaf in leaves]


def _entries(
    part: str,
    config: Mapping[str, Any],
    place: Place,
    params: Mapping[str, Any],
    dtype: np.dtype | None,
) -> Iterator[safetensors.Entry]:
    """One component's arrays under the single file's names; q, k and v joined for OpenCLIP."""
    spell = write_names(part, config, place)
    groups: dict[str, list[tuple[tuple[str, ...], Any]]] = {}
    for path, leaf in naming.flatten(params):
        groups.setdefault(spell(naming.torch_key(path)), []).append((path, leaf))
    for key, group in groups.items():
        if len(group) > 1:
            group.sort(key=lambda item: openclip.FUSED.index(item[0][-2]))
        kind = dtype or np.dtype(group[0][1].dtype)
        shapes = [naming.to_torch_shape(path[-1], leaf.shape) for path, leaf in group]
        shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
        if part == "vae" and len(shape) == 2:
            shape = (*shape, 1, 1)
        flip = key.endswith(openclip.PROJECTION)
        if flip:
            shape = shape[::-1]
        read = functools.partial(_join, group, shape, kind, flip)
        yield safetensors.Entry(key, shape, kind, read)


def _join(
    group: list[tuple[tuple[str, ...], Any]], shape: tuple[int, ...], dtype: np.dtype, flip: bool
) -> np.ndarray:
    """The array of one entry: the parts of a fused projection joined, axes as torch has them."""
    arrays = [naming.to_torch_axes(path[-1], np.asarray(leaf)) for path, leaf in group]
    array = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    return (array.T if flip else array.reshape(shape)).astype(dtype, copy=False)
