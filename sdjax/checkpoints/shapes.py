"""The shapes of a network's parameters, found by tracing each kind of block once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdjax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from sdjax.models.lpips import LPIPS
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL
from sdjax.models.vq import VQModel

REPEATED = ("__call__", "project_context", "project")
"""The methods that make parameters."""


def params(module: nn.Module) -> Any:
    """The tree of a module's parameters as `jax.ShapeDtypeStruct`s; nothing is computed."""

    def declared() -> Any:
        with nn.intercept_methods(functools.partial(_once, {})):
            return init(module, jax.random.key(0))

    return jax.eval_shape(declared)


def init(module: Any, key: jax.Array) -> Any:
    """A module's parameters from the smallest inputs that reach all of them."""
    if isinstance(module, CLIPTextModel | CLIPTextModelWithProjection):
        return module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
    if isinstance(module, LPIPS):
        return module.init(key, *[jnp.zeros((1, 16, 16, 3))] * 2)["params"]
    # A pixel that stays one on the way down leaves fewer kinds of blocks to trace.
    padded = isinstance(module, UNet) and module.downsample_padding > 0
    side = 1 if padded else 2 ** (len(module.block_out_channels) - 1)
    x = jnp.zeros((1, side, side, module.in_channels))
    if isinstance(module, AutoencoderKL):
        return module.init(key, x, method=_autoencode)["params"]
    if isinstance(module, VQModel):
        return module.init(key, x)["params"]
    context = jnp.zeros((1, 1, module.cross_attention_dim))
    more: dict[str, Any] = {}
    if module.addition_embed_type == "text_time":
        # Only the sum of the text's and the sizes' widths shows in a shape.
        ids = 5
        width = module.projection_class_embeddings_input_dim - ids * module.addition_time_embed_dim
        more["added_text"] = jnp.zeros((1, width))
        more["added_time_ids"] = jnp.zeros((1, ids))
    if module.num_class_embeds is not None:
        more["class_labels"] = jnp.zeros((1,), jnp.int32)
    return module.init(key, x, jnp.zeros((1,), jnp.int32), context, **more)["params"]


def _autoencode(vae: Any, x: jax.Array) -> Any:
    """Both halves of an autoencoder."""
    mean, _ = vae.encode(x)
    return vae.decode(mean)


def _once(
    seen: dict[Any, tuple[Any, dict[str, Any]]],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Call a method once for each set of hyper-parameters and shapes; later, repeat what it made.

    SDXL's 70 transformer blocks are of two kinds. Only shapes leave here, so that one block's
    output and parameters can stand for another's.
    """
    block = context.module
    if context.method_name not in REPEATED or block.scope is None:
        return call(*args, **kwargs)
    leaves, structure = jax.tree.flatten((args, kwargs))
    inputs = tuple((x.shape, x.dtype) if isinstance(x, jax.Array) else x for x in leaves)
    fields = [f.name for f in dataclasses.fields(block) if f.name not in ("parent", "name")]
    own = tuple(getattr(block, name) for name in fields)
    kind = (type(block), own, context.method_name, structure, inputs)
    if kind not in seen:
        # Drawing the initial values would take as long as all the rest.
        object.__setattr__(block, "param", functools.partial(_declare, block))
        before = _copy(block.variables.get("params", {}))
        output = call(*args, **kwargs)
        seen[kind] = output, _less(dict(block.variables.get("params", {})), before)
        return output
    output, made = seen[kind]
    for name, value in made.items():
        there = block.scope.get_variable("params", name)
        if isinstance(there, dict):
            _join(there, value)
        else:
            block.scope.put_variable("params", name, _copy(value))
    return output


def _declare(block: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> jax.Array:
    """`Module.param` with zeros for the initial values, which only a shape is wanted of."""
    assert block.scope is not None
    value = jnp.zeros(shape)
    block.scope.put_variable("params", name, value)
    return value


def _copy(tree: Any) -> Any:
    """Fresh dicts around the same leaves."""
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _less(tree: dict[str, Any], known: Any) -> dict[str, Any]:
    """What `tree` has and `known` lacks."""
    left = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            value = _less(value, known.get(name, {}))
        elif name in known:
            continue
        if not isinstance(value, dict) or value:
            left[name] = value
    return left


def _join(tree: dict[str, Any], more: dict[str, Any]) -> None:
    """Put into `tree` what `more` has."""
    for name, value in more.items():
        if isinstance(value, dict):
            _join(tree.setdefault(name, {}), value)
        else:
            tree[name] = value
