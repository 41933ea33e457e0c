"""One step of training: gradients, the optimiser, the moving average."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int, Key

from sdjax.model import Params
from sdjax.training.optimizer import DISCRIMINATOR
from sdjax.training.stage import Batch, Gradients, Stage
from sdjax.types import Array


class State(NamedTuple):
    """All that training carries from step to step, but for its place in the data."""

    step: Int[Array, ""]
    """Steps done."""
    params: Params
    extra: Any
    average: Params
    """The moving average of the params: empty where there is none, never of a discriminator."""
    optimizer: Any
    key: Key[Array, ""]
    """The run's own: a step's keys are folded from it."""


def start(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    averaged: bool,
    params: Params | None = None,
) -> State:
    """The state before the first step; `params` instead of freshly drawn ones, to fine-tune."""
    if params is None:
        params, _ = stage.init(jax.random.fold_in(key, 0))
    return State(
        step=jnp.int32(0),
        params=params,
        extra=stage.first_extra(params),
        average=jax.tree.map(jnp.copy, _averaged(params)) if averaged else {},
        optimizer=optimizer.init(params),
        key=jax.random.fold_in(key, 1),
    )


def stepper(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    decay: float = 0.0,
    warmup: bool = True,
) -> Callable[[State, Params, Batch], tuple[State, dict[str, Float[Array, ""]]]]:
    """`(state, frozen, batch) -> (state, metrics)`, to be jitted.

    A batch of b images is taken in `accumulate` parts of b / accumulate; their mean is the
    gradient, the same but for rounding. The moving average keeps `decay` of itself at each step,
    with `warmup` at most (1 + n) / (10 + n) after n steps, so that it forgets the start.
    """

    def step(state: State, frozen: Params, batch: Batch) -> tuple[State, dict[str, Any]]:
        size = jax.tree.leaves(batch)[0].shape[0]
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), size)
        grads, extra, metrics = _accumulated(stage, accumulate, state, frozen, batch, keys)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        done = state.step + 1
        keep = jnp.minimum(decay, (1.0 + done) / (10.0 + done)) if warmup else jnp.float32(decay)
        average = optax.incremental_update(
            {name: params[name] for name in state.average}, state.average, 1 - keep
        )
        metrics = {k: v.astype(jnp.float32) for k, v in metrics.items()}
        for name, tree in grads.items():
            metrics[f"grad_norm/{name}"] = optax.tree.norm(tree)
        return State(done, params, extra, average, moments, state.key), metrics

    return step


def _accumulated(
    stage: Stage, parts: int, state: State, frozen: Params, batch: Batch, keys: Key[Array, " b"]
) -> Gradients:
    if parts == 1:
        return stage.gradients(state.params, state.extra, frozen, batch, keys, state.step)
    # Every parts-th image: where the batch lies on many devices, each part lies on all of them.
    split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), (batch, keys))

    def part(total: Any, one: Any) -> tuple[Any, None]:
        sums, extra = total
        grads, extra, metrics = stage.gradients(
            state.params, extra, frozen, one[0], one[1], state.step
        )
        return (jax.tree.map(jnp.add, sums, (grads, metrics)), extra), None

    one, one_key = jax.tree.map(lambda a: a[0], split)
    shapes = jax.eval_shape(
        stage.gradients, state.params, state.extra, frozen, one, one_key, state.step
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes.grads, shapes.metrics))
    (sums, extra), _ = jax.lax.scan(part, (zeros, state.extra), split)
    grads, metrics = jax.tree.map(lambda a: a / parts, sums)
    return Gradients(grads, extra, metrics)


def _averaged(params: Params) -> Params:
    return {name: tree for name, tree in params.items() if name != DISCRIMINATOR}
