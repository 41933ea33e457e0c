"""The training schedule: betas -> alpha-bar -> sigma, and between sigma and the timestep."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax.errors import InputError
from sdjax.types import Latents, Sigma

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sqrt")
PREDICTIONS = ("epsilon", "v_prediction", "sample", "edm")
ZERO_SNR_FLOOR = 2.0**-24
"""diffusers' Euler puts the last alpha-bar here (float16's smallest subnormal): sigma = 4096."""

Table = np.ndarray

Floats = Float[Array, "..."] | Float[np.ndarray, "..."]


@dataclass(frozen=True)
class Schedule:
    """How a network was trained: which noise level stands at which timestep, and what it predicts.

    DDPM, Ho et al. (2006.11239): x_t = sqrt(a_t) x0 + sqrt(1 - a_t) n with a = cumprod(1 - beta).
    In sigma space (Karras et al., 2206.00364) the same sample is x_t / sqrt(a_t) = x0 + sigma n,
    sigma = sqrt((1 - a) / a).

    Hyper-parameters only: hashable, static under jit. `sqrt` is CompVis's (beta = linspace(start,
    end)**0.5); `squaredcos_cap_v2` is Nichol and Dhariwal's cosine (2102.09672, eq. 17, betas
    capped at 0.999). `zero_snr` rescales so that the last timestep is pure noise (Lin et al.,
    2305.08891, algorithm 1).
    """

    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000
    prediction: str = "epsilon"
    zero_snr: bool = False
    trained_betas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.trained_betas, list | np.ndarray):  # stays hashable
            object.__setattr__(self, "trained_betas", tuple(float(b) for b in self.trained_betas))
        _check(self)

    @property
    def alphas_cumprod(self) -> Table:
        """alpha-bar [T], float64, falling; read-only."""
        return alphas_cumprod(self)

    @property
    def sigmas(self) -> Table:
        """Sigma [T], float64, rising; read-only."""
        return _sigmas(self)

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    def sigma(self, timestep: Any, log: bool = False) -> Table:
        """Noise level at a timestep, which may be a fraction: linear between entries, or linear in
        log sigma.
        """
        at = np.arange(self.timesteps)
        if log:
            return np.asarray(np.exp(np.interp(timestep, at, np.log(self.sigmas))))
        return np.asarray(np.interp(timestep, at, self.sigmas))

    def timestep(self, sigma: Floats) -> Float[Array, "..."]:
        """The timestep of a noise level, float32, by interpolation in log sigma; clamped to 0 ..
        T-1.

        Exactly t at float32(sigmas[t]), so that a network sees whole numbers where it was trained
        on them.
        """
        if self.timesteps == 1:
            return jnp.zeros_like(sigma, jnp.float32)
        table = jnp.asarray(self.sigmas.astype(np.float32))
        sigma = jnp.clip(jnp.asarray(sigma, jnp.float32), table[0], table[-1])
        low = jnp.clip(jnp.searchsorted(table, sigma, side="right") - 1, 0, self.timesteps - 2)
        # log(1) is exactly 0 and x / x exactly 1, whatever the platform's log rounds to.
        span = jnp.log(table[low + 1] / table[low])
        part = jnp.log(sigma / table[low]) / jnp.where(span > 0, span, 1)
        return low.astype(jnp.float32) + jnp.clip(part, 0, 1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """The schedule that a diffusers `scheduler_config.json` describes; absent keys take its
        class's defaults.

        Configs are untrusted: types and ranges are checked, and errors name the key.
        """
        ours = config.get("_class_name") in (
            "LCMScheduler",
            "TCDScheduler",
            "HeunDiscreteScheduler",
        )
        start, end = (0.00085, 0.012) if ours else (0.0001, 0.02)
        compvis = config.get("_class_name") in ("LCMScheduler", "TCDScheduler")
        betas = config.get("trained_betas")
        if betas is not None:
            if not isinstance(betas, list | tuple) or not 1 <= len(betas) <= 100_000:
                raise InputError(
                    "trained_betas must be a list of 1 to 100000 numbers: mend the scheduler config"
                )
            betas = tuple(_number("trained_betas", b) for b in betas)
        steps = read(config, "num_train_timesteps", int, 1000)
        return cls(
            beta_schedule=read(
                config, "beta_schedule", str, "scaled_linear" if compvis else "linear"
            ),
            beta_start=_number("beta_start", config.get("beta_start", start)),
            beta_end=_number("beta_end", config.get("beta_end", end)),
            timesteps=len(betas) if betas is not None else steps,
            prediction=_prediction(config),
            zero_snr=read(config, "rescale_betas_zero_snr", bool, False),
            trained_betas=betas,
        )

    def config(self) -> dict[str, Any]:
        """The keys of a diffusers scheduler config that say the same, for `from_config`."""
        return {
            "beta_schedule": self.beta_schedule,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "num_train_timesteps": self.timesteps,
            "prediction_type": self.prediction,
            "rescale_betas_zero_snr": self.zero_snr,
            "trained_betas": None if self.trained_betas is None else list(self.trained_betas),
        }


def to_x0(schedule: Schedule, out: Latents, x: Latents, sigma: Sigma) -> Latents:
    """x0 from what the network said about x / sqrt(1 + sigma^2).

    epsilon: x - sigma out. v (Salimans and Ho, 2202.00512): x / (1 + sigma^2) - sigma / sqrt(1 +
    sigma^2) out. edm: the same with the other sign, Karras et al.'s preconditioning (2206.00364,
    table 1) of data of variance 1.
    """
    if schedule.prediction == "epsilon":
        return x - sigma * out
    if schedule.prediction == "sample":
        return out
    # Divided twice by the root: zero-SNR sigmas are large.
    scale = jnp.sqrt(1 + sigma**2)
    sign = 1 if schedule.prediction == "edm" else -1
    return x / scale / scale + sign * (sigma / scale) * out


def planned_timestep(
    schedule: Schedule,
    sigma: Sigma,
    sigmas: Floats | None = None,
    timesteps: Floats | None = None,
) -> Float[Array, "..."]:
    """The timestep at which to evaluate a network: the plan's own where sigma is one of its levels.

    Profiles of other programs round or truncate timesteps, so that sigma alone does not say them.
    `sigmas` [n+1] or [n+1, b, 1, 1, 1] and `timesteps` [n] (the same trailing shape) come from one
    `Plan`; at any other level (churn, midpoints) the schedule's inverse answers. Returns sigma's
    shape, or [b, 1, 1, 1].
    """
    between = schedule.timestep(sigma)
    if sigmas is None or timesteps is None:
        return between
    timesteps = jnp.asarray(timesteps, jnp.float32)
    levels = jnp.asarray(sigmas, jnp.float32)[: timesteps.shape[0]]
    if sigma.ndim and levels.ndim == 1:
        levels, timesteps = (v.reshape(-1, *(1,) * sigma.ndim) for v in (levels, timesteps))
    hit = levels == sigma.astype(jnp.float32)
    # The first hit: padding repeats a level, and its timestep.
    first = jnp.argmax(hit, axis=0, keepdims=True)
    planned = jnp.take_along_axis(jnp.broadcast_to(timesteps, hit.shape), first, axis=0)[0]
    return jnp.where(jnp.any(hit, axis=0), planned, between)


def alphas_cumprod(schedule: Schedule, single: bool = False) -> Table:
    """alpha-bar [T], with exactly 0 at the end under `zero_snr` replaced by `ZERO_SNR_FLOOR`.

    `single` repeats diffusers' arithmetic: betas in float32, their product accumulated in double
    and rounded to float32. It moves the smallest sigma by 1.3e-5 of itself, which parity with that
    program can see.
    """
    table = _alphas_cumprod(schedule, single)
    if not schedule.zero_snr:
        return table
    table = table.copy()
    table[-1] = ZERO_SNR_FLOOR
    return table


@functools.lru_cache(64)
def _sigmas(schedule: Schedule) -> Table:
    a = alphas_cumprod(schedule)
    sigmas = np.sqrt((1 - a) / a)
    sigmas.flags.writeable = False
    return sigmas


@functools.lru_cache(64)
def _alphas_cumprod(schedule: Schedule, single: bool) -> Table:
    """alpha-bar [T], float64 or float32; the last entry is 0 under `zero_snr`."""
    dtype = np.float32 if single else np.float64
    a = np.cumprod(1 - _betas(schedule, dtype), dtype=np.float64).astype(dtype)
    if schedule.zero_snr:  # 2305.08891, algorithm 1
        root = np.sqrt(a)
        first, last = root[0], root[-1]
        a = ((root - last) * (first / (first - last))) ** 2
        alphas = np.concatenate([a[:1], a[1:] / a[:-1]])
        betas = 1 - alphas  # there and back, as the reference goes
        a = np.cumprod(1 - betas, dtype=np.float64).astype(dtype)
    a.flags.writeable = False
    return a


def _betas(schedule: Schedule, dtype: type) -> Table:
    """Betas [T] in the given precision."""
    start, end, n = schedule.beta_start, schedule.beta_end, schedule.timesteps
    if schedule.trained_betas is not None:
        return np.asarray(schedule.trained_betas, dtype)
    if schedule.beta_schedule == "linear":
        return spread(start, end, n, dtype)
    if schedule.beta_schedule == "scaled_linear":
        return spread(start**0.5, end**0.5, n, dtype) ** 2
    if schedule.beta_schedule == "sqrt":
        return np.sqrt(spread(start, end, n, dtype))
    bar = np.array([math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)])
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999).astype(dtype)


def spread(start: float, end: float, n: int, dtype: type) -> Table:
    """`np.linspace`, or in float32 what torch computes: from both ends, rounded once."""
    if dtype is np.float64 or n == 1:
        return np.linspace(start, end, n).astype(dtype)
    a, b = np.float32(start), np.float32(end)
    step = np.float64(np.float32(b - a) / np.float32(n - 1))
    i = np.arange(n, dtype=np.float64)
    return np.where(i < n // 2, a + step * i, b - step * (n - 1 - i)).astype(dtype)


def read(
    config: Mapping[str, Any], key: str, kind: type, default: Any, choices: Sequence = ()
) -> Any:
    """One checked value of an untrusted config; null means absent."""
    value = config.get(key)
    if value is None:
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(
            f"{key} must be {_KINDS[kind]}, got {value!r:.60}: mend the scheduler config"
        )
    if choices and value not in choices:
        raise InputError(f"{key} must be one of {', '.join(choices)}, got {value!r:.60}")
    return value


def _prediction(config: Mapping[str, Any]) -> str:
    """What the network predicts, where a class fixes it or calls it by another name."""
    name = config.get("_class_name")
    if name == "IPNDMScheduler":
        return "v_prediction"
    if name == "CMStochasticIterativeScheduler":
        return "edm"
    said: str = read(config, "prediction_type", str, "epsilon")
    if name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        known = {"epsilon": "edm", "edm": "edm", "v_prediction": "v_prediction"}
        if said not in known:
            raise InputError(
                f"prediction_type must be epsilon or v_prediction for {name}, got {said!r:.60}"
            )
        return known[said]
    return said


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def _number(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InputError(
            f"{key} must be a finite number, got {value!r:.60}: mend the scheduler config"
        )
    return float(value)


def _check(schedule: Schedule) -> None:
    """Refuses what has no sigmas, naming diffusers' key."""
    mend = "mend the scheduler config"
    if schedule.beta_schedule not in BETA_SCHEDULES:
        known = ", ".join(BETA_SCHEDULES)
        raise InputError(
            f"beta_schedule must be one of {known}, got {schedule.beta_schedule!r:.60}: {mend}"
        )
    if schedule.prediction not in PREDICTIONS:
        known = ", ".join(PREDICTIONS)
        raise InputError(
            f"prediction_type must be one of {known}, got {schedule.prediction!r:.60}: {mend}"
        )
    if type(schedule.timesteps) is not int or not 1 <= schedule.timesteps <= 100_000:
        raise InputError(
            f"num_train_timesteps must be 1 to 100000, got {schedule.timesteps!r:.60}: {mend}"
        )
    if schedule.trained_betas is not None:
        if len(schedule.trained_betas) != schedule.timesteps:
            raise InputError(
                f"trained_betas has {len(schedule.trained_betas)} entries but "
                f"num_train_timesteps is {schedule.timesteps}: make them equal"
            )
        for beta in schedule.trained_betas:
            if not 0 < beta < 1:
                raise InputError(f"trained_betas must lie between 0 and 1, got {beta}: {mend}")
    elif schedule.beta_schedule != "squaredcos_cap_v2":
        for key, beta in (("beta_start", schedule.beta_start), ("beta_end", schedule.beta_end)):
            if type(beta) not in (int, float) or not 0 < beta < 1:
                raise InputError(f"{key} must lie between 0 and 1, got {beta!r:.60}: {mend}")
    if schedule.zero_snr and schedule.timesteps < 2:
        raise InputError("rescale_betas_zero_snr needs num_train_timesteps of at least 2: " + mend)
    a = _alphas_cumprod(schedule, False)
    if not a[-2 if schedule.zero_snr else -1] > 1e-30:
        raise InputError(
            f"beta_end: no signal is left after {schedule.timesteps} timesteps: {mend}"
        )
