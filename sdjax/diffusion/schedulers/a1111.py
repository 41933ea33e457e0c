"""AUTOMATIC1111's stable-diffusion-webui: samplers and schedule types by their labels.

Facts from `modules/sd_samplers_kdiffusion.py`, `sd_samplers_timesteps.py`,
`sd_samplers_timesteps_impl.py`, `sd_samplers_lcm.py`, `sd_schedulers.py` and `shared_options.py`
(1.9 and later), and k-diffusion's `external.py`. `profiles.a1111` is the way in.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from sdjax.diffusion import spacings
from sdjax.diffusion.plan import Plan, fitted
from sdjax.diffusion.samplers.consistency import LCM
from sdjax.diffusion.samplers.ddim import DDIM
from sdjax.diffusion.samplers.dpm2 import DPM2, DPM2Ancestral
from sdjax.diffusion.samplers.dpm_adaptive import DPMAdaptive
from sdjax.diffusion.samplers.dpm_fast import DPMFast
from sdjax.diffusion.samplers.dpmpp import DPMSolverPP2M
from sdjax.diffusion.samplers.dpmpp_sde import DPMSolverPP2MSDE, DPMSolverPP3MSDE, DPMSolverPPSDE
from sdjax.diffusion.samplers.dpmpp_single import DPMSolverPP2SAncestral
from sdjax.diffusion.samplers.euler import Euler, EulerAncestral
from sdjax.diffusion.samplers.heun import Heun
from sdjax.diffusion.samplers.lms import LMS
from sdjax.diffusion.samplers.pndm import PNDM
from sdjax.diffusion.samplers.restart import Restart
from sdjax.diffusion.samplers.unipc import UniPC
from sdjax.diffusion.schedulers.compvis import SKIPS, continuous, table32, variance_preserving
from sdjax.diffusion.schedulers.tables import Levels, log_timestep, unit
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import InputError
from sdjax.types import Sampler

AYS = {
    "sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
"""Align Your Steps, in three decimals."""


class _Label(NamedTuple):
    sampler: Any
    automatic: str = "Uniform"  # the schedule type that "Automatic" stands for
    discard: bool = False  # the last level above 0 of one more
    inside: bool = False  # evaluates between levels


SAMPLERS = {
    "DPM++ 2M": _Label(DPMSolverPP2M(), "Karras"),
    "DPM++ SDE": _Label(DPMSolverPPSDE(), "Karras", inside=True),
    "DPM++ 2M SDE": _Label(DPMSolverPP2MSDE(), "Exponential"),
    "DPM++ 2M SDE Heun": _Label(DPMSolverPP2MSDE("heun"), "Exponential"),
    "DPM++ 2S a": _Label(DPMSolverPP2SAncestral(), "Karras", inside=True),
    "DPM++ 3M SDE": _Label(DPMSolverPP3MSDE(), "Exponential", discard=True),
    "Euler a": _Label(EulerAncestral()),
    "Euler": _Label(Euler()),
    "LMS": _Label(LMS()),
    "Heun": _Label(Heun()),
    "DPM2": _Label(DPM2(), "Karras", True, True),
    "DPM2 a": _Label(DPM2Ancestral(), "Karras", True, True),
    "DPM fast": _Label(DPMFast(), inside=True),
    "DPM adaptive": _Label(DPMAdaptive(), inside=True),
    "Restart": _Label(Restart(), "Karras"),
    "LCM": _Label(LCM()),
    "DDIM": _Label(DDIM()),
    "PLMS": _Label(PNDM()),
    "UniPC": _Label(UniPC(3, "bh1")),
}
"""By the label in a picture's `parameters`."""


@dataclasses.dataclass(frozen=True)
class _Model:
    """k-diffusion's `CompVisDenoiser`: noise levels, and timesteps by their logarithm."""

    table: Levels  # rising
    low: float
    high: float
    rho: float
    beta: tuple[float, float]
    ays: str
    quantize: bool
    stride: int = 1  # LCM's wrapper knows every 20th timestep

    def time(self, sigmas: Levels) -> Levels:
        if self.quantize or self.stride > 1:
            away = np.log(sigmas)[..., None] - np.log(self.table)
            at = np.abs(away).argmin(-1).astype(np.float64)
        else:
            at = log_timestep(self.table, sigmas)
        return at * self.stride + self.stride - 1

    def level(self, t: Levels) -> Levels:
        at = (t - (self.stride - 1)) / self.stride
        return np.exp(np.interp(at, np.arange(len(self.table)), np.log(self.table)))

    def even(self, high: float, low: float, n: int) -> Levels:
        """Noise levels at `n` even timesteps."""
        start, end = self.time(np.array([high, low]))
        return self.level(np.linspace(start, end, n))


def _then_0(sigmas: Levels) -> Levels:
    return np.append(sigmas, 0.0)


def _align_your_steps(n: int, model: _Model) -> Levels:
    table = np.asarray(AYS[model.ays])[::-1]
    at = np.linspace(0, 1, n)  # one step stands at the lowest
    return _then_0(np.exp(np.interp(at, np.linspace(0, 1, len(table)), np.log(table)))[::-1])


SCHEDULES: dict[str, Callable[[int, _Model], Levels]] = {
    "Uniform": lambda n, m: _then_0(m.even(m.table[-1], m.table[0], n)),
    "Karras": lambda n, m: spacings.karras(n, m.low, m.high, m.rho or 7.0),
    "Exponential": lambda n, m: spacings.exponential(n, m.low, m.high),
    "Polyexponential": lambda n, m: spacings.polyexponential(n, m.low, m.high, m.rho or 1.0),
    "SGM Uniform": lambda n, m: _then_0(m.even(m.high, m.low, n + 1)[:-1]),
    "KL Optimal": lambda n, m: spacings.kl_optimal(n + 1, m.low, m.high)[:-1],
    "Align Your Steps": _align_your_steps,
    "Simple": lambda n, m: _then_0(m.table[spacings.simple(n, len(m.table)).astype(int)]),
    "Normal": lambda n, m: _then_0(m.even(m.high, m.low, n)),
    "DDIM": lambda n, m: _then_0(m.table[spacings.ddim_uniform(n, len(m.table)).astype(int)]),
    "Beta": lambda n, m: spacings.beta_sigmas(n, m.low, m.high, *m.beta),
}
"""By the label that `parameters` calls "Schedule type"."""


def a1111(
    schedule: Schedule,
    sampler: str,
    scheduler: str = "Automatic",
    steps: int = 20,
    *,
    eta: ArrayLike | None = None,
    sigma_min: float = 0.0,
    sigma_max: float = 0.0,
    rho: float = 0.0,
    beta: tuple[float, float] = (0.6, 0.6),
    sdxl: bool = False,
    quantize: bool = False,
    discard_penultimate: bool = False,
    sgm_noise_multiplier: bool = False,
    old_karras: bool = False,
    unipc_variant: str = "bh1",
    unipc_skip: str = "time_uniform",
    unipc_order: int = 3,
    unipc_lower_order_final: bool = True,
) -> Plan:
    """What A1111's web UI does from text, by what it writes into a picture: "DPM++ 2M" and schedule
    type "Karras", or "DPM++ 2M Karras" as older versions wrote.

    "Automatic" is the sampler's own choice, in `SAMPLERS`. Numbers that are 0 stand for the model's
    and the schedule's own, as its options have it. DDIM, PLMS and UniPC know no schedule types.

    Its quirks, all kept: DDIM and PLMS stop at timestep 1 and take one step less than they have
    timesteps; DPM2, DPM2 a and DPM++ 3M SDE strike out the last level above 0 of one more; KL
    Optimal ends at sigma_min; DPM fast and adaptive add noise, and run from the model's highest to
    its lowest level whatever the schedule type; LCM's timesteps are the nearest of 50.

    Args:
        eta: "Eta", "Eta DDIM"; None is 0 for DDIM and 1 for who has one.
        sigma_min, sigma_max, rho: "Schedule min sigma", "Schedule max sigma", "Schedule rho".
        beta: "Beta schedule alpha" and "beta".
        sdxl: whether the model is, for Align Your Steps.
        quantize: "enable quantization in K samplers": the nearest whole timesteps.
        discard_penultimate: "Discard penultimate sigma": for every sampler; DDIM, PLMS and UniPC
            count their timesteps for one step more instead.
        sgm_noise_multiplier: "SGM noise multiplier": starts from sqrt(1 + sigma^2) noise.
        old_karras: "use old karras scheduler sigmas": from 10 to 0.1.
        unipc_variant: "UniPC variant", bh1 or bh2; and its other options.
    """
    label, kind = _labels(sampler, scheduler)
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise InputError(f"steps must be a whole number of at least 1, got {steps!r:.60}")
    if schedule.timesteps != 1000:
        raise InputError(f"A1111 counts on 1000 timesteps, the model has {schedule.timesteps}")
    known, chosen = SAMPLERS[label], SAMPLERS[label].sampler
    table, n = table32(schedule), int(steps) + (known.discard or discard_penultimate)
    if hasattr(chosen, "eta"):
        usual = 0.0 if label == "DDIM" else 1.0
        chosen = dataclasses.replace(chosen, eta=usual if eta is None else eta)
    if label in ("DDIM", "PLMS"):
        return _timesteps(label, chosen, n, table)
    if label == "UniPC":
        n = len(np.arange(0, 1000, 1000 // _at_most(n, 1000, label)))
        if unipc_skip not in SKIPS or n < unipc_order:
            raise InputError(
                f"UniPC takes {unipc_order} steps or more and a skip type of {', '.join(SKIPS)}, "
                f"got {n} and {unipc_skip!r:.60}"
            )
        chosen = UniPC(unipc_order, unipc_variant, lower_order_final=unipc_lower_order_final)
        return variance_preserving(chosen, *continuous(schedule, n, unipc_skip))

    stride = 20 if label == "LCM" else 1
    table = table[stride - 1 :: stride]
    low, high = (0.1, 10.0) if old_karras else (float(table[0]), float(table[-1]))
    model = _Model(
        table,
        sigma_min or low,
        sigma_max or high,
        rho,
        beta,
        "sdxl" if sdxl else "sd1",
        quantize,
        stride,
    )
    sigmas = SCHEDULES[known.automatic if kind == "Automatic" else kind](n, model)
    if known.discard or discard_penultimate:
        sigmas = np.append(sigmas[:-2], sigmas[-1])
    if not (np.diff(sigmas) < 0).all() or not np.isfinite(sigmas).all():
        raise InputError(f"{kind} has no {steps} different noise levels: take fewer steps")
    init = unit(sigmas[0]) if sgm_noise_multiplier else float(sigmas[0])
    if label == "DPM fast":
        chosen, sigmas = DPMFast.schedule(int(steps), table[0], table[-1], chosen.eta)
    elif label == "DPM adaptive":
        sigmas = table[[-1, 0]]
    chosen, sigmas = fitted(chosen, sigmas)
    t = model.time(sigmas[:-1])
    if label == "LCM":
        chosen = LCM(0.25 / ((t * 10) ** 2 + 0.25))
    note = None
    if quantize and known.inside:
        note = f"within a step of {label}, timesteps are not rounded"
    return Plan(chosen, sigmas, t, init, note=note)


def _timesteps(label: str, chosen: Sampler, n: int, table: Levels) -> Plan:
    """DDIM and PLMS: timesteps 1, 1 + c, ..., the first of which is where the run ends."""
    t = np.clip(np.arange(0, 1000, 1000 // _at_most(n, 500, label))[::-1] + 1, 0, 999)
    least = 2 if label == "DDIM" else 3
    if len(t) < least:
        raise InputError(f"steps of {label} must be {least} or more: it takes one less")
    return variance_preserving(chosen, table[t], t[:-1].astype(np.float64))


def _at_most(n: int, most: int, label: str) -> int:
    if n > most:
        raise InputError(f"{label} has at most {most} steps, got {n}: take fewer steps")
    return n


def _labels(sampler: str, scheduler: str) -> tuple[str, str]:
    """The labels as they are in the tables; a sampler's may end with its schedule type's."""
    if not isinstance(sampler, str) or not isinstance(scheduler, str):
        raise InputError(f"labels must be strings, got {sampler!r:.60} and {scheduler!r:.60}")
    kinds = {name.lower(): name for name in ("Automatic", *SCHEDULES)}
    labels = {name.lower(): name for name in SAMPLERS}
    label, kind = sampler.strip().lower(), scheduler.strip().lower()
    for name in sorted(kinds, key=len, reverse=True):  # "SGM Uniform" before "Uniform"
        if label.endswith(f" {name}"):
            label, kind = label.removesuffix(f" {name}"), name
            break
    if label not in labels:
        raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r:.60}")
    if kind not in kinds:
        known = ", ".join(("Automatic", *SCHEDULES))
        raise InputError(f"scheduler must be one of {known}, got {scheduler!r:.60}")
    return labels[label], kinds[kind]
