"""The types that everything flows through, and the decorator that makes a dataclass a pytree."""

import dataclasses
from collections.abc import Callable
from typing import (
    TYPE_CHECKING,
    Any,
    NamedTuple,
    Protocol,
    TypeVar,
    dataclass_transform,
    runtime_checkable,
)

import jax
import numpy as np
from jaxtyping import Float, Int

if TYPE_CHECKING:
    Array = jax.Array
else:
    Array = jax.Array | np.ndarray  # a public function takes numpy's too, and turns them into jax's

Latents = Float[Array, "b h w c"]
"""NHWC, float32, already scaled by the VAE's factor."""

Sigma = Float[Array, ""] | Float[Array, "b 1 1 1"]
"""Noise level, one for all or one an image: x = x0 + sigma * noise."""

Index = Int[Array, ""] | Int[Array, "b 1 1 1"]
"""Shaped like sigma: images may stand at different steps."""

Draw = int | Int[Array, ""]
"""Which draw of a step; traced where a sampler's own loop counts."""

Denoiser = Callable[[Latents, Sigma], Latents]
"""E[x0 | x] at noise level sigma; a `jax.tree_util.Partial` of a module-level function under jit.
"""

State = Any
"""A sampler's memory: a pytree whose leaves are [b, ...]."""


class Step(NamedTuple):
    """Where in the schedule one step stands."""

    index: Index  # type: ignore[assignment]  # 0, 1, ...; hides tuple.index
    left: Index  # steps left, this one included: 1 is the last
    sigma: Sigma  # > 0, also for images that are finished
    sigma_next: Sigma  # 0 on most last steps


@runtime_checkable
class Noise(Protocol):
    """Unit-variance noise for the step sigma -> sigma_next; a pytree, an argument under jit.

    `draw` counts the draws within one step.
    """

    def __call__(
        self, index: Index, sigma: Sigma, sigma_next: Sigma, draw: Draw = 0
    ) -> Latents: ...


@runtime_checkable
class StepNoise(Protocol):
    """What a sampler is handed: `Noise` with the step's index already bound."""

    def __call__(self, sigma: Sigma, sigma_next: Sigma, draw: Draw = 0) -> Latents: ...


@runtime_checkable
class Sampler(Protocol):
    """A pair of pure functions; a frozen dataclass under `pytree`.

    It may say more: `stochastic`, whether it draws (its eta is not 0, say); `brownian`, that its
    draws are of one path an image (`sampling.noise_of`); `plan(sigmas)`, what is run of a task's
    levels (`plan.fitted`); `planned`, the fields that belong to a plan.
    """

    def init(self, x: Latents) -> State: ...

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]: ...


T = TypeVar("T")


def static(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that is part of the program: an order, a name, a flag."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def pytree(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass and a pytree whose structure includes the class itself.

    Fields are leaves, unless declared by `static()`. `jax.tree_util.register_dataclass` will not
    do: in jax 0.10 two classes with equal fields get equal treedefs, and jit's cache then confuses
    them.

    Python numbers among the leaves stay as they are until `leaves32` turns them to float32 at the
    jit boundary, so that 1, 1.0 and float32(1) share one program.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [f.name for f in fields if not f.metadata.get("static")]
    fixed = [f.name for f in fields if f.metadata.get("static")]

    def flatten_with_keys(node: Any) -> tuple[list, tuple]:
        children = [(jax.tree_util.GetAttrKey(n), getattr(node, n)) for n in names]
        return children, (cls, tuple(getattr(node, n) for n in fixed))

    def flatten(node: Any) -> tuple[list, tuple]:
        return [getattr(node, n) for n in names], (cls, tuple(getattr(node, n) for n in fixed))

    def unflatten(aux: tuple, children: Any) -> Any:
        node = object.__new__(cls)
        for name, value in zip(fixed, aux[1], strict=True):
            object.__setattr__(node, name, value)
        for name, value in zip(names, children, strict=True):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def leaves32(tree: T) -> T:
    """The same tree with Python's and numpy's numbers, integers included, as float32.

    Call it before a jit boundary: otherwise 1, 1.0 and float32(1) compile three programs. Float64
    arrays become float32 too; arrays of other kinds stay.
    """

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, bool | int | float | np.integer | np.floating):
            return np.float32(leaf)
        if isinstance(leaf, np.ndarray) and leaf.dtype == np.float64:
            return leaf.astype(np.float32)
        return leaf

    return jax.tree.map(convert, tree)
