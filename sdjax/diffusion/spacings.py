"""Where the steps stand: noise levels or timesteps, float64 numpy, falling."""

from collections.abc import Sequence

import numpy as np

from sdjax.errors import InputError

Levels = np.ndarray
"""Float64 [n] or [n+1], falling."""

NAMES = ("karras", "exponential", "leading", "trailing", "linspace")


def karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, final: float = 0.0
) -> Levels:
    """Sigmas [n+1] even in sigma^(1/rho), then `final`: Karras et al. (2206.00364), eq. 5."""
    _check(n)
    ramp = np.linspace(0, 1, n)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.append((high + ramp * (low - high)) ** rho, final)


def exponential(n: int, sigma_min: float, sigma_max: float, final: float = 0.0) -> Levels:
    """Sigmas [n+1] evenly spaced in log sigma, then `final`: what DPM-Solver calls uniform in
    lambda (2206.00927).
    """
    _check(n)
    return np.append(np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), n)), final)


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


def _check(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise InputError(f"steps must be a whole number of at least 1, got {n!r}")
