"""Schedulers in log SNR: DPM-Solver and ++ (multistep, its inverse, singlestep), DEIS, UniPC, SA.

They share spacings of their own (n + 1 timesteps, of which the last is dropped) and
variance-preserving latents.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.diffusion.plan import Plan
from sdjax.diffusion.samplers.deis import DEIS
from sdjax.diffusion.samplers.dpm_solver import DPMSolver, DPMSolverSingle
from sdjax.diffusion.samplers.dpmpp import DPMSolverPP2M
from sdjax.diffusion.samplers.euler import Euler
from sdjax.diffusion.samplers.sa_solver import SASolver
from sdjax.diffusion.samplers.unipc import UniPC
from sdjax.diffusion.schedulers.tables import (
    MEND,
    Levels,
    ended,
    log_timestep,
    order_of,
    respaced,
    respacing,
    sigmas32,
    spacing_of,
    threshold_of,
    unit,
    within,
)
from sdjax.diffusion.schedules import Schedule, alphas_cumprod, read
from sdjax.errors import InputError
from sdjax.types import Sampler

Config = Mapping[str, Any]
FINALS = ("zero", "sigma_min")


def dpm_multistep(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """Lu et al. (2211.01095, 2206.00927)."""
    table = sigmas32(schedule)
    sigmas, t, _ = _levels(config, n, schedule, lu=True)
    low = read(config, "final_sigmas_type", str, "zero", FINALS) == "sigma_min"
    return _plan(config, dpm_sampler(config, 3), ended(sigmas, float(table[0]) if low else 0.0), t)


def dpm_inverse(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """Sigmas rise from the first timestep to the noisiest."""
    sampler = dpm_sampler({**config, "final_sigmas_type": "sigma_min"}, 3)
    if getattr(sampler, "stochastic", False) is True:
        raise InputError("DPMSolverMultistepInverseScheduler inverts ODEs: take no sde algorithm")
    table, total = sigmas32(schedule), _clipped(config, schedule)
    spacing, offset = spacing_of(config, "linspace"), read(config, "steps_offset", int, 0)
    if spacing == "leading":
        t = np.arange(n) * (total // (n + 1.0) // 1) + offset
    elif spacing == "trailing":
        t = np.round(np.arange(total, 0, -schedule.timesteps / n))[::-1] - 1
    else:
        t = np.round(np.linspace(0, total - 1, n + 1))[:-1]
    within(t, schedule)
    sigmas, final = table[t.astype(int)], float(table[total - 1])
    if kind := respacing(config):
        sigmas = respaced(kind, n, float(table[0]), float(table[-1]))
        t = log_timestep(table, sigmas)
        t = np.round(t) if kind == "karras" else np.trunc(t)
        final = float(sigmas[-1])
    if len(np.unique(t)) < n:  # diffusers strikes them out, but not their levels, and then fails
        raise InputError(
            f"DPMSolverMultistepInverseScheduler has no {n} different timesteps: take fewer steps"
        )
    return _plan(config, sampler, ended(sigmas, final, falling=False), t)


def dpm_singlestep(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """The same in groups of steps; linspace only."""
    order = order_of(config, "solver_order", 2, 3)
    algorithm, solver = _algorithm(config), _solver(config)
    if algorithm == "sde-dpmsolver":
        raise InputError("algorithm_type sde-dpmsolver is unknown: use sde-dpmsolver++")
    low = read(config, "final_sigmas_type", str, "zero", FINALS) == "sigma_min"
    # What does not divide into groups ends with lower orders, and so does a last step to 0.
    lower = read(config, "lower_order_final", bool, False) or n % order != 0 or not low
    table = sigmas32(schedule)
    sigmas, t, _ = _levels({**config, "timestep_spacing": "linspace"}, n, schedule)
    sampler = DPMSolverSingle(order, algorithm, solver, lower, reference=True)
    return _plan(config, sampler, ended(sigmas, float(table[0]) if low else 0.0), t)


def deis(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """Zhang and Chen (2204.13902); it never ends at 0."""
    algorithm = read(config, "algorithm_type", str, "deis")
    if algorithm not in ("deis", "dpmsolver", "dpmsolver++"):  # diffusers reads them so
        raise InputError(f"algorithm_type {algorithm!r:.40} is unknown: use deis")
    solver = read(config, "solver_type", str, "logrho")
    if solver not in ("logrho", "midpoint", "heun", "bh1", "bh2"):
        raise InputError(f"solver_type {solver!r:.40} is unknown: use logrho")
    sampler = DEIS(
        order_of(config, "solver_order", 2, 3), read(config, "lower_order_final", bool, True)
    )
    sigmas, t, kind = _levels({**config, "lambda_min_clipped": None}, n, schedule)
    final = float(sigmas[-1] if kind else sigmas32(schedule)[0])
    return _plan(config, sampler, ended(sigmas, final), t)


def unipc(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """Zhao et al. (2302.04867)."""
    variant = read(config, "solver_type", str, "bh2")
    if variant in ("midpoint", "heun", "logrho"):  # diffusers reads them so
        variant = "bh2"
    if variant not in ("bh1", "bh2"):
        raise InputError(f"solver_type {variant!r:.40} is unknown: use bh2")
    if config.get("solver_p") is not None:
        notes.append("solver_p is another scheduler, and not used: UniPC predicts by itself")
    off = config.get("disable_corrector") or ()
    if not isinstance(off, list | tuple) or not all(type(i) is int for i in off):
        raise InputError(f"disable_corrector must be a list of steps, got {off!r:.60}: {MEND}")
    sampler = UniPC(
        order_of(config, "solver_order", 2, 3),
        variant,
        read(config, "predict_x0", bool, True),
        read(config, "lower_order_final", bool, True),
        tuple(sorted(set(off))),
    )
    sigmas, t, kind = _levels({**config, "lambda_min_clipped": None}, n, schedule)
    final = 0.0
    if read(config, "final_sigmas_type", str, "zero", FINALS) == "sigma_min":
        final = float(sigmas[-1] if kind else sigmas32(schedule)[0])
    plan = _plan(config, sampler, ended(sigmas, final), t)
    # Without predict_x0 there is no estimate to threshold, diffusers finds.
    return plan if sampler.predict_x0 else plan._replace(threshold=None)


def sa_solver(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """tau_func is code and no key of the config: its default, 1 from timestep 200 to 800."""
    algorithm = read(
        config, "algorithm_type", str, "data_prediction", ("data_prediction", "noise_prediction")
    )
    sigmas, t, kind = _levels(config, n, schedule)
    levels = ended(sigmas, float(sigmas[-1] if kind else sigmas32(schedule)[0]))
    inside = levels[:-1][(t >= 200) & (t <= 800)]
    noisy = len(inside) > 0
    sampler = SASolver(
        order_of(config, "predictor_order", 2, 4),
        order_of(config, "corrector_order", 2, 4),
        algorithm == "data_prediction",
        read(config, "lower_order_final", bool, True),
        1.0 if noisy else 0.0,
        float(inside.min()) if noisy else 0.0,
        float(inside.max()) if noisy else 0.0,
    )
    return _plan(config, sampler, levels, t)


def dpm_sampler(config: Config, most: int) -> Sampler:
    """The multistep solver that solver_order, algorithm_type and solver_type name."""
    order = order_of(config, "solver_order", 2, most)
    algorithm, solver = _algorithm(config), _solver(config)
    euler = read(config, "euler_at_final", bool, False)
    lower = read(config, "lower_order_final", bool, True)
    if algorithm == "sde-dpmsolver" and order == 3:
        raise InputError("algorithm_type sde-dpmsolver has no solver_order 3: take 2")
    if algorithm in ("dpmsolver", "dpmsolver++"):
        if order == 1:
            return Euler()
        if order == 2 and algorithm == "dpmsolver++":
            return DPMSolverPP2M(solver, "always" if euler else "short" if lower else "never")
    return DPMSolver(order, algorithm, solver, lower, euler, reference=True)


def _algorithm(config: Config) -> str:
    algorithm = read(config, "algorithm_type", str, "dpmsolver++")
    if algorithm == "deis":  # diffusers reads it so
        algorithm = "dpmsolver++"
    if algorithm not in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"):
        raise InputError(f"algorithm_type {algorithm!r:.40} is unknown: use dpmsolver++")
    to_zero = read(config, "final_sigmas_type", str, "zero", FINALS) == "zero"
    if to_zero and not algorithm.endswith("++"):
        raise InputError(
            f"algorithm_type {algorithm} cannot end at 0: take final_sigmas_type sigma_min"
        )
    return algorithm


def _solver(config: Config) -> str:
    solver = read(config, "solver_type", str, "midpoint")
    if solver in ("logrho", "bh1", "bh2"):  # diffusers reads them so
        solver = "midpoint"
    if solver not in ("midpoint", "heun"):
        raise InputError(f"solver_type {solver!r:.40} is unknown: use midpoint")
    return solver


def _clipped(config: Config, schedule: Schedule) -> int:
    """One past the noisiest timestep that lambda_min_clipped leaves."""
    limit = config.get("lambda_min_clipped")
    if isinstance(limit, int | float) and not isinstance(limit, bool) and np.isfinite(limit):
        a = alphas_cumprod(schedule, single=True)
        rising = (np.log(np.sqrt(a)) - np.log(np.sqrt(1 - a)))[::-1]
        return schedule.timesteps - int(np.searchsorted(rising, np.float32(limit)))
    return schedule.timesteps


def _levels(
    config: Config, n: int, schedule: Schedule, lu: bool = False
) -> tuple[Levels, Levels, str | None]:
    """Sigmas [n], whole timesteps [n], and which other spacing made them."""
    spacing = spacing_of(config, "linspace")
    offset = read(config, "steps_offset", int, 0)
    table, total = sigmas32(schedule), _clipped(config, schedule)
    if spacing == "leading":
        t = np.arange(n, 0, -1.0) * (total // (n + 1)) + offset
    elif spacing == "trailing":
        t = np.round(np.arange(total, 0, -schedule.timesteps / n)) - 1
        t = t[:n][t[:n] >= 0]
    else:
        t = np.round(np.linspace(0, total - 1, n + 1))[::-1][:-1]
    within(t, schedule)
    kind = respacing(config, lu)
    if kind is None:
        return np.interp(t, np.arange(schedule.timesteps), table), t, None
    sigmas = respaced(kind, n, float(table[-1]), float(table[0]))
    t = log_timestep(table, sigmas)
    # Of the classes, only the one that knows lu leaves cosine's fractions to be cut off.
    cosine = lu and schedule.beta_schedule == "squaredcos_cap_v2"
    if kind in ("karras", "lu") and not cosine:
        t = np.round(t)
    return sigmas, np.trunc(t), kind  # diffusers stores them as whole numbers


def _plan(config: Config, sampler: Sampler, sigmas: Levels, t: Levels) -> Plan:
    plan = Plan(sampler, sigmas, t, unit(sigmas[0]), 1 / unit(sigmas[-1]))
    return plan._replace(threshold=threshold_of(config))
