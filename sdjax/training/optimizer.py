"""The optimiser: warm-up, a constant or cosine rate, clipping, AdamW or Muon."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from sdjax.training.settings import Optimizer

OUTERMOST = ("conv_in", "conv_out", "embedding")
"""Convolutions between a network and what it is not, and tables: their steps are AdamW's."""

RMS = 0.2
"""Of an orthogonal step, in learning rates: about that of AdamW's (2502.16982, section 2.2)."""

DISCRIMINATOR = "discriminator"
"""The network that plays against the others: a rate, a norm and moments of its own."""


def build(settings: Optimizer, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), or Muon (Jordan et al. 2024, with the
    scale of Liu et al. 2025, arXiv 2502.16982), for a run of `steps`.

    Gradients are clipped by the global norm of a group: the discriminator is one, all else the
    other. Weight decay acts on every parameter, as in torch.
    """
    own = settings.discriminator_learning_rate or settings.learning_rate
    chains = {
        "main": _chain(settings, settings.learning_rate, steps),
        DISCRIMINATOR: _chain(settings, own, steps),
    }
    return optax.partition(chains, groups)


def groups(params: dict[str, Any]) -> Any:
    """The group of every leaf, by the name of its network."""
    return {
        name: jax.tree.map(lambda _, n=name: DISCRIMINATOR if n == DISCRIMINATOR else "main", tree)
        for name, tree in params.items()
    }


def rate(settings: Optimizer, peak: float, steps: int) -> optax.Schedule:
    """The learning rate by step: in a line from `peak` / warmup to `peak`, then flat, or down half
    a cosine.
    """
    if settings.schedule == "cosine":
        fall = max(1, steps - settings.warmup)
        after = optax.cosine_decay_schedule(peak, fall, alpha=settings.final)
    else:
        after = optax.constant_schedule(peak)
    if not settings.warmup:
        return after
    # The first step already moves.
    rise = optax.linear_schedule(peak / settings.warmup, peak, settings.warmup - 1)
    return optax.join_schedules([rise, after], [settings.warmup])


def _chain(settings: Optimizer, peak: float, steps: int) -> optax.GradientTransformation:
    clip = [optax.clip_by_global_norm(settings.clip)] if settings.clip else []
    falling = rate(settings, peak, steps)
    adamw = optax.adamw(
        falling,
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    if settings.name == "adamw":
        return optax.chain(*clip, adamw)
    orthogonal = muon(
        falling,
        weight_decay=settings.weight_decay,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=RMS,
    )
    return optax.chain(*clip, optax.partition({"muon": orthogonal, "adamw": adamw}, _steps))


def _steps(params: Any) -> Any:
    """Whose step every leaf takes."""
    of = matrices(params)
    return jax.tree.map(lambda _, axes: "adamw" if axes is None else "muon", params, of)


def matrices(params: Any) -> Any:
    """How a hidden kernel is a matrix: its last axis by all others. None for every other leaf."""

    def found(path: Any, leaf: jax.Array) -> MuonDimensionNumbers | None:
        names = [getattr(key, "key", None) for key in path]
        if leaf.ndim < 2 or any(name in OUTERMOST for name in names):
            return None
        last = leaf.ndim - 1
        return MuonDimensionNumbers(tuple(range(last)), (last,))

    return jax.tree_util.tree_map_with_path(found, params)
