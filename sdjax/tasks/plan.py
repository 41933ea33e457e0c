"""Which sampler and which noise levels: the model's own, or the caller's."""

import dataclasses
from typing import Any

import jax
import numpy as np

from sdjax.diffusion import profiles
from sdjax.diffusion.plan import Plan
from sdjax.diffusion.samplers import (
    DDIM,
    DDPM,
    DEIS,
    DPM2,
    LCM,
    LMS,
    PNDM,
    TCD,
    DPM2Ancestral,
    DPMSolver,
    DPMSolverPP2M,
    DPMSolverSingle,
    Euler,
    EulerAncestral,
    Heun,
    SASolver,
    UniPC,
)
from sdjax.errors import InputError
from sdjax.model import Model
from sdjax.types import Sampler

_PROFILES: dict[type, str] = {
    Euler: "EulerDiscreteScheduler",
    EulerAncestral: "EulerAncestralDiscreteScheduler",
    Heun: "HeunDiscreteScheduler",
    DDIM: "DDIMScheduler",
    DDPM: "DDPMScheduler",
    DPMSolverPP2M: "DPMSolverMultistepScheduler",
    DPMSolver: "DPMSolverMultistepScheduler",
    DPMSolverSingle: "DPMSolverSinglestepScheduler",
    DEIS: "DEISMultistepScheduler",
    UniPC: "UniPCMultistepScheduler",
    SASolver: "SASolverScheduler",
    PNDM: "PNDMScheduler",
    LCM: "LCMScheduler",
    TCD: "TCDScheduler",
    LMS: "LMSDiscreteScheduler",
    DPM2: "KDPM2DiscreteScheduler",
    DPM2Ancestral: "KDPM2AncestralDiscreteScheduler",
}
_SOLVERS = ("algorithm_type", "solver_type", "solver_order", "disable_corrector", "solver_p")
"""Keys that mean something else, or nothing, to another class."""

_TEXT = {"steps_offset": 1, "clip_sample": False}
_INPAINT = {"steps_offset": 1, "skip_prk_steps": True}
_FORCED: dict[str, dict[str, Any]] = {
    "sd1": _TEXT,
    "sd2-base": _TEXT,
    "sd2": _TEXT,
    "sd1-inpaint": _INPAINT,
    "sd2-inpaint": _INPAINT,
}
"""By family, what diffusers 0.42.1's pipelines put into their scheduler's config as they load."""


def choose(
    model: Model,
    steps: int,
    sampler: str | Sampler | Plan | None = None,
    spacing: str | None = None,
) -> Plan:
    """The plan for one image.

    Nothing given: what the model's scheduler_config.json says, as diffusers' pipeline of the
    model's family has it. A sampler alone: the noise levels that diffusers gives that sampler from
    the same config, and Euler's for a sampler that it does not know. A spacing: sigmas by its name,
    down to 0. A plan: itself.
    """
    if isinstance(sampler, Plan):
        if spacing is not None or np.ndim(sampler.sigmas) != 1:
            raise InputError(
                "a plan as sampler is of one image, with noise levels of its own: give it as its "
                "profile made it, and leave spacing out"
            )
        return sampler
    config, forced = model.scheduler.dict(), _FORCED.get(model.family, {})
    if sampler is None and spacing is None:
        return profiles.diffusers(config | forced, steps)
    if sampler is not None and not isinstance(sampler, str):
        _check(sampler)
    if isinstance(sampler, str):
        if sampler not in profiles.SAMPLERS:
            known = ", ".join(profiles.SAMPLERS)
            raise InputError(f"sampler must be one of {known}, got {sampler!r}")
        chosen = profiles.SAMPLERS[sampler]()
    elif sampler is None:
        chosen = profiles.diffusers(config | forced, steps).sampler
    else:
        chosen = sampler
    if spacing is not None:
        return profiles.k_diffusion(model.schedule, chosen, spacing, steps)
    profile = _PROFILES.get(type(chosen), "EulerDiscreteScheduler")
    # Classes differ in what they take for granted; what the model was trained with stays, and a
    # latent model that does not ask for clipping means none.
    own: dict[str, Any] = {"clip_sample": False, "skip_prk_steps": True}
    own |= model.schedule.config() | config
    # `from_config` forgets what a pipeline forced where the file is silent.
    own |= {key: value for key, value in forced.items() if key in config}
    if own.get("_class_name") != profile:
        own = {key: value for key, value in own.items() if key not in _SOLVERS}
    plan = profiles.diffusers(own | {"_class_name": profile}, steps)
    if type(chosen) is type(plan.sampler):
        # Where its steps land, say, belongs to the spacing.
        spaced = {k: getattr(plan.sampler, k) for k in getattr(chosen, "planned", ())}
        chosen = dataclasses.replace(chosen, **spaced)  # type: ignore[type-var]
    return profiles.with_levels(plan._replace(sampler=chosen), model.schedule)


def _check(sampler: Any) -> None:
    """Refuse what is no sampler, or none that a compiled program can take."""
    name = getattr(sampler, "__name__", type(sampler).__name__)
    if isinstance(sampler, type):
        raise InputError(f"sampler must be an instance, got the class {name}: pass {name}()")
    if not (callable(getattr(sampler, "init", None)) and callable(getattr(sampler, "step", None))):
        known = ", ".join(profiles.SAMPLERS)
        raise InputError(f"sampler must be one of {known}, or have init and step, got {sampler!r}")
    for leaf in jax.tree.leaves(sampler):
        if not isinstance(leaf, int | float | np.number | np.ndarray | jax.Array):
            raise InputError(
                f"{name} is not made of numbers (it holds {leaf!r:.60}): decorate the class with "
                "@sdjax.pytree, and declare names and flags with sdjax.static()"
            )
