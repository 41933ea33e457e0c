"""What the families share: tables of noise levels, timesteps, and checked keys."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.diffusion import spacings
from sdjax.diffusion.plan import Threshold
from sdjax.diffusion.schedules import Schedule, alphas_cumprod, read
from sdjax.errors import InputError

MEND = "mend the scheduler config"
Levels = np.ndarray
"""Float64 [n] or [n+1]."""


def spacing_of(config: Mapping[str, Any], default: str) -> str:
    """Its timestep_spacing."""
    return read(config, "timestep_spacing", str, default, ("leading", "trailing", "linspace"))


def timesteps(spacing: str, n: int, total: int, offset: int, rounded: bool = False) -> Levels:
    """Timesteps [n] by the spacing's name."""
    if spacing == "leading":
        return spacings.leading(n, total, offset)
    if spacing == "trailing":
        return spacings.trailing(n, total)
    return spacings.linspace(n, total, rounded)


def discrete(config: Mapping[str, Any], n: int, schedule: Schedule) -> Levels:
    """Whole timesteps [n] of DDIM, DDPM and PNDM."""
    offset = read(config, "steps_offset", int, 0)
    t = timesteps(spacing_of(config, "leading"), n, schedule.timesteps, offset, rounded=True)
    within(t, schedule)
    return t


def within(t: np.ndarray, schedule: Schedule) -> None:
    """Refuse timesteps that the model was not trained on."""
    if t.min() < 0 or t.max() >= schedule.timesteps:
        raise InputError(
            f"timestep {t.max():.0f} lies outside 0 .. {schedule.timesteps - 1}: take fewer "
            "steps or a smaller steps_offset"
        )


def respacing(config: Mapping[str, Any], lu: bool = False) -> str | None:
    """Which other sigmas the config asks for: karras, lu, exponential, beta, or none."""
    if read(config, "use_flow_sigmas", bool, False):
        raise InputError(
            "use_flow_sigmas is for flow-matching models: take a scheduler for a diffusion model"
        )
    asked = [
        name
        for name in ("karras", "exponential", "beta")
        if read(config, f"use_{name}_sigmas", bool, False)
    ]
    if len(asked) > 1:
        keys = " and ".join(f"use_{name}_sigmas" for name in asked)
        raise InputError(f"{keys} cannot both be true: {MEND}")
    if lu and read(config, "use_lu_lambdas", bool, False) and asked != ["karras"]:
        return "lu"
    return asked[0] if asked else None


def respaced(kind: str, n: int, start: float, end: float) -> Levels:
    """Sigmas [n] from `start` to `end`, which may also rise.

    "beta" lays the sigmas themselves, not timesteps, on quantiles of Beta(0.6, 0.6) (2407.12173).
    """
    if kind == "karras":
        return spacings.karras(n, end, start)[:-1]
    if kind == "beta":
        return spacings.beta_sigmas(n, end, start)[:-1]
    return spacings.exponential(n, end, start)[:-1]  # lu: the same, even in log sigma


def log_timestep(table: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Timesteps of noise levels by interpolation in log sigma, in numpy; clamped to the table."""
    logs, wanted = np.log(table), np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, max(len(table) - 2, 0))
    high = np.minimum(low + 1, len(table) - 1)
    part = np.clip((logs[low] - wanted) / np.where(high > low, logs[low] - logs[high], 1), 0, 1)
    return (1 - part) * low + part * high


def sigmas32(schedule: Schedule) -> np.ndarray:
    """Sigmas [T] in float32 arithmetic, with the zero-SNR floor, as diffusers' sigma-space
    schedulers have them.
    """
    a = alphas_cumprod(schedule, single=True)
    return np.sqrt((1 - a) / a)


def vp_sigmas(schedule: Schedule) -> np.ndarray:
    """Sigmas [T] for diffusers' alpha-bar schedulers: float32 tables, and no floor under zero SNR.

    An alpha-bar of 0 is put at 2**-48: float32 cannot tell the two apart, and sigma stays finite.
    """
    a = alphas_cumprod(schedule, single=True).astype(np.float64)
    if schedule.zero_snr:
        a[-1] = 2.0**-48
    return np.sqrt((1 - a) / a)


def unit(sigma: float) -> float:
    """sqrt(1 + sigma^2): the standard deviation of unit data at noise level sigma."""
    return float(np.sqrt(1 + np.float64(sigma) ** 2))


def ended(sigmas: np.ndarray, final: float, falling: bool = True) -> Levels:
    """Sigmas and a last level, float32 numbers.

    A last step that goes nowhere is still a step in diffusers: it evaluates, corrects, and counts
    among the last. `sample` would take it for the image's end, so it goes one float32 further.
    """
    levels = np.append(sigmas, final).astype(np.float32)
    nowhere = levels[-2] * np.float32(1 - 1e-6 if falling else 1 + 1e-6)
    if levels[-1] > 0 and ((levels[-1] >= nowhere) if falling else (levels[-1] <= nowhere)):
        levels[-1] = np.nextafter(levels[-2], np.float32(0 if falling else np.inf))
    return levels.astype(np.float64)


def positive(config: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number above 0."""
    value = read(config, key, float, default)
    if not (np.isfinite(value) and value > 0):
        raise InputError(f"{key} must be above 0 and finite, got {value}: {MEND}")
    return value


def clip_of(config: Mapping[str, Any], default: bool) -> float | None:
    """The range that clip_sample keeps estimates in."""
    if not read(config, "clip_sample", bool, default):
        return None
    return positive(config, "clip_sample_range", 1.0)


def threshold_of(config: Mapping[str, Any], data: float = 1.0) -> Threshold | None:
    """Dynamic thresholding, in units of the data's standard deviation."""
    if not read(config, "thresholding", bool, False):
        return None
    ratio = read(config, "dynamic_thresholding_ratio", float, 0.995)
    if not 0 <= ratio <= 1:
        raise InputError(f"dynamic_thresholding_ratio must be 0 to 1, got {ratio}: {MEND}")
    return ratio, 1 / data, positive(config, "sample_max_value", 1.0) / data


def order_of(config: Mapping[str, Any], key: str, default: int, most: int) -> int:
    """A whole number from 1 to `most`."""
    order = read(config, key, int, default)
    if not 1 <= order <= most:
        raise InputError(f"{key} must be 1 to {most}, got {order}: {MEND}")
    return order
