"""Where the steps stand: noise levels or timesteps, float64 numpy, falling.

Names are ComfyUI's, A1111's, k-diffusion's and diffusers'; where these differ under one name, the
docstring says whose is here, and how to have the other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion.schedules import Schedule
from sdjax.errors import InputError

Levels = np.ndarray
"""Float64 [n] or [n+1], falling."""
Number = float | jax.Array

AYS = {
    "sd1": (14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177)
    + (1.3943805092, 0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),
    "sdxl": (14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945)
    + (0.8620721141, 0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""The noise levels of Align Your Steps for ten steps, of its models."""


def karras(
    n: int, sigma_min: Number, sigma_max: Number, rho: Number = 7.0, final: Number = 0.0
) -> Any:
    """Sigmas [n+1] even in sigma^(1/rho), then `final`: Karras et al. (2206.00364), eq. 5.

    Numbers that jax traces give jax's arrays: `vmap` and gradients over `rho`, say.
    """
    _check(n)
    ramp = np.linspace(0, 1, n)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _then((high + ramp * (low - high)) ** rho, final)


def exponential(n: int, sigma_min: float, sigma_max: float, final: float = 0.0) -> Levels:
    """Sigmas [n+1] evenly spaced in log sigma, then `final`: what DPM-Solver calls uniform in
    lambda (2206.00927).
    """
    _check(n)
    return np.append(np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), n)), final)


def polyexponential(
    n: int, sigma_min: Number, sigma_max: Number, rho: Number = 1.0, final: Number = 0.0
) -> Any:
    """Sigmas [n+1] even in (log sigma)^(1/rho), scaled to its range, then `final`: k-diffusion's.

    `rho` 1 is `exponential`; above 1 the low levels are closer together.
    """
    _check(n)
    ramp = np.linspace(1, 0, n) ** rho
    return _then(sigma_min * (sigma_max / sigma_min) ** ramp, final)


def lu(n: int, sigma_min: float, sigma_max: float, final: float = 0.0) -> Levels:
    """Sigmas [n+1] uniform in the logarithm of the signal-to-noise ratio, then `final`.

    Lu et al. (2206.00927); diffusers' `use_lu_lambdas`. As log SNR = -2 log sigma, it
    is `exponential` under another name.
    """
    return exponential(n, sigma_min, sigma_max, final)


def vp(
    n: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    epsilon: float = 1e-3,
    final: float = 0.0,
) -> Levels:
    """Sigmas [n+1] of the continuous variance-preserving process at even times, then `final`.

    Song et al. (2011.13456), as Karras et al. (2206.00364), table 1, have it. It has its own range,
    from sigma 152 for a time of 1 down to 0.01 for `epsilon`, whatever the model's.
    """
    _check(n)
    t = np.linspace(1, epsilon, n)
    return np.append(np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t)), final)


def kl_optimal(n: int, sigma_min: float, sigma_max: float, final: float = 0.0) -> Levels:
    """Sigmas [n+1] even in arctan(sigma), then `final`: Sabour et al. (2404.14507),
    optimal for Gaussian data.

    ComfyUI's. A1111 stops at sigma_min instead: `kl_optimal(n + 1, ...)[:-1]`.
    """
    _check(n)
    return np.append(np.tan(np.linspace(np.arctan(sigma_max), np.arctan(sigma_min), n)), final)


def linear_quadratic(
    n: int, sigma_max: float, threshold: float = 0.025, linear_steps: int | None = None
) -> Levels:
    """Sigmas [n+1] to 0: down by `threshold` in even steps, then quadratically with equal slope.

    Genmo's Mochi 1, as ComfyUI scales it, with half of the steps linear. Made for flow matching:
    with sigma_max 14.6 it hardly comes near the low levels.
    """
    _check(n)
    if n == 1:
        return np.array([sigma_max, 0.0])
    first = n // 2 if linear_steps is None else linear_steps
    if not 1 <= first < n:
        raise InputError(f"linear_steps must be 1 to {n - 1}, got {first}")
    rest = n - first
    i = np.arange(first, n)
    gap = first - threshold * n
    curve = gap / (first * rest**2)
    slope = threshold / first - 2 * gap / rest**2
    fall = np.concatenate(
        [np.arange(first) * threshold / first, curve * i**2 + slope * i + curve * first**2, [1.0]]
    )
    return (1 - fall) * sigma_max


def align_your_steps(n: int, model: str = "sd1", append: bool = False) -> Levels:
    """Sigmas [n+1] to 0, optimised for a model: Sabour et al. (2404.14507), its published tables,
    and between them interpolation in log sigma.

    `model` is "sd1", "sdxl" or "svd". ComfyUI and diffusers put 0 in the place of the last of n + 1
    levels; A1111 appends it to n (`append`), and so also steps on the lowest level.
    """
    _check(n)
    if model not in AYS:
        raise InputError(f"model must be one of {', '.join(AYS)}, got {model!r:.60}")
    table = np.asarray(AYS[model])
    points = n if append else n + 1
    at = np.linspace(0, 1, points)  # from the low end, as the paper's own code
    sigmas = np.exp(np.interp(at, np.linspace(0, 1, len(table)), np.log(table[::-1])))[::-1]
    return np.append(sigmas, 0.0) if append else np.append(sigmas[:-1], 0.0)


def beta_sigmas(
    n: int,
    sigma_min: float,
    sigma_max: float,
    alpha: float = 0.6,
    beta: float = 0.6,
    final: float = 0.0,
) -> Levels:
    """Sigmas [n+1] at even quantiles of a beta distribution over sigma itself, then `final`.

    What diffusers (`use_beta_sigmas`) and A1111 call beta. `beta` is ComfyUI's, over timesteps, and
    nearer to the paper.
    """
    _check(n)
    part = _beta_quantile(1 - np.linspace(0, 1, n), alpha, beta)
    return np.append(sigma_min + part * (sigma_max - sigma_min), final)


def beta(n: int, timesteps: int = 1000, alpha: float = 0.6, beta: float = 0.6) -> Levels:
    """Timesteps [n] at even quantiles of a beta distribution: Lee et al. (2407.12173), ComfyUI's.

    Fewer than n where several round to one timestep: of 1000, from 139 steps on.
    """
    _check(n)
    quantiles = _beta_quantile(1 - np.linspace(0, 1, n, endpoint=False), alpha, beta)
    t = np.rint(quantiles * (timesteps - 1))
    return t[np.append(True, np.diff(t) != 0)]


def simple(n: int, timesteps: int = 1000) -> Levels:
    """Timesteps [n] down from the last in strides of timesteps / n, truncated: ComfyUI's simple."""
    _check(n)
    if n > timesteps:
        raise InputError(f"simple spacing has at most {timesteps} steps, got {n}: take fewer steps")
    return timesteps - 1.0 - (np.arange(n) * (timesteps / n)).astype(int)


def normal(n: int, timesteps: int = 1000) -> Levels:
    """Timesteps [n], fractions too, evenly from the last to 0: ComfyUI's normal, A1111's uniform,
    k-diffusion's `get_sigmas`.

    `linspace` but for two things: sigmas between timesteps are by their logarithm
    (`Schedule.sigma(t, log=True)`), and one step stands at the last timestep.
    """
    _check(n)
    return np.linspace(timesteps - 1, 0, n)


def sgm_uniform(n: int, timesteps: int = 1000) -> Levels:
    """Timesteps [n], fractions too, evenly from the last towards 0, which is left out: ComfyUI's,
    Stability's generative-models'.

    Nearly `trailing`, which rounds and counts from `timesteps` itself: (999, 749.25) against
    (999, 749).
    """
    _check(n)
    return np.linspace(timesteps - 1, 0, n + 1)[:-1]


def ddim_uniform(n: int, timesteps: int = 1000) -> Levels:
    """Timesteps 1, 1 + c, 1 + 2 c, ... with c = timesteps // n, falling: ComfyUI's, and CompVis's
    uniform.

    More than n where n does not divide `timesteps`: 30 steps are 31.
    """
    _check(n)
    return np.arange(1.0, timesteps, max(timesteps // n, 1))[::-1].copy()


def quad(n: int, timesteps: int = 1000) -> Levels:
    """Timesteps even in their square root up to 0.8 of all, plus 1, falling: Song et al.
    (2010.02502), appendix D.2, CompVis's quad.

    Fewer than n where several round to one timestep: of 1000, from 30 steps on.
    """
    _check(n)
    t = (np.linspace(0, np.sqrt(timesteps * 0.8), n) ** 2).astype(int) + 1.0
    return np.unique(t)[::-1].copy()


def leading(n: int, timesteps: int = 1000, offset: int = 0) -> Levels:
    """Timesteps [n]: multiples of timesteps // n, plus `offset`. Lin et al. (2305.08891), table 2.

    Never the last training timestep: SD 1's choice (`offset` 1), and why its start is not pure
    noise.
    """
    _check(n)
    if n > timesteps:
        raise InputError(
            f"leading spacing has at most {timesteps} steps, got {n}: take fewer steps"
        )
    return (np.arange(n)[::-1] * (timesteps // n)).astype(np.float64) + offset


def trailing(n: int, timesteps: int = 1000, start: int | None = None) -> Levels:
    """Timesteps [n] counted down from the last by timesteps / n, rounded. Lin et al. (2305.08891),
    table 2.

    `start` is one past the first timestep, `timesteps` unless a solver clips its range. For some n
    (61, 103, ...) `np.arange` gives diffusers an entry too many, at timestep -1; it is left out
    here.
    """
    _check(n)
    if n > timesteps:
        raise InputError(
            f"trailing spacing has at most {timesteps} steps, got {n}: take fewer steps"
        )
    t = np.round(np.arange(timesteps if start is None else start, 0, -timesteps / n)) - 1
    return t[:n][t[:n] >= 0]


def linspace(n: int, timesteps: int = 1000, rounded: bool = False) -> Levels:
    """Timesteps [n] from the last to 0, both included. Lin et al. (2305.08891), table 2.

    One step stands at timestep 0, which is hardly noise at all: numpy's linspace, kept as diffusers
    has it.
    """
    _check(n)
    t = np.linspace(0, timesteps - 1, n)[::-1].copy()
    return np.round(t) if rounded else t


_LEVELS: dict[str, Callable[[int, float, float], Levels]] = {
    "karras": karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "lu": lu,
    "kl_optimal": kl_optimal,
    "beta_sigmas": beta_sigmas,
    "vp": lambda n, low, high: vp(n),
    "linear_quadratic": lambda n, low, high: linear_quadratic(n, high),
    "align_your_steps": lambda n, low, high: align_your_steps(n, "sd1"),
    "align_your_steps_sdxl": lambda n, low, high: align_your_steps(n, "sdxl"),
}
_TIMESTEPS: dict[str, Callable[[int, int], Levels]] = {
    "leading": lambda n, total: leading(n, total, 1 if n < total else 0),
    "trailing": trailing,
    "linspace": linspace,
    "simple": simple,
    "normal": normal,
    "sgm_uniform": sgm_uniform,
    "ddim_uniform": ddim_uniform,
    "quad": quad,
    "beta": beta,
}
_LOGARITHMIC = ("normal", "sgm_uniform")
"""Between timesteps by log sigma, as ComfyUI has it; linspace is by sigma, as diffusers has it."""

NAMES = (*_LEVELS, *_TIMESTEPS)


def named(name: str, n: int, schedule: Schedule) -> tuple[Levels, Levels | None]:
    """A spacing for a model's training schedule: sigmas down to 0, and their timesteps where the
    spacing is one of timesteps.

    leading has an offset of 1, as Stable Diffusion has it. Sigmas are [n+1], but for the spacings
    whose docstring says otherwise.
    """
    if name in _LEVELS:
        return _LEVELS[name](n, schedule.sigma_min, schedule.sigma_max), None
    if name not in _TIMESTEPS:
        raise InputError(f"spacing must be one of {', '.join(NAMES)}, got {name!r:.60}")
    t = _TIMESTEPS[name](n, schedule.timesteps)
    return np.append(schedule.sigma(t, log=name in _LOGARITHMIC), 0.0), t


def pad(rows: Sequence[np.ndarray], length: int | None = None) -> np.ndarray:
    """Schedules of unequal length, one an image, as one array [n+1, b, 1, 1, 1].

    A row ends by repeating its last value: `sample` takes a step that does not change sigma as the
    image's end.
    """
    if len(rows) == 0:
        raise InputError("pad needs at least one schedule, got none")
    longest = max(len(row) for row in rows)
    length = longest if length is None else length
    if length < longest:
        raise InputError(f"cannot pad schedules of {longest} values to {length}")
    columns = [
        np.concatenate([row, np.repeat(row[-1:], length - len(row))])
        for row in map(np.asarray, rows)
    ]
    return np.stack(columns, 1).reshape(length, len(rows), 1, 1, 1)


def _beta_quantile(share: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    from scipy.special import betaincinv  # slow to import, and rarely wanted

    return np.asarray(betaincinv(alpha, beta, share))


def _then(above: Any, final: Any) -> Any:
    """The last level after the others, in jax where a number is traced: `vmap` over rho."""
    traced = not isinstance(above, np.ndarray)
    return jnp.append(above, final) if traced else np.append(above, final)


def _check(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise InputError(f"steps must be a whole number of at least 1, got {n!r}")
