"""The optimiser: warm-up, a constant or cosine rate, clipping, AdamW."""

from typing import Any

import jax
import optax

from sdjax.training.settings import Optimizer

DISCRIMINATOR = "discriminator"
"""The network that plays against the others: a rate, a norm and moments of its own."""


def build(settings: Optimizer, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) for a run of `steps`.

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
    """The learning rate by step: linear from 0 to `peak`, then flat, or down half a cosine."""
    if settings.schedule == "cosine":
        fall = max(1, steps - settings.warmup)
        after = optax.cosine_decay_schedule(peak, fall, alpha=settings.final)
    else:
        after = optax.constant_schedule(peak)
    if not settings.warmup:
        return after
    # The first step already moves: peak / warmup, not 0.
    rise = optax.linear_schedule(peak / settings.warmup, peak, settings.warmup - 1)
    return optax.join_schedules([rise, after], [settings.warmup])


def _chain(settings: Optimizer, peak: float, steps: int) -> optax.GradientTransformation:
    clip = [optax.clip_by_global_norm(settings.clip)] if settings.clip else []
    adamw = optax.adamw(
        rate(settings, peak, steps),
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    return optax.chain(*clip, adamw)
