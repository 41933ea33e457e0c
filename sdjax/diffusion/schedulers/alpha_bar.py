"""Schedulers that count in alpha-bar: DDIM, its inversion, DDPM, PNDM, LCM, TCD, IPNDM.

Latents are variance preserving there: the start is unit noise, the end may stay above 0.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.diffusion.plan import Plan
from sdjax.diffusion.samplers.consistency import LCM, TCD
from sdjax.diffusion.samplers.ddim import DDIM, DDIMInverse
from sdjax.diffusion.samplers.ddpm import DDPM
from sdjax.diffusion.samplers.pndm import IPNDM, PNDM
from sdjax.diffusion.schedulers.tables import (
    MEND,
    Levels,
    clip_of,
    discrete,
    order_of,
    positive,
    spacing_of,
    threshold_of,
    unit,
    vp_sigmas,
    within,
)
from sdjax.diffusion.schedules import Schedule, read
from sdjax.errors import InputError
from sdjax.types import Sampler

Config = Mapping[str, Any]


def ddim(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """Song et al. (2010.02502), with eta 0."""
    t = discrete(config, n, schedule)
    landings = _landings(config, n, t, schedule, True)
    sigmas = np.append(vp_sigmas(schedule)[t.astype(int)], landings[-1])
    agree = np.array_equal(landings, sigmas[1:])
    threshold = threshold_of(config)  # in place of clip_sample, and of the estimate alone
    clip = clip_of(config, True) if threshold is None else None
    sampler = DDIM(landings=None if agree else landings, clip=clip, threshold=threshold)
    return _plan(sampler, sigmas, t)


def ddim_inverse(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """The network is told the timestep that a step goes to, at the level it comes from."""
    spacing = spacing_of(config, "leading")
    if spacing == "linspace":
        raise InputError("DDIMInverseScheduler has no linspace: take leading or trailing")
    t = discrete({**config, "timestep_spacing": spacing}, n, schedule)[::-1]
    table = vp_sigmas(schedule)
    below = np.minimum(t - schedule.timesteps // n, schedule.timesteps - 1).astype(int)
    to_one = read(config, "set_alpha_to_one", bool, True)
    to_one = read(config, "set_alpha_to_zero", bool, to_one)  # its old name, which wins
    # At level 0 x says nothing of the direction: the sampler looks from half the lowest level.
    sources = np.where(below >= 0, table[np.maximum(below, 0)], table[0] / (2 if to_one else 1))
    landings = table[t.astype(int)]
    if np.float32(sources[0]) == np.float32(landings[0]):
        # A first step that goes nowhere would be the end.
        sources[0] = np.nextafter(np.float32(sources[0]), np.float32(0))
    agree = np.array_equal(landings[:-1], sources[1:])
    sampler = DDIMInverse(
        clean=bool(to_one and below[0] < 0),
        prediction="v_prediction" if schedule.prediction == "v_prediction" else "epsilon",
        landings=None if agree else landings,
        clip=clip_of(config, True),
    )
    return _plan(sampler, np.append(sources, landings[-1]), t)


def ddpm(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """Ho et al. (2006.11239), with the fixed variances."""
    t = discrete(config, n, schedule)
    sigmas = np.append(vp_sigmas(schedule)[t.astype(int)], 0.0)
    variance = read(config, "variance_type", str, "fixed_small")
    if variance == "fixed_large_log":
        notes.append("variance_type fixed_large_log is NaN in diffusers; fixed_large is used")
    elif variance in ("learned", "learned_range"):
        notes.append(f"variance_type {variance} needs a variance that the network does not tell")
    elif variance not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise InputError(f"variance_type {variance!r:.40} is unknown: use fixed_small")
    if variance.startswith("fixed_large"):
        # Noise is left out at timestep 0 only, not in whichever step is the last.
        sampler = DDPM("fixed_large", noisy_end=bool(t[-1] > 0))
    else:
        sampler = DDPM()
    return _plan(sampler, sigmas, t)._replace(**_bounds(config, True))


def pndm(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """Evaluates n + 1 times with `skip_prk_steps`, else n + 9."""
    if schedule.prediction not in ("epsilon", "v_prediction"):
        raise InputError(
            f"prediction_type must be epsilon or v_prediction for PNDMScheduler, got "
            f"{schedule.prediction}: {MEND}"
        )
    t = discrete(config, n, schedule)
    landings = _landings(config, n, t, schedule, False)
    table = vp_sigmas(schedule)
    sigmas = np.append(table[t.astype(int)], landings[-1])
    if n > 1 and sigmas[-1] == sigmas[-2]:
        # A last step that goes nowhere still counts: with two, the first is taken again.
        sigmas[-1] = landings[-1] = np.nextafter(np.float32(sigmas[-1]), np.float32(0))
    agree = np.array_equal(landings, sigmas[1:])
    departure: float | None = None
    halves = None
    down = schedule.timesteps // n
    runge_kutta = not read(config, "skip_prk_steps", bool, False)
    if runge_kutta:
        if n < 4:
            raise InputError(
                f"PNDMScheduler needs at least 4 steps, got {n}: take more, or skip_prk_steps"
            )
        # T // n may be odd: then going half down from above and half up from below differ.
        half = down // 2
        aims, middles = t - half, np.append(t[1:] + half, t[-1])
        aims[3:], middles[3:] = t[3:], t[3:]
        halves = (table[aims.astype(int)], table[middles.astype(int)])
    elif spacing_of(config, "leading") != "leading":
        # A number for every n: plans of one batch must agree on having one.
        left = t[1:2] + down if n > 1 else t
        within(left, schedule)
        departure = float(table[int(left[0])])
    sampler = PNDM(
        runge_kutta,
        schedule.prediction,
        landings=None if agree else landings,
        departure=departure,
        halves=halves,
    )
    return _plan(sampler, sigmas, t)


def lcm(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """Luo et al. (2310.04378)."""
    t = _distilled(config, n, schedule)
    sigmas = np.append(vp_sigmas(schedule)[t.astype(int)], 0.0)
    # c_skip of the consistency function (2310.04378, section 4.1), sigma_data 0.5.
    skips = 0.25 / ((t * positive(config, "timestep_scaling", 10.0)) ** 2 + 0.25)
    return _plan(LCM(skips), sigmas, t)._replace(**_bounds(config, False))


def tcd(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """The paper's gamma, here eta, is no key of the config: `step`'s default, 0.3."""
    t = _distilled(config, n, schedule)
    table = vp_sigmas(schedule)
    following = np.append(t[1:], 0.0)
    levels = np.floor(np.float32(1 - 0.3) * following.astype(np.float32))
    return _plan(TCD(0.3, table[levels.astype(int)]), table[np.append(t, 0.0).astype(int)], t)


def ipndm(config: Config, n: int, schedule: Schedule, notes: list[str]) -> Plan:
    """Its own schedule, sigma(t) = tan of the angle whose sine is sin(t pi / 2)^2, and v."""
    if config.get("trained_betas") is not None:
        raise InputError("trained_betas are no betas in IPNDMScheduler: leave them out")
    steps = np.linspace(1, 0, n + 1).astype(np.float32)
    betas = np.sin(steps * np.float32(np.pi) / np.float32(2)) ** 2
    alphas = np.sqrt(np.float32(1) - betas**2)
    # The first level has no signal at all; float32 cannot tell 2**24 from that.
    sigmas = np.append(2.0**24, betas[1:].astype(np.float64) / alphas[1:])
    t = np.arctan2(betas, alphas) / np.float32(np.pi) * np.float32(2)
    return _plan(IPNDM(blind_start=True), sigmas, t[:-1].astype(np.float64))


def _plan(sampler: Sampler, sigmas: Levels, t: Levels) -> Plan:
    return Plan(sampler, sigmas, t, unit(sigmas[0]), 1 / unit(sigmas[-1]))


def _bounds(config: Config, clipped: bool) -> dict[str, Any]:
    """A plan's `clip` or `threshold`: never both."""
    threshold = threshold_of(config)
    return {"threshold": threshold} if threshold else {"clip": clip_of(config, clipped)}


def _landings(config: Config, n: int, t: Levels, schedule: Schedule, to_one: bool) -> Levels:
    """The step goes down by T // n, whatever the spacing; only `leading` agrees for every n."""
    table = vp_sigmas(schedule)
    final = 0.0 if read(config, "set_alpha_to_one", bool, to_one) else table[0]
    below = t - schedule.timesteps // n
    return np.where(below >= 0, table[np.maximum(below, 0).astype(int)], final)


def _distilled(config: Config, n: int, schedule: Schedule) -> Levels:
    """Timesteps [n] spread over those of the distillation."""
    total = schedule.timesteps
    original = order_of(config, "original_inference_steps", min(50, total), total)
    if n > original:
        raise InputError(
            f"{config['_class_name']} has at most original_inference_steps = {original} steps, "
            f"got {n}: take fewer steps"
        )
    trained = np.arange(original, 0, -1) * (total // original) - 1
    return trained[np.floor(np.linspace(0, original, n, endpoint=False)).astype(int)].astype(float)
