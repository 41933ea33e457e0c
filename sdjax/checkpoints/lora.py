"""LoRA files: diffusers' and peft's, kohya's; read and written."""

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sdjax.checkpoints import compvis, naming, pickles, safetensors, saving
from sdjax.checkpoints.tensors import FLOATS, Tensor, Tensors
from sdjax.errors import InputError
from sdjax.model import Model
from sdjax.models.lora import is_pair

NAME = "pytorch_lora_weights.safetensors"
"""The file that diffusers looks for in a folder."""

ADAPTED = ("unet", "text_encoder", "text_encoder_2")
PREFIXES = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder"} | {
    "lora_te2": "text_encoder_2"
}
"""kohya's names of the networks."""

ROLES = {
    "down": re.compile(r"[._](lora_A(\.default)?|lora(_linear_layer)?\.down|lora_down)\.weight$"),
    "up": re.compile(r"[._](lora_B(\.default)?|lora(_linear_layer)?\.up|lora_up)\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
}
"""How the keys of a layer's two halves and of its scale end."""


class Layer(NamedTuple):
    """Where an update belongs."""

    network: str
    path: tuple[str, ...]
    shape: tuple[int, ...]  # of the weight, in torch


def load_lora(where: str | os.PathLike, model: Model) -> dict[str, Any]:
    """Read a LoRA for a model: `sdjax.models.lora.merge(params, it)` applies it.

    Args:
        where: a file, or a folder with `pytorch_lora_weights.safetensors`. Keys are diffusers' of
            any age, peft's, or kohya's (`lora_unet_down_blocks_0_...`, with `alpha`).
        model: whose layers are updated.

    Returns:
        {"unet": tree, "text_encoder": tree, ...}: what the file has, nested as the params, with
        {"a", "b"} in float32 at each layer; alpha / rank is multiplied into b.

    Raises:
        InputError: not a LoRA, of another kind (LoHa, LoKr, DoRA), or not of this model.
    """
    path = Path(where)
    path = path / NAME if path.is_dir() else path
    tensors = safetensors.open(path) if path.suffix == ".safetensors" else pickles.open(path)
    names = spellings(model)
    settings = adapter_settings(tensors)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, role = parted(key, path)
        found.setdefault(name, {})[role] = tensor
    unknown = [name for name in found if name not in names]
    if unknown or not found:
        what = f"updates {naming.count(unknown)} that" if unknown else "has no layers, and"
        raise InputError(
            f"{path} {what} the {model.family or 'given'} model does not know: use the model that "
            "it was trained for"
        )
    tree: dict[str, Any] = {}
    for name, roles in found.items():
        layer = names[name]
        node = tree.setdefault(layer.network, {})
        for part in layer.path[:-1]:
            node = node.setdefault(part, {})
        if node:
            raise InputError(f"{path} updates {name!r} twice: keep one of the two")
        node |= pair(name, layer, roles, settings)
    return tree


def save_lora(
    where: str | os.PathLike, model: Model, lora: Mapping[str, Any], scale: float = 1.0
) -> Path:
    """Write a LoRA that diffusers' `load_lora_weights` and other programs read.

    Keys are peft's (`unet.down_blocks.0...to_q.lora_A.weight`). `scale`, alpha / rank, is
    multiplied into `lora_B`, so that the file means the same to programs that know no alpha; the
    path of the file is returned.

    Args:
        where: a .safetensors file, or a folder to write `pytorch_lora_weights.safetensors` in.
        model: the networks that the updates belong to.
        lora: network to tree of {"a", "b"}, as `training.lora.init` and `load_lora` give.
        scale: what a b is multiplied by.

    Raises:
        InputError: the updates are not the model's.
    """
    path = Path(where)
    if path.suffix != ".safetensors":
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is neither a folder nor ends in .safetensors")
        path.mkdir(parents=True, exist_ok=True)
        path = path / NAME
    entries = []
    for network, tree in lora.items():
        module = getattr(model, network, None) if network in ADAPTED else None
        if module is None:
            raise InputError(f"the model has no {network!r} for a LoRA: it may have {ADAPTED}")
        known = {leaf.path: key for key, leaf in naming.leaves(module).items()}
        for at, node in _pairs(tree):
            key = known.get((*at, "kernel"))
            if key is None:
                raise InputError(f"{network} has no layer {'/'.join(at)!r}: give its own model")
            name = f"{network}.{saving.spelled(key, network)}".removesuffix(".weight")
            for role, array in _torch_pair(node, scale):
                read = functools.partial(np.ascontiguousarray, array)
                key = f"{name}.lora_{role}.weight"
                entries.append(safetensors.Entry(key, array.shape, array.dtype, read))
    safetensors.write(path, entries)
    return path


def spellings(model: Model) -> dict[str, Layer]:
    """Every layer of a model by `network_name`, dots as underscores, in each of its spellings.

    kohya names SDXL's UNet as CompVis does; CLIP's layers may have `text_model` before them.
    """
    names: dict[str, Layer] = {}
    for network in ADAPTED:
        module = getattr(model, network)
        if module is None:
            continue
        table = compvis.unet(module.config()) if network == "unet" else {}
        for key, leaf in naming.leaves(module).items():
            if leaf.path[-1] != "kernel":
                continue
            name = key.removesuffix(".weight")
            layer = Layer(network, leaf.path, leaf.shape)
            others = [compvis.rename(name, table), f"text_model.{name}"]
            for spelled in [name, *(other for other in others if other)]:
                names.setdefault(f"{network}.{spelled}".replace(".", "_"), layer)
    return names


def parted(key: str, path: Path) -> tuple[str, str]:
    """A key's layer as `spellings` names it, and its role: down, up or alpha."""
    roles = [role for role, pattern in ROLES.items() if pattern.search(key)]
    if not roles:
        kinds = {"hada_": "LoHa", "lokr_": "LoKr", "magnitude": "DoRA", "dora_scale": "DoRA"}
        kind = next((kind for part, kind in kinds.items() if part in key), None)
        what = f"is a {kind}" if kind else f"has the key {key!r}, which is no LoRA's"
        raise InputError(f"{path} {what}: only plain LoRA files can be read")
    name = ROLES[roles[0]].sub("", key)
    name = name.removeprefix("base_model.model.").replace(".processor.", ".")
    # diffusers named the halves after its attention once, in text encoders too.
    name = re.sub(r"self_attn\.to_(q|k|v|out)$", r"self_attn.\1_proj", name)
    name = re.sub(r"\bto_out$", "to_out.0", name).replace(".", "_")
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        if name.startswith(f"{prefix}_"):
            return PREFIXES[prefix] + name.removeprefix(prefix), roles[0]
    known = any(name.startswith(f"{network}_") for network in ADAPTED)
    return name if known else f"unet_{name}", roles[0]


def adapter_settings(tensors: Tensors) -> dict[str, Any]:
    """What peft's settings say, where diffusers wrote them into the header."""
    text = tensors.metadata.get("lora_adapter_metadata", "{}")
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{tensors.path}: lora_adapter_metadata is not a JSON object")
    for key, value in settings.items():
        if value and key.rpartition(".")[2] in ("use_dora", "lora_bias"):
            raise InputError(f"{tensors.path} was trained with {key}: only plain LoRA is read")
    return settings


def pair(
    name: str, layer: Layer, roles: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """One layer's {"a", "b"}, its scale multiplied into b."""
    first = next(iter(roles.values()))
    if "down" not in roles or "up" not in roles:
        lacks = "down" if "down" not in roles else "up"
        raise InputError(f"{first.path}: {name!r} has no {lacks} half: use a complete file")
    down, up = (_numbers(roles[role]) for role in ("down", "up"))
    out, fan_in, *space = layer.shape
    rank = down.shape[0]
    if down.size != rank * fan_in * int(np.prod(space)) or up.size != out * rank:
        raise InputError(
            f"{first.path}: {name!r} has shapes {list(down.shape)} and {list(up.shape)}, and the "
            f"model's weight {list(layer.shape)}: use the model that it was trained for"
        )
    scale = _scale(layer, rank, roles.get("alpha"), settings)
    a = naming.to_flax_axes("kernel", down.reshape(rank, fan_in, *space))
    return {"a": jnp.asarray(a), "b": jnp.asarray(scale * up.reshape(out, rank).T)}


def _scale(
    layer: Layer, rank: int, alpha: Tensor | None, settings: Mapping[str, Any]
) -> np.float32:
    """Alpha / rank, from the layer's own alpha, or from the settings, or 1."""
    if alpha is not None:
        return np.float32(_numbers(alpha).reshape(-1)[0] / rank)

    def setting(key: str) -> Any:
        """An adapter that was saved alone names no network."""
        return settings.get(f"{layer.network}.{key}", settings.get(key))

    value = setting("lora_alpha")
    if value is None:
        return np.float32(1)
    module = naming.torch_key(layer.path).removesuffix(".weight")
    patterns = setting("alpha_pattern") or {}
    own = [v for k, v in patterns.items() if f".{module}".endswith(f".{k.strip('^$')}")]
    value = own[0] if own else value
    return np.float32(value / (rank**0.5 if setting("use_rslora") else rank))


def _numbers(tensor: Tensor) -> np.ndarray:
    if tensor.dtype not in FLOATS:
        raise InputError(f"{tensor.path}: {tensor.name!r} is {tensor.dtype.name}, not a float")
    array = np.array(tensor.read(), np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{tensor.path}: {tensor.name!r} holds NaN or infinity: use another copy")
    return array


def _pairs(
    tree: Mapping[str, Any], at: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if is_pair(tree):
        yield at, tree
        return
    for name, node in tree.items():
        yield from _pairs(node, (*at, name))


def _torch_pair(node: Mapping[str, Any], scale: float) -> Iterator[tuple[str, np.ndarray]]:
    """The halves with torch's axes, float32: [rank, in, *space] and [out, rank, *ones]."""
    a, b = (np.asarray(node[half], np.float32) for half in ("a", "b"))
    yield "A", naming.to_torch_axes("kernel", a)
    yield "B", (np.float32(scale) * b).T.reshape(b.shape[1], b.shape[0], *(1,) * (a.ndim - 2))
