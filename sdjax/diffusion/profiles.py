"""How other programs discretise: a `Plan` from a scheduler's config, or by name."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.diffusion import spacings
from sdjax.diffusion.plan import Plan
from sdjax.diffusion.samplers import (
    DDIM,
    DDPM,
    DPM2,
    LMS,
    DPM2Ancestral,
    DPMAdaptive,
    DPMFast,
    DPMSolverPP2M,
    DPMSolverPP2MSDE,
    DPMSolverPP2SAncestral,
    DPMSolverPP3MSDE,
    DPMSolverPPSDE,
    Euler,
    EulerAncestral,
    Heun,
)
from sdjax.diffusion.schedules import Schedule, alphas_cumprod, read, spread
from sdjax.errors import InputError
from sdjax.types import Sampler

SAMPLERS = {
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "heun": Heun,
    "ddim": DDIM,
    "ddpm": DDPM,
    "dpmpp_2m": DPMSolverPP2M,
    "dpm_2": DPM2,
    "dpm_2_ancestral": DPM2Ancestral,
    "lms": LMS,
    "dpm_fast": DPMFast,
    "dpm_adaptive": DPMAdaptive,
    "dpmpp_2s_ancestral": DPMSolverPP2SAncestral,
    "dpmpp_sde": DPMSolverPPSDE,
    "dpmpp_2m_sde": DPMSolverPP2MSDE,
    "dpmpp_3m_sde": DPMSolverPP3MSDE,
}
"""Names for a command line; in code, pass the class's instance."""

SPACINGS = spacings.NAMES


# The profile that a class follows, and the sampler that stands in where its own is not written.
_CLASSES: dict[str, tuple[str, str | None]] = {
    "DDIMScheduler": ("ddim", None),
    "DDIMParallelScheduler": ("ddim", None),
    "DDPMScheduler": ("ddpm", None),
    "DDPMParallelScheduler": ("ddpm", None),
    "EulerDiscreteScheduler": ("euler", None),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", None),
    "HeunDiscreteScheduler": ("heun", None),
    "DPMSolverMultistepScheduler": ("dpmpp", None),
    "PNDMScheduler": ("ddim", "DDIM"),
    "LCMScheduler": ("ddim", "DDIM"),
    "TCDScheduler": ("ddim", "DDIM"),
    "LMSDiscreteScheduler": ("euler", "Euler"),
    "KDPM2DiscreteScheduler": ("heun", "Heun"),
    "KDPM2AncestralDiscreteScheduler": ("euler_ancestral", "Euler ancestral"),
    "DPMSolverSDEScheduler": ("euler_ancestral", "Euler ancestral"),
    "DPMSolverSinglestepScheduler": ("dpmpp", "DPM-Solver++ 2M"),
    "DEISMultistepScheduler": ("dpmpp", "DPM-Solver++ 2M"),
    "UniPCMultistepScheduler": ("dpmpp", "DPM-Solver++ 2M"),
    "SASolverScheduler": ("dpmpp", "DPM-Solver++ 2M"),
}


def diffusers(config: Mapping[str, Any], steps: int) -> Plan:
    """What diffusers 0.42.1 does with a `scheduler_config.json` and a number of steps.

    Timesteps are exact, sigmas equal in float32, quirks included (its tables are float32 too). A
    class or option that is not written yet becomes its nearest, and `note` says so; an unknown
    class is refused.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _CLASSES:
        raise InputError(f"_class_name {name!r:.60} is unknown: use one of {', '.join(_CLASSES)}")
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise InputError(f"steps must be a whole number of at least 1, got {steps!r:.60}")
    kind, instead = _CLASSES[name]
    notes = [] if instead is None else [f"{name} is not written yet, {instead} is used"]
    make = {"ddim": _ddim, "ddpm": _ddpm, "dpmpp": _dpmpp}.get(kind, _sigma_space)
    plan = make(config, int(steps), Schedule.from_config(config), kind, notes)
    sigmas = plan.sigmas.astype(np.float32)
    # A last step that goes nowhere is a no-op in diffusers (sigma_min is already reached), and
    # `sample`'s end.
    if not (sigmas[1:-1] < sigmas[:-2]).all() or sigmas[-1] > sigmas[-2]:
        raise InputError(f"{name} has no {steps} different noise levels: take fewer steps")
    if read(config, "thresholding", bool, False):
        notes.append("dynamic thresholding is not written yet and left out")
    return plan._replace(note="; ".join(notes) or None)


def k_diffusion(
    schedule: Schedule, sampler: Sampler | str, spacing: str = "karras", steps: int = 20
) -> Plan:
    """A sampler with a spacing, both of the user's choice, ending at sigma 0 (`spacings.named`).

    Spacings of noise levels run from the schedule's sigma_max to its sigma_min, as in k-diffusion.
    The start is noise * sigma_max, for leading and quad, which start lower, noise * sqrt(1 +
    sigma^2).
    """
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r:.60}")
        chosen: Sampler = SAMPLERS[sampler]()
    else:
        chosen = sampler
    sigmas, t = spacings.named(spacing, steps, schedule)
    if t is None:
        return Plan(chosen, sigmas, log_timestep(schedule.sigmas, sigmas[:-1]), float(sigmas[0]))
    unit = spacing in ("leading", "quad")
    return Plan(chosen, sigmas, t, _unit(sigmas[0]) if unit else float(sigmas[0]))


def _ddim(
    config: Mapping[str, Any], n: int, schedule: Schedule, kind: str, notes: list[str]
) -> Plan:
    """Variance-preserving latents: the start is unit noise there, the end may stay above 0."""
    pndm = config["_class_name"] == "PNDMScheduler"
    total = schedule.timesteps
    t = _discrete(config, n, schedule)
    table = _vp_sigmas(schedule)
    final = 0.0 if read(config, "set_alpha_to_one", bool, not pndm) else table[0]
    # The step goes down by T // n, whatever the spacing; only `leading` agrees for every n.
    below = t - total // n
    landings = np.where(below >= 0, table[np.maximum(below, 0).astype(int)], final)
    sigmas = np.append(table[t.astype(int)], landings[-1])
    agree = np.array_equal(landings, sigmas[1:])
    sampler = DDIM() if agree or pndm else DDIM(landings=landings)
    clip = None if pndm else _clip(config, True)
    if clip is not None:
        notes.append(
            "clip_sample also changes the direction here, which diffusers leaves unclipped"
        )
    return Plan(sampler, sigmas, t, _unit(sigmas[0]), 1 / _unit(sigmas[-1]), clip=clip)


def _ddpm(
    config: Mapping[str, Any], n: int, schedule: Schedule, kind: str, notes: list[str]
) -> Plan:
    t = _discrete(config, n, schedule)
    sigmas = np.append(_vp_sigmas(schedule)[t.astype(int)], 0.0)
    variance = read(config, "variance_type", str, "fixed_small")
    if variance not in ("fixed_small", "fixed_small_log", "fixed_large"):
        notes.append(f"variance_type {variance:.40} is not written yet, fixed_small is used")
    sampler = DDPM("fixed_large" if variance == "fixed_large" else "fixed_small")
    return Plan(sampler, sigmas, t, _unit(sigmas[0]), clip=_clip(config, True))


def _sigma_space(
    config: Mapping[str, Any], n: int, schedule: Schedule, kind: str, notes: list[str]
) -> Plan:
    """Euler, Euler ancestral, Heun: sigma space, fractional timesteps, a start that depends on the
    spacing.
    """
    spacing = _spacing(config, "linspace")
    offset = read(config, "steps_offset", int, 0)
    # diffusers counts in float32; the fractions of linspace show it.
    t = _timesteps(spacing, n, schedule.timesteps, offset).astype(np.float32).astype(np.float64)
    table = _sigmas32(schedule)
    sigmas = np.interp(t, np.arange(schedule.timesteps), table)
    last, interpolation, ends_low = 0.0, "linear", False
    if kind == "euler" and config["_class_name"] == "EulerDiscreteScheduler":
        interpolation = read(config, "interpolation_type", str, "linear", ("linear", "log_linear"))
        if (
            interpolation == "log_linear"
        ):  # n + 1 levels, of which the last is where the n-th step ends
            ramp = np.exp(
                spread(float(np.log(table[-1])), float(np.log(table[0])), n + 1, np.float32)
            )
            sigmas, last = ramp[:-1], float(ramp[-1])
        ends_low = (
            read(config, "final_sigmas_type", str, "zero", ("zero", "sigma_min")) == "sigma_min"
        )
        if ends_low and interpolation == "linear":
            last = float(table[0])
    if kind != "euler_ancestral":
        ends = [float(sigmas[-1]), float(sigmas[0])]
        if config["_class_name"] == "EulerDiscreteScheduler":
            ends = [
                _positive(config, "sigma_min", ends[0]),
                _positive(config, "sigma_max", ends[1]),
            ]
        respaced = _respaced(config, n, ends[0], ends[1], notes)
        if respaced is not None:
            sigmas = respaced
            t = log_timestep(table, sigmas).astype(np.float32).astype(np.float64)
            last = float(table[0]) if ends_low else 0.0
    sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    if (
        read(config, "timestep_type", str, "discrete") == "continuous"
        and schedule.prediction == "v_prediction"
    ):
        t = 0.25 * np.log(sigmas[:-1])  # EDM's c_noise (2206.00364, table 1)
    sampler = SAMPLERS[kind]()
    clip = _clip(config, False) if kind == "heun" else None
    init = _unit(sigmas[0]) if spacing == "leading" else float(sigmas[0])
    return Plan(sampler, sigmas, t, init, clip=clip)


def _dpmpp(
    config: Mapping[str, Any], n: int, schedule: Schedule, kind: str, notes: list[str]
) -> Plan:
    """DPM-Solver's own spacings (n + 1 timesteps, of which the last is dropped),
    variance-preserving latents.
    """
    if read(config, "use_flow_sigmas", bool, False):
        raise InputError(
            "use_flow_sigmas is for flow-matching models: take a scheduler for a diffusion model"
        )
    spacing = _spacing(config, "linspace")
    offset = read(config, "steps_offset", int, 0)
    table = _sigmas32(schedule)
    total = schedule.timesteps
    clipped = config.get("lambda_min_clipped")
    if isinstance(clipped, int | float) and not isinstance(clipped, bool) and np.isfinite(clipped):
        a = alphas_cumprod(schedule, single=True)
        rising = (np.log(np.sqrt(a)) - np.log(np.sqrt(1 - a)))[::-1]
        total -= int(np.searchsorted(rising, np.float32(clipped)))
    if spacing == "leading":
        t = np.arange(n, 0, -1.0) * (total // (n + 1)) + offset
    elif spacing == "trailing":
        t = np.round(np.arange(total, 0, -schedule.timesteps / n)) - 1
        t = t[:n][t[:n] >= 0]
    else:
        t = np.round(np.linspace(0, total - 1, n + 1))[::-1][:-1]
    _within(t, schedule)
    sigmas = np.interp(t, np.arange(schedule.timesteps), table)
    respaced = _respaced(config, n, float(table[0]), float(table[-1]), notes)
    if respaced is not None:
        sigmas, t = respaced, log_timestep(table, respaced)
        if (
            read(config, "use_karras_sigmas", bool, False)
            and schedule.beta_schedule != "squaredcos_cap_v2"
        ):
            t = np.round(t)
        t = np.trunc(t)  # diffusers stores them as whole numbers
    final = read(config, "final_sigmas_type", str, "zero", ("zero", "sigma_min"))
    sigmas = np.append(sigmas, 0.0 if final == "zero" else float(table[0]))
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    sampler = _dpmpp_sampler(config, notes)
    if sigmas[-1] == sigmas[-2] and isinstance(sampler, DPMSolverPP2M):
        sampler = DPMSolverPP2M(
            sampler.solver
        )  # its last step goes nowhere: the one before is not the last
    return Plan(sampler, sigmas, t, _unit(sigmas[0]), 1 / _unit(sigmas[-1]))


def _dpmpp_sampler(config: Mapping[str, Any], notes: list[str]) -> Sampler:
    if config["_class_name"] != "DPMSolverMultistepScheduler":
        return DPMSolverPP2M(first_order_at_end="short")
    order = read(config, "solver_order", int, 2)
    if order not in (1, 2, 3):
        raise InputError(f"solver_order must be 1, 2 or 3, got {order}: mend the scheduler config")
    algorithm = read(config, "algorithm_type", str, "dpmsolver++")
    if algorithm == "deis":  # diffusers reads it so
        algorithm = "dpmsolver++"
    if algorithm not in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"):
        raise InputError(f"algorithm_type {algorithm!r:.40} is unknown: use dpmsolver++")
    if algorithm.startswith("sde"):
        notes.append(
            f"algorithm_type {algorithm} is not written yet, the ODE's DPM-Solver++ 2M is used"
        )
    elif algorithm == "dpmsolver" and order > 1:  # order 1 is DDIM either way
        notes.append("algorithm_type dpmsolver is not written yet, DPM-Solver++ 2M is used")
    if order == 3:
        notes.append("solver_order 3 is not written yet, order 2 is used")
    if order == 1:
        return Euler()
    solver = read(config, "solver_type", str, "midpoint")
    if solver in ("logrho", "bh1", "bh2"):  # diffusers reads them so
        solver = "midpoint"
    if solver not in ("midpoint", "heun"):
        raise InputError(f"solver_type {solver!r:.40} is unknown: use midpoint")
    if read(config, "euler_at_final", bool, False):
        return DPMSolverPP2M(solver, "always")
    return DPMSolverPP2M(
        solver, "short" if read(config, "lower_order_final", bool, True) else "never"
    )


def log_timestep(table: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Timesteps of noise levels by interpolation in log sigma, in numpy; clamped to the table."""
    logs, wanted = np.log(table), np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, max(len(table) - 2, 0))
    high = np.minimum(low + 1, len(table) - 1)
    part = np.clip((logs[low] - wanted) / np.where(high > low, logs[low] - logs[high], 1), 0, 1)
    return (1 - part) * low + part * high


def _respaced(
    config: Mapping[str, Any], n: int, low: float, high: float, notes: list[str]
) -> np.ndarray | None:
    """Sigmas [n] when the config asks for karras or exponential spacing."""
    asked = [f"use_{name}_sigmas" for name in ("karras", "exponential", "beta")]
    asked = [key for key in asked if read(config, key, bool, False)]
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)} cannot both be true: mend the scheduler config")
    for key in ("use_lu_lambdas", "use_beta_sigmas"):
        if read(config, key, bool, False):
            notes.append(f"{key} is not written yet, the timesteps' own sigmas are used")
    if "use_karras_sigmas" in asked:
        return spacings.karras(n, low, high)[:-1]
    if "use_exponential_sigmas" in asked:
        return spacings.exponential(n, low, high)[:-1]
    return None


def _discrete(config: Mapping[str, Any], n: int, schedule: Schedule) -> np.ndarray:
    """Whole timesteps [n] of DDIM and DDPM."""
    offset = read(config, "steps_offset", int, 0)
    t = _timesteps(_spacing(config, "leading"), n, schedule.timesteps, offset, rounded=True)
    _within(t, schedule)
    return t


def _timesteps(spacing: str, n: int, total: int, offset: int, rounded: bool = False) -> np.ndarray:
    if spacing == "leading":
        return spacings.leading(n, total, offset)
    if spacing == "trailing":
        return spacings.trailing(n, total)
    return spacings.linspace(n, total, rounded)


def _spacing(config: Mapping[str, Any], default: str) -> str:
    return read(config, "timestep_spacing", str, default, ("leading", "trailing", "linspace"))


def _within(t: np.ndarray, schedule: Schedule) -> None:
    if t.min() < 0 or t.max() >= schedule.timesteps:
        raise InputError(
            f"timestep {t.max():.0f} lies outside 0 .. {schedule.timesteps - 1}: take fewer "
            "steps or a smaller steps_offset"
        )


def _sigmas32(schedule: Schedule) -> np.ndarray:
    """Sigmas [T] in float32 arithmetic, with the zero-SNR floor, as diffusers' sigma-space
    schedulers have them.
    """
    a = alphas_cumprod(schedule, single=True)
    return np.sqrt((1 - a) / a)


def _vp_sigmas(schedule: Schedule) -> np.ndarray:
    """Sigmas [T] for diffusers' alpha-bar schedulers: float32 tables, and no floor under zero SNR.

    An alpha-bar of 0 is put at 2**-48: float32 cannot tell the two apart, and sigma stays finite.
    """
    a = alphas_cumprod(schedule, single=True).astype(np.float64)
    if schedule.zero_snr:
        a[-1] = 2.0**-48
    return np.sqrt((1 - a) / a)


def _unit(sigma: float) -> float:
    """sqrt(1 + sigma^2): the standard deviation of unit data at noise level sigma."""
    return float(np.sqrt(1 + np.float64(sigma) ** 2))


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    value = read(config, key, float, default)
    if not (np.isfinite(value) and value > 0):
        raise InputError(
            f"{key} must be above 0 and finite, got {value}: mend the scheduler config"
        )
    return value


def _clip(config: Mapping[str, Any], default: bool) -> float | None:
    if not read(config, "clip_sample", bool, default):
        return None
    return _positive(config, "clip_sample_range", 1.0)
