"""Guidance as a task takes it: functions (denoise, guidance_scale) -> Denoiser, some by name.

`text_to_image(guidance=)` hands them a `Sides`. A method may be a module-level function, a
`jax.tree_util.Partial` of one (`Partial(projection.apg, norm=10.0)`), or any callable pytree.
Numbers among its arguments are leaves, so that new ones never recompile, and may be one an image,
[b, 1, 1, 1]; names, flags and functions belong to the program. Five attributes of a pytree's class
are optional:

- `limits`: the least and the greatest scale.
- `advised_scale`: the scale where none is given, instead of what the model's makers advise.
- `sides`: how many estimates an image it needs of the network: 2, the negative and the prompt, or
  3, the empty prompt before them.
- `suited(sampler)`: the method for this sampler, as `CFGPlusPlus` takes its eta from it.
- `around(sampler)`: the sampler that keeps its memory from step to step, as `Momentum` does. It has
  the image's own noise too.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from sdjax.diffusion.guidance import PerStep, cfg, cfg_plus_plus, interval
from sdjax.diffusion.projection import Momentum, apg, perp_neg, rescale, tangential, zero_star
from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, Sampler, Sigma, pytree, static

Method = Callable[[Any, Any], Denoiser]


@pytree
class Sides:
    """A network asked for all sides of each image at once, as `cfg` takes it; and what else methods
    use.

    `every` is the denoiser of `sides` times the batch, negatives first, prompts last; `plain` the
    prompts' own, of the batch; `sigmas` the levels of the run, [n+1] or [n+1, b, 1, 1, 1].
    """

    every: Any
    plain: Any
    sigmas: Any

    def __call__(self, x: Latents, sigma: Sigma) -> Latents:
        return self.every(x, sigma)


def limited(
    denoise: Sides,
    guidance_scale: ArrayLike,
    low: ArrayLike = 0.28,
    high: ArrayLike = 5.42,
    method: Method = cfg,
) -> Denoiser:
    """Another method where low < sigma <= high, elsewhere the prompt alone, at half the cost.
    Kynkaanniemi et al. (2404.07724), whose bounds for SDXL these are.
    """
    return interval(method(denoise, guidance_scale), denoise.plain, low, high)


def scheduled(denoise: Sides, guidance_scale: ArrayLike, weights: ArrayLike) -> Denoiser:
    """`cfg` with a scale of each step's own, 1 + weight (guidance_scale - 1). Wang et al.
    (2404.13040), whose omega is guidance_scale - 1.

    `weights` [n] are the steps' in turn, the last one's for all that follow; or [n, b, 1, 1, 1].
    Steps of weight 0 cost one evaluation.
    """
    table = jnp.asarray(weights)
    table = table.reshape(-1, 1, 1, 1, 1) if table.ndim == 1 else table
    scales = 1 + table * (jnp.asarray(guidance_scale) - 1)
    return cfg(denoise, PerStep(denoise.sigmas, scales), denoise.plain)


@pytree
class CFGPlusPlus:
    """`guidance.cfg_plus_plus` on the levels of the run: the scale is from 0 to 1.

    The authors' 0.6 stands where they take 7.5 without it.
    `eta` None is the sampler's own, if it has one: where ancestral samplers land before they add
    noise. A sampler with a CFG++ form of its own (`plus_plus`) takes that, ComfyUI's
    `res_multistep_cfg_pp` and its like.
    """

    eta: ArrayLike | None = None
    stepped: bool = static(default=False)  # the sampler does it
    limits: ClassVar[tuple[float, float]] = (0.0, 1.0)
    advised_scale: ClassVar[float] = 0.6

    def __call__(self, denoise: Sides, guidance_scale: ArrayLike) -> Denoiser:
        if self.stepped:
            return cfg(denoise, guidance_scale)
        eta = 0.0 if self.eta is None else self.eta
        return cfg_plus_plus(denoise, guidance_scale, denoise.sigmas, eta=eta)

    def suited(self, sampler: Sampler) -> "CFGPlusPlus":
        """The same, for this sampler."""
        if hasattr(sampler, "plus_plus"):
            return CFGPlusPlus(self.eta, stepped=True)
        return CFGPlusPlus(getattr(sampler, "eta", 0.0)) if self.eta is None else self

    def around(self, sampler: Sampler) -> Sampler:
        """The sampler, in its CFG++ form if it has one."""
        if hasattr(sampler, "plus_plus"):
            return dataclasses.replace(sampler, plus_plus=True)  # type: ignore[type-var]
        return sampler


@pytree
class AdaptiveProjected:
    """`apg` with its momentum. Sadat et al. (2410.02416), algorithm 1; the numbers are SDXL's in
    table 10.
    """

    eta: ArrayLike = 0.0
    norm: ArrayLike = 15.0
    momentum: ArrayLike = -0.5
    prediction: str = static(default="sample")

    def __call__(self, denoise: Denoiser, guidance_scale: ArrayLike) -> Denoiser:
        return apg(denoise, guidance_scale, self.eta, self.norm, self.prediction)

    def around(self, sampler: Sampler) -> Sampler:
        """The sampler, with the average of the differences."""
        if hasattr(sampler, "unrolled"):
            sampler = dataclasses.replace(sampler, unrolled=True)  # type: ignore[type-var]
        return Momentum(sampler, self.momentum)


@pytree
class Perpendicular:
    """`perp_neg` of the empty prompt, the negative and the prompt: three evaluations a step."""

    negative_weight: ArrayLike = 1.0
    sides: ClassVar[int] = 3

    def __call__(self, denoise: Denoiser, guidance_scale: ArrayLike) -> Denoiser:
        return perp_neg(denoise, guidance_scale, self.negative_weight)


METHODS: dict[str, Any] = {
    "cfg": cfg,
    "rescale": rescale,
    "apg": AdaptiveProjected(),
    "cfg_zero": zero_star,
    "tcfg": tangential,
    "cfg_plus_plus": CFGPlusPlus(),
    "interval": limited,
    "perp_neg": Perpendicular(),
}
"""Names for a command line, with their papers' numbers, but that CFG-Zero* never stands still: that
is for flows."""

_PREDICTED = ("rescale", "cfg_zero", "tcfg")
"""Those that take what the network predicts, as diffusers does."""


@pytree
class _Fixed:
    """A leaf that is part of the program."""

    value: Any = static()


def prepared(method: Any, prediction: str = "epsilon") -> Any:
    """A method as an argument of programs: its leaves are numbers (`restored` undoes the rest).

    None is cfg. A name stands for the method in `METHODS` on the network's own `prediction`.

    Raises:
        InputError: an unknown name, or what is no function of a denoiser and a scale.
    """
    if isinstance(method, str) and method not in METHODS:
        raise InputError(f"guidance must be one of {', '.join(METHODS)}, got {method!r:.60}")
    if isinstance(method, str):
        predicted = {"prediction": prediction} if method in _PREDICTED else {}
        method = Partial(METHODS[method], **predicted) if predicted else METHODS[method]
    method = cfg if method is None else method
    if not _takes_two(method):
        raise InputError(
            f"guidance must be one of {', '.join(METHODS)}, or a function (denoise, "
            f"guidance_scale) -> denoise, got {method!r:.60}"
        )
    if isinstance(method, functools.partial) and not isinstance(method, Partial):
        method = Partial(method.func, *method.args, **method.keywords)
    if jax.tree_util.all_leaves([method]):
        method = Partial(method)
    return jax.tree.map(_leaf, method)


def restored(method: Any) -> Any:
    """A `prepared` method, to be called."""

    def fixed(node: Any) -> bool:
        return isinstance(node, _Fixed)

    return jax.tree.map(lambda n: n.value if fixed(n) else n, method, is_leaf=fixed)


def is_cfg(method: Any) -> bool:
    """Whether a `prepared` method is no more than classifier-free guidance."""
    return isinstance(method, Partial) and method.func is cfg


def _takes_two(method: Any) -> bool:
    if not callable(method) or isinstance(method, type):
        return False
    try:
        inspect.signature(method).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # a signature that nobody knows
        return True
    return True


def _leaf(value: Any) -> Any:
    numbers = int | float | np.number | np.ndarray | jax.Array
    if isinstance(value, numbers) and not isinstance(value, bool):
        return value
    try:
        hash(value)
    except TypeError:
        raise InputError(
            f"guidance holds {value!r:.60}, which is neither a number nor hashable"
        ) from None
    return _Fixed(value)
