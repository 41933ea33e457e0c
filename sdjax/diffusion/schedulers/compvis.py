"""The original repositories' samplers: CompVis's latent-diffusion and stable-diffusion.

Facts from `ldm/models/diffusion/ddim.py`, `plms.py` and `dpm_solver/`, and
`ldm/modules/diffusionmodules/util.py`. `profiles.compvis` is the way in.
"""

import numpy as np
from jax.typing import ArrayLike

from sdjax.diffusion import spacings
from sdjax.diffusion.plan import Plan
from sdjax.diffusion.samplers.ddim import DDIM
from sdjax.diffusion.samplers.dpmpp import DPMSolverPP2M
from sdjax.diffusion.samplers.pndm import PNDM
from sdjax.diffusion.schedulers.tables import Levels, unit
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import InputError
from sdjax.types import Sampler

SAMPLERS = ("ddim", "plms", "dpm_solver")
DISCRETIZE = ("uniform", "quad")
SKIPS = ("time_uniform", "time_quadratic", "logSNR")


def compvis(
    schedule: Schedule,
    sampler: str = "plms",
    steps: int = 50,
    eta: ArrayLike = 0.0,
    discretize: str = "uniform",
) -> Plan:
    """What CompVis's stable-diffusion does with `--plms`, `--dpm_solver` or DDIM, and a number of
    steps.

    "ddim" (Song et al., 2010.02502) and "plms" (Liu et al., 2202.09778) stand at timesteps 1,
    1 + c, ... with c = T // steps, so that 30 steps are 31; the last step goes from timestep 1 to
    0, sigma 0.029, and stays there. `discretize` "quad" is theirs for DDIM; of timesteps that it
    repeats one remains, as a step between the two moves nothing. `eta` is DDIM's alone.

    "dpm_solver" (Lu et al., 2211.01095) is DPM-Solver++ 2M on `steps` + 1 even times, between
    timesteps with log alpha-bar in between, the last step of fewer than 15 of first order; it ends
    at timestep 0.

    Raises:
        InputError: a step count that the original fails with: where T - 1 divides by c, as for 9
            steps, it looks for timestep T.
    """
    for name, value, known in (
        ("sampler", sampler, SAMPLERS),
        ("discretize", discretize, DISCRETIZE),
    ):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r:.60}")
    least = 1 if sampler == "ddim" else 2
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < least:
        raise InputError(f"steps of {sampler} must be {least} or more, got {steps!r:.60}")
    if sampler != "ddim" and (np.any(np.asarray(eta)) or discretize != "uniform"):
        raise InputError(f"eta and discretize are ddim's: leave them out for {sampler}")
    if sampler == "dpm_solver":
        sigmas, t = continuous(schedule, int(steps))
        return variance_preserving(DPMSolverPP2M("midpoint", "short"), sigmas, t)
    table = table32(schedule)
    t = _timesteps(discretize, int(steps), len(table))
    sigmas = np.append(table[t.astype(int)], table[0])
    return variance_preserving(DDIM(eta) if sampler == "ddim" else PNDM(), sigmas, t)


def table32(schedule: Schedule) -> Levels:
    """Sigmas [T] of alpha-bars in float32, as the model keeps them, made in float64."""
    a = schedule.alphas_cumprod.astype(np.float32).astype(np.float64)
    return np.asarray(np.sqrt((1 - a) / a))


def continuous(schedule: Schedule, n: int, skip: str = "time_uniform") -> tuple[Levels, Levels]:
    """DPM-Solver's discrete schedule in continuous time: sigmas [n+1], and the network's times [n].

    `NoiseScheduleVP`: training timestep i stands at time (i + 1) / T, log alpha-bar is linear in
    between, and the run goes from time 1 to 1 / T in steps even in time, in its root or in the log
    of the signal-to-noise ratio.
    """
    table = table32(schedule)
    total, log_a = len(table), -np.log1p(table**2)
    index = np.arange(total)
    if skip == "logSNR":
        sigmas = np.exp(np.linspace(np.log(table[-1]), np.log(table[0]), n + 1))
        at = np.interp(-np.log1p(sigmas**2), log_a[::-1], index[::-1])
    else:
        power = 2 if skip == "time_quadratic" else 1
        at = np.linspace(1, (1 / total) ** (1 / power), n + 1) ** power * total - 1
        sigmas = np.sqrt(np.expm1(-np.interp(at, index, log_a)))
    return sigmas, at[:-1] * (1000 / total)  # the factor is 1000, whatever T


def variance_preserving(sampler: Sampler, sigmas: Levels, t: Levels) -> Plan:
    """Latents are x / sqrt(1 + sigma^2) there: unit noise at the start, signal at the end."""
    return Plan(sampler, sigmas, t, unit(sigmas[0]), 1 / unit(sigmas[-1]))


def _timesteps(discretize: str, n: int, total: int) -> Levels:
    """`make_ddim_timesteps`, falling."""
    if discretize == "quad":
        t = spacings.quad(n, total)
    elif n > total:
        raise InputError(f"steps must be at most {total}, got {n}")
    else:
        t = np.arange(0.0, total, total // n)[::-1] + 1
    if t[0] >= total:
        raise InputError(
            f"{n} steps of {total // n} timesteps end at timestep {t[0]:.0f}, where the original "
            "fails too: take one step more or less"
        )
    return t
