"""How other programs discretise: a `Plan` from a scheduler's config, or by name.

`diffusers` from a config; `compvis`, `k_diffusion` and `a1111` by what these programs call things.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sdjax.diffusion import spacings
from sdjax.diffusion.plan import Plan, fitted
from sdjax.diffusion.samplers import (
    DDIM,
    DDPM,
    DEIS,
    DPM2,
    ERSDE,
    IPNDM,
    LCM,
    LMS,
    PNDM,
    SEEDS2,
    SEEDS3,
    TCD,
    ConsistencyModel,
    DPM2Ancestral,
    DPMAdaptive,
    DPMFast,
    DPMSolver,
    DPMSolverPP2M,
    DPMSolverPP2MSDE,
    DPMSolverPP2SAncestral,
    DPMSolverPP3MSDE,
    DPMSolverPPSDE,
    DPMSolverSingle,
    Euler,
    EulerAncestral,
    ExpHeun,
    GradientEstimation,
    Heun,
    HeunPP2,
    RESMultistep,
    Restart,
    SASolver,
    UniPC,
)
from sdjax.diffusion.schedulers import alpha_bar, multistep, sigma_space
from sdjax.diffusion.schedulers.a1111 import a1111 as a1111
from sdjax.diffusion.schedulers.compvis import compvis as compvis
from sdjax.diffusion.schedulers.tables import log_timestep, unit
from sdjax.diffusion.schedules import Schedule
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
    "dpm_solver": DPMSolver,
    "dpm_solver_single": DPMSolverSingle,
    "deis": DEIS,
    "unipc": UniPC,
    "sa_solver": SASolver,
    "plms": PNDM,
    "ipndm": IPNDM,
    "lcm": LCM,
    "tcd": TCD,
    "consistency": ConsistencyModel,
    "res_multistep": RESMultistep,
    "gradient_estimation": GradientEstimation,
    "exp_heun": ExpHeun,
    "seeds_2": SEEDS2,
    "seeds_3": SEEDS3,
    "er_sde": ERSDE,
    "heunpp2": HeunPP2,
    "restart": Restart,
}
"""Names for a command line; in code, pass the class's instance."""

SPACINGS = spacings.NAMES


_CLASSES: dict[str, Callable[[Mapping[str, Any], int, Schedule, list[str]], Plan]] = {
    "DDIMScheduler": alpha_bar.ddim,
    "DDIMParallelScheduler": alpha_bar.ddim,
    "DDIMInverseScheduler": alpha_bar.ddim_inverse,
    "DDPMScheduler": alpha_bar.ddpm,
    "DDPMParallelScheduler": alpha_bar.ddpm,
    "PNDMScheduler": alpha_bar.pndm,
    "IPNDMScheduler": alpha_bar.ipndm,
    "LCMScheduler": alpha_bar.lcm,
    "TCDScheduler": alpha_bar.tcd,
    "EulerDiscreteScheduler": sigma_space.sigma_space,
    "EulerAncestralDiscreteScheduler": sigma_space.sigma_space,
    "HeunDiscreteScheduler": sigma_space.sigma_space,
    "LMSDiscreteScheduler": sigma_space.sigma_space,
    "KDPM2DiscreteScheduler": sigma_space.sigma_space,
    "KDPM2AncestralDiscreteScheduler": sigma_space.sigma_space,
    "DPMSolverSDEScheduler": sigma_space.sigma_space,
    "EDMEulerScheduler": sigma_space.edm,
    "EDMDPMSolverMultistepScheduler": sigma_space.edm,
    "CMStochasticIterativeScheduler": sigma_space.consistency,
    "DPMSolverMultistepScheduler": multistep.dpm_multistep,
    "DPMSolverMultistepInverseScheduler": multistep.dpm_inverse,
    "DPMSolverSinglestepScheduler": multistep.dpm_singlestep,
    "DEISMultistepScheduler": multistep.deis,
    "UniPCMultistepScheduler": multistep.unipc,
    "SASolverScheduler": multistep.sa_solver,
}


def diffusers(config: Mapping[str, Any], steps: int) -> Plan:
    """What diffusers 0.42.1 does with a `scheduler_config.json` and a number of steps.

    Timesteps are exact, sigmas equal in float32, quirks included (its tables are float32 too). The
    run is `sample(plan.sampler, denoise, noise * plan.init_scale, plan.sigmas) * plan.final_scale`,
    with `denoiser(..., timesteps=plan)`; where the config clips or thresholds estimates, with
    `plan.bounded(denoise, clip, threshold)` of the module `plan`. What a config cannot say (DDIM's
    and TCD's eta, churn, tau_func) has the defaults of diffusers' own `step`. `note` says what a
    plan cannot hold; an unknown class is refused.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _CLASSES:
        raise InputError(f"_class_name {name!r:.60} is unknown: use one of {', '.join(_CLASSES)}")
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise InputError(f"steps must be a whole number of at least 1, got {steps!r:.60}")
    notes: list[str] = []
    plan = _CLASSES[name](config, int(steps), Schedule.from_config(config), notes)
    steps_down = np.diff(plan.sigmas.astype(np.float32))
    if "Inverse" in name:
        steps_down = -steps_down
    # A last step that goes nowhere is a no-op in diffusers (sigma_min is already reached), and
    # `sample`'s end.
    if not (steps_down[:-1] < 0).all() or steps_down[-1] > 0:
        raise InputError(f"{name} has no {steps} different noise levels: take fewer steps")
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
        t = log_timestep(schedule.sigmas, sigmas[:-1])
    low = spacing in ("leading", "quad")
    init = unit(sigmas[0]) if low else float(sigmas[0])
    return with_levels(Plan(chosen, sigmas, t, init), schedule)


def with_levels(plan: Plan, schedule: Schedule) -> Plan:
    """The plan of a sampler that looks ahead in its levels, or chooses them: `plan.fitted`."""
    sampler, sigmas = fitted(plan.sampler, plan.sigmas)
    t = plan.timesteps
    if not np.array_equal(sigmas, plan.sigmas):
        t = log_timestep(schedule.sigmas, sigmas[:-1])
    return plan._replace(sampler=sampler, sigmas=sigmas, timesteps=t)
