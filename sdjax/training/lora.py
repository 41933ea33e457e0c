"""LoRA: low-rank updates that are trained in place of a network's weights."""

import difflib
import functools
import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Key

from sdjax.checkpoints import naming
from sdjax.errors import InputError
from sdjax.model import Params
from sdjax.training.fresh import cut
from sdjax.types import Array

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""A UNet's attentions; a text encoder's are q_proj, k_proj, v_proj and out_proj."""


@dataclass(frozen=True)
class Lora:
    """Which layers get an update W + alpha/rank * a b, and of what rank.

    Hu et al. 2021 (arXiv 2106.09685), section 4.1. `alpha` None is the rank. `targets` are the
    ends of layers' names in diffusers' spelling, at a dot: "to_q", "attn2.to_k", "ff.net.0.proj",
    "proj_in", "conv1", "q_proj". Any layer with a kernel may be one: convolutions are
    updated by one of their own size after one of size 1, as in peft.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ATTENTION

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"a LoRA's rank must be at least 1, got {self.rank}: try 8")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"a LoRA's alpha must be above 0, got {self.alpha}: try its rank")
        if not self.targets:
            raise InputError("a LoRA has no targets: name layers, such as to_q")

    @property
    def scale(self) -> float:
        """What a b is multiplied by."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank


def check(lora: Lora, modules: dict[str, nn.Module]) -> None:
    """Hold the targets against the networks that are trained.

    InputError: a target that no network has, with the nearest names; a network that has none.
    """
    names = {name: list(layers(module)) for name, module in modules.items()}
    every = [layer for each in names.values() for layer in each]
    for target in lora.targets:
        if not any(_matches(layer, (target,)) for layer in every):
            parts = [layer.split(".") for layer in every]
            ends = {".".join(p[-n:]) for p in parts for n in (1, 2, 3, len(p))}
            near = difflib.get_close_matches(target, sorted(ends), 3, 0.5)
            instead = f"did you mean {' or '.join(near)}?" if near else "try to_q or q_proj"
            raise InputError(f"no layer's name ends in the LoRA target {target!r}: {instead}")
    for name, each in names.items():
        if not any(_matches(layer, lora.targets) for layer in each):
            usual = ", ".join(ATTENTION if name == "unet" else ("q_proj", "k_proj", "v_proj"))
            raise InputError(
                f"no layer of {name} is among the LoRA targets ({', '.join(lora.targets)}): add "
                f"some of its own, such as {usual}, or do not train it"
            )


@functools.partial(jax.jit, static_argnums=(0, 1))
def init(lora: Lora, module: nn.Module, key: Key[Array, ""]) -> Params:
    """Draw a network's updates: a uniform within 1/sqrt(fan-in), b zero, so that a b is 0.

    A tree nested as the network's params, with {"a", "b"}, float32, at each target.
    """
    found = [leaf for name, leaf in layers(module).items() if _matches(name, lora.targets)]
    kernels = [naming.to_flax_shape(leaf.path[-1], leaf.shape) for leaf in found]
    values = cut(jax.random.uniform, key, [(*shape[:-1], lora.rank) for shape in kernels])
    tree: dict[str, Any] = {}
    for leaf, shape, value in zip(found, kernels, values, strict=True):
        node = functools.reduce(lambda t, part: t.setdefault(part, {}), leaf.path[:-1], tree)
        node["a"] = (2 * value - 1) / math.prod(shape[:-1]) ** 0.5
        node["b"] = jnp.zeros((lora.rank, shape[-1]))
    return tree


def layers(module: nn.Module) -> dict[str, naming.Leaf]:
    """Every layer with a kernel by its torch name."""
    return {
        key.removesuffix(".weight"): leaf
        for key, leaf in naming.leaves(module).items()
        if leaf.path[-1] == "kernel"
    }


def _matches(layer: str, targets: tuple[str, ...]) -> bool:
    return any(layer == target or layer.endswith(f".{target}") for target in targets)
