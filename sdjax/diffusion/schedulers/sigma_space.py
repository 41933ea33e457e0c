"""Schedulers in sigma space: Euler, Heun, DPM-2, LMS; EDM's; consistency models."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.diffusion.plan import Plan
from sdjax.diffusion.samplers.consistency import ConsistencyModel
from sdjax.diffusion.samplers.dpm2 import DPM2, DPM2Ancestral
from sdjax.diffusion.samplers.dpmpp_sde import DPMSolverPPSDE
from sdjax.diffusion.samplers.euler import Euler, EulerAncestral
from sdjax.diffusion.samplers.heun import Heun
from sdjax.diffusion.samplers.lms import LMS
from sdjax.diffusion.schedulers.multistep import dpm_sampler
from sdjax.diffusion.schedulers.tables import (
    Levels,
    clip_of,
    ended,
    log_timestep,
    order_of,
    positive,
    respaced,
    respacing,
    sigmas32,
    spacing_of,
    threshold_of,
    timesteps,
    unit,
)
from sdjax.diffusion.schedules import Schedule, read, spread
from sdjax.errors import InputError
from sdjax.types import Sampler

Config = Mapping[str, Any]

_SAMPLERS: dict[str, Sampler] = {
    "EulerDiscreteScheduler": Euler(),
    "EulerAncestralDiscreteScheduler": EulerAncestral(),
    "HeunDiscreteScheduler": Heun(),
    "LMSDiscreteScheduler": LMS(),
    "KDPM2DiscreteScheduler": DPM2(),
    "KDPM2AncestralDiscreteScheduler": DPM2Ancestral(),
    "DPMSolverSDEScheduler": DPMSolverPPSDE(),
}


def sigma_space(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """Fractional timesteps, and a start that depends on the spacing."""
    name = config["_class_name"]
    # diffusers counts in float32; the fractions of linspace show it.
    single = _same if name == "DPMSolverSDEScheduler" else _single
    spacing = spacing_of(config, "linspace")
    offset = read(config, "steps_offset", int, 0)
    t = single(timesteps(spacing, n, schedule.timesteps, offset))
    table = sigmas32(schedule)
    sigmas = np.interp(t, np.arange(schedule.timesteps), table)
    last, ends_low, euler = 0.0, False, name == "EulerDiscreteScheduler"
    if euler:
        linear = ("linear", "log_linear")
        interpolation = read(config, "interpolation_type", str, "linear", linear)
        if interpolation == "log_linear":
            # n + 1 levels, of which the last is where the n-th step ends
            ends = float(np.log(table[-1])), float(np.log(table[0]))
            ramp = np.exp(spread(*ends, n + 1, np.float32))
            sigmas, last = ramp[:-1], float(ramp[-1])
        finals = ("zero", "sigma_min")
        ends_low = read(config, "final_sigmas_type", str, "zero", finals) == "sigma_min"
        if ends_low and interpolation == "linear":
            last = float(table[0])
    kind = None if name == "EulerAncestralDiscreteScheduler" else respacing(config)
    if kind:
        low, high = float(sigmas[-1]), float(sigmas[0])
        if euler:
            low = positive(config, "sigma_min", low)
            high = positive(config, "sigma_max", high)
        sigmas = respaced(kind, n, high, low)
        t = log_timestep(table, sigmas)
        if kind == "karras" and name.startswith("KDPM2"):
            t = np.round(t)
        t = single(t)
        last = float(table[0]) if ends_low else 0.0
    sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    continuous = read(config, "timestep_type", str, "discrete") == "continuous"
    if continuous and schedule.prediction == "v_prediction":
        t = 0.25 * np.log(sigmas[:-1])  # EDM's c_noise (2206.00364, table 1)
    clip = clip_of(config, False) if name == "HeunDiscreteScheduler" else None
    init = unit(sigmas[0]) if spacing == "leading" else float(sigmas[0])
    return Plan(_SAMPLERS[name], sigmas, t, init, clip=clip)


def edm(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """EDM's preconditioning (2206.00364, table 1) for data of standard deviation sigma_data: in
    units of it, a plain model of data of variance 1 (`to_x0`'s "edm").
    """
    low, high = positive(config, "sigma_min", 0.002), positive(config, "sigma_max", 80.0)
    data, rho = positive(config, "sigma_data", 0.5), positive(config, "rho", 7.0)
    kind = read(config, "sigma_schedule", str, "karras", ("karras", "exponential"))
    euler = config["_class_name"] == "EDMEulerScheduler"
    if kind == "exponential":  # one step stands at sigma_min, where linspace begins
        sigmas = np.exp(spread(float(np.log(low)), float(np.log(high)), n, np.float32))[::-1]
    else:
        ramp = np.linspace(0, 1, n) if euler else spread(0.0, 1.0, n, np.float32)
        top, bottom = high ** (1 / rho), low ** (1 / rho)
        sigmas = (top + ramp.astype(np.float64) * (bottom - top)) ** rho
    sigmas = sigmas.astype(np.float32)
    finals = ("zero", "sigma_min")
    ends_low = read(config, "final_sigmas_type", str, "zero", finals) == "sigma_min"
    if euler:
        sampler: Sampler = Euler()
        levels = np.append(sigmas, sigmas[-1] if ends_low else 0.0).astype(np.float64)
    else:
        sampler = dpm_sampler(config, 3)
        levels = ended(sigmas, low if ends_low else 0.0)
    t = 0.25 * np.log(sigmas).astype(np.float64)
    threshold = None if euler else threshold_of(config, data)
    # The start's 1 is diffusers', whatever sigma_data is.
    return Plan(sampler, levels / data, t, unit(high) / data, data, threshold=threshold)


def consistency(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """Song et al. (2303.01469), in units of sigma_data as `edm`."""
    low, high = positive(config, "sigma_min", 0.002), positive(config, "sigma_max", 80.0)
    data, rho = positive(config, "sigma_data", 0.5), positive(config, "rho", 7.0)
    total = order_of(config, "num_train_timesteps", 40, 100_000)
    if n > total:
        raise InputError(f"CMStochasticIterativeScheduler has at most {total} steps, got {n}")
    # Leading: the ramp stops short of sigma_min, which the last step ends at.
    ramp = np.arange(n) * (total // n) / max(total - 1, 1)
    top, bottom = high ** (1 / rho), low ** (1 / rho)
    sigmas = (top + ramp * (bottom - top)) ** rho
    clip = 1 / data if read(config, "clip_denoised", bool, True) else None
    noise = read(config, "s_noise", float, 1.0)
    sampler = ConsistencyModel(low / data, noise, clip)
    levels = np.append(sigmas, low).astype(np.float32).astype(np.float64)
    return Plan(sampler, levels / data, 250 * np.log(sigmas), high / data, data)


def _same(values: Levels) -> Levels:
    return values


def _single(values: Levels) -> Levels:
    return values.astype(np.float32).astype(np.float64)
