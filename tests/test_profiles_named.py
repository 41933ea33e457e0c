"""The profiles of CompVis's and A1111's programs against their equations, in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_profiles import network

from sdjax import images
from sdjax.diffusion import noise, sampling, spacings
from sdjax.diffusion.profiles import SAMPLERS, a1111, compvis
from sdjax.diffusion.samplers import DPMAdaptive, DPMSolverPP2M, DPMSolverPP2MSDE, Restart, UniPC
from sdjax.diffusion.schedules import Schedule, planned_timestep, to_x0
from sdjax.errors import InputError

SD = Schedule()
# The model's buffers: made in float64, kept in float32.
BARS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).astype("f").astype("d")
TABLE = np.sqrt((1 - BARS) / BARS)
LOW, HIGH = TABLE[0], TABLE[-1]
START = np.random.default_rng(0).standard_normal((1, 2, 2, 1))
DRAWS = np.random.default_rng(1).standard_normal((40, 1, *START.shape))


def ours(plan):
    """A plan run on the stand-in for a network, from unit noise to variance-preserving latents."""

    def denoise(x, sigma):
        t = planned_timestep(SD, sigma, plan.sigmas, plan.timesteps)
        return to_x0(SD, network(x / jnp.sqrt(1 + sigma**2), t), x, sigma)

    with jax.disable_jit(), jax.enable_x64(True):
        x, draws = jnp.asarray(START * plan.init_scale), noise.Tape(jnp.asarray(DRAWS))
        x = sampling.sample(plan.sampler, denoise, x, plan.sigmas, draws)
        return np.asarray(x) * plan.final_scale


def ddim_loop(t, prev, eta, draws, multistep=False):
    """DDIM and PLMS as both programs write them: t and the alpha-bars of where steps go, rising."""
    x, old = START, []
    for i, (t_i, after) in enumerate(list(zip(t, prev, strict=True))[::-1]):
        a = BARS[t_i]
        std = eta * np.sqrt((1 - after) / (1 - a) * (1 - a / after))

        def step(eps, x=x, a=a, after=after, std=std):
            x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
            return np.sqrt(after) * x0 + np.sqrt(1 - after - std**2) * eps

        eps = network(x, t_i)
        if not multistep:
            x = step(eps) + std * draws[i, 0]
            continue
        if not old:
            mean = (eps + network(step(eps), t[max(len(t) - 2 - i, 0)])) / 2
        elif len(old) == 1:
            mean = (3 * eps - old[-1]) / 2
        elif len(old) == 2:
            mean = (23 * eps - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            mean = (55 * eps - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x, old = step(mean), [*old, eps][-3:]
    return x


@pytest.mark.parametrize(
    ("sampler", "n", "eta", "discretize"),
    [
        ("ddim", 6, 0.0, "uniform"),
        ("ddim", 7, 0.8, "uniform"),  # 8 steps
        ("ddim", 1, 0.5, "uniform"),
        ("ddim", 32, 0.3, "quad"),  # of which two stand where others do
        ("plms", 7, 0.0, "uniform"),
        ("plms", 2, 0.0, "uniform"),
    ],
)
def test_compvis_trajectories_are_those_of_its_equations(sampler, n, eta, discretize):
    if discretize == "uniform":
        t = np.asarray(list(range(0, 1000, 1000 // n))) + 1
    else:
        t = (np.linspace(0, np.sqrt(800), n) ** 2).astype(int) + 1
    prev = np.asarray([BARS[0], *BARS[t[:-1]]])
    moves = np.append(True, np.diff(t) > 0)[::-1]  # others draw noise of no size
    draws = np.zeros((len(t), *DRAWS.shape[1:]))
    draws[moves] = DRAWS[: moves.sum()]
    want = ddim_loop(t, prev, eta, draws, sampler == "plms")
    plan = compvis(SD, sampler, n, eta, discretize)
    np.testing.assert_array_equal(plan.timesteps, np.unique(t)[::-1])
    np.testing.assert_allclose(ours(plan), want, rtol=1e-7, atol=1e-7)


def log_alpha(t):
    """The time of training timestep i is (i + 1) / 1000."""
    return np.interp(t, np.arange(1, 1001) / 1000, 0.5 * np.log(BARS))


@pytest.mark.parametrize("n", [2, 6, 16])
def test_compvis_dpm_solver_is_that_of_its_equations(n):
    """Order 2, but for the first step, and for the last of fewer than 15."""
    times = np.linspace(1, 1e-3, n + 1)
    alpha = np.exp(log_alpha(times))
    sigma = np.sqrt(1 - alpha**2)
    lam = np.log(alpha / sigma)
    x, old = START, None
    for i, t in enumerate(times[:-1]):
        x0 = (x - sigma[i] * network(x, (t - 1e-3) * 1000)) / alpha[i]
        h = lam[i + 1] - lam[i]
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * x0
        if i > 0 and not (n < 15 and i == n - 1):
            r = (lam[i] - lam[i - 1]) / h
            x = x - 0.5 * alpha[i + 1] * np.expm1(-h) * (x0 - old) / r
        old = x0
    np.testing.assert_allclose(ours(compvis(SD, "dpm_solver", n)), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("label", "n", "eta"),
    [("DDIM", 6, None), ("DDIM", 9, 0.7), ("PLMS", 7, None), ("PLMS", 3, None)],
)
def test_a1111_ends_ddim_and_plms_at_timestep_1(label, n, eta):
    """And at 999, not 1000, where 1000 // n meets it."""
    t = np.clip(np.asarray(list(range(0, 1000, 1000 // n))) + 1, 0, 999)
    want = ddim_loop(t[1:], BARS[t[:-1]], eta or 0.0, DRAWS, label == "PLMS")
    np.testing.assert_allclose(ours(a1111(SD, label, steps=n, eta=eta)), want, rtol=1e-7, atol=1e-7)


def uniform_time(s):
    """k-diffusion's sigma_to_t: linear in log sigma."""
    away = np.log(s) - np.log(TABLE)
    low = min(int(np.argmax(np.cumsum(away >= 0))), 998)
    a, b = np.log(TABLE[low]), np.log(TABLE[low + 1])
    w = np.clip((a - np.log(s)) / (a - b), 0, 1)
    return (1 - w) * low + w * (low + 1)


def levels_at(times):
    return [np.exp(np.interp(t, np.arange(1000), np.log(TABLE))) for t in times]


def schedule_of(kind, n, low=LOW, high=HIGH, rho=None):
    """A1111's functions of n, its sigmas."""
    if kind in ("Uniform", "Normal"):
        return [*levels_at(np.linspace(uniform_time(high), uniform_time(low), n)), 0]
    if kind == "Karras":
        ramp, rho = np.linspace(0, 1, n), rho or 7
        return [*(high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho, 0]
    if kind == "Exponential":
        return [*np.exp(np.linspace(np.log(high), np.log(low), n)), 0]
    if kind == "Polyexponential":
        ramp = np.linspace(1, 0, n) ** (rho or 1)
        return [*np.exp(ramp * (np.log(high) - np.log(low)) + np.log(low)), 0]
    if kind == "SGM Uniform":
        return [*levels_at(np.linspace(uniform_time(high), uniform_time(low), n + 1)[:-1]), 0]
    if kind == "KL Optimal":
        i = np.arange(n + 1) / n
        return np.tan(i * np.arctan(low) + (1 - i) * np.arctan(high))
    if kind == "Align Your Steps":
        table = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
        if n != 11:
            ys = np.interp(np.linspace(0, 1, n), np.linspace(0, 1, 11), np.log(table[::-1]))
            table = np.exp(ys)[::-1]
        return [*table, 0]
    if kind == "Simple":
        return [TABLE[-(1 + int(x * (1000 / n)))] for x in range(n)] + [0]
    if kind == "DDIM":
        return [TABLE[x] for x in range(1, 1000, max(1000 // n, 1))][::-1] + [0]
    assert kind == "Beta"
    return [low + stats.beta.ppf(x, 0.6, 0.6) * (high - low) for x in 1 - np.linspace(0, 1, n)] + [
        0
    ]


KINDS = (
    *("Uniform", "Karras", "Exponential", "Polyexponential", "SGM Uniform", "KL Optimal"),
    *("Align Your Steps", "Simple", "Normal", "DDIM", "Beta"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a1111_schedule_types_are_its_functions(kind):
    for n in (1, 2, 7, 11, 30):
        plan = a1111(SD, "Euler a", kind, n)
        np.testing.assert_allclose(plan.sigmas, schedule_of(kind, n), rtol=1e-9, atol=1e-12)
        times = [uniform_time(s) for s in plan.sigmas[:-1]]
        np.testing.assert_allclose(plan.timesteps, times, atol=1e-6)
        assert plan.init_scale == pytest.approx(plan.sigmas[0]) and plan.final_scale == 1
        fewer = a1111(SD, "DPM2", kind, n).sigmas
        longer = list(schedule_of(kind, n + 1))
        np.testing.assert_allclose(fewer, longer[:-2] + longer[-1:], rtol=1e-9, atol=1e-12)
    options = {"sigma_min": 0.1, "sigma_max": 9.0, "rho": 3.0}
    if kind not in ("Uniform", "Align Your Steps", "Simple", "DDIM"):
        want = schedule_of(kind, 7, 0.1, 9.0, 3.0)
        np.testing.assert_allclose(a1111(SD, "LMS", kind, 7, **options).sigmas, want, rtol=1e-9)
    else:
        np.testing.assert_allclose(
            a1111(SD, "LMS", kind, 7, **options).sigmas, schedule_of(kind, 7), rtol=1e-9
        )


def test_a1111_labels_choose_what_the_program_chooses():
    assert a1111(SD, "DPM++ 2M").sampler == DPMSolverPP2M()
    for label, kind, written in (
        ("DPM++ 2M", "Karras", "DPM++ 2M Karras"),
        ("DPM++ 2M SDE Heun", "Exponential", "dpm++ 2m sde heun exponential"),
        ("Heun", "Uniform", "Heun"),
        ("DPM++ 2S a", "SGM Uniform", "DPM++ 2S a SGM Uniform"),
    ):
        plans = [a1111(SD, label, kind, 9), a1111(SD, written, "Automatic", 9)]
        assert plans[0].sampler == plans[1].sampler
        np.testing.assert_array_equal(plans[0].sigmas, plans[1].sigmas)
    automatic = {"DPM++ 2M": "Karras", "DPM++ 2M SDE": "Exponential", "Euler": "Uniform"}
    for label, kind in automatic.items():
        np.testing.assert_allclose(a1111(SD, label, steps=9).sigmas, schedule_of(kind, 9))
    assert a1111(SD, "DPM++ 2M SDE Heun", eta=0.4).sampler == DPMSolverPP2MSDE("heun", 0.4)
    assert a1111(SD, "DPM++ 3M SDE").sampler.eta == 1 and a1111(SD, "DDIM").sampler.eta == 0


def test_a1111_reads_the_labels_that_pictures_get_here():
    for name, label in images._SAMPLERS.items():
        if label != "DDPM":  # which it does not have
            assert type(a1111(SD, label, steps=4).sampler) is SAMPLERS[name]
    for name, label in images._SPACINGS.items():
        if not name.startswith("align"):  # its tables are rounded
            sigmas = spacings.named(name, 9, SD)[0]
            sigmas = spacings.kl_optimal(10, LOW, HIGH)[:-1] if "kl" in name else sigmas
            np.testing.assert_allclose(a1111(SD, "Euler", label, 9).sigmas, sigmas, rtol=1e-4)


def test_a1111_options_do_what_they_say():
    plain = a1111(SD, "Euler", "Karras", 8)
    wide = a1111(SD, "Euler", "Karras", 8, sgm_noise_multiplier=True)
    assert wide.init_scale == pytest.approx(np.sqrt(1 + HIGH**2))
    whole = a1111(SD, "Euler", "Karras", 8, quantize=True)
    near = [np.argmin(abs(np.log(s) - np.log(TABLE))) for s in plain.sigmas[:-1]]
    np.testing.assert_array_equal(whole.timesteps, near)
    assert whole.note is None and "DPM2" in a1111(SD, "DPM2", quantize=True).note
    struck = a1111(SD, "Euler", "Karras", 8, discard_penultimate=True)
    nine = schedule_of("Karras", 9)
    np.testing.assert_allclose(struck.sigmas, nine[:-2] + nine[-1:])
    old = a1111(SD, "Euler", "Karras", 8, old_karras=True).sigmas
    np.testing.assert_allclose(old, schedule_of("Karras", 8, 0.1, 10.0))
    assert a1111(SD, "Euler", "Align Your Steps", 11, sdxl=True).sigmas[1] == pytest.approx(6.315)
    assert len(a1111(SD, "DDIM", steps=9, discard_penultimate=True).timesteps) == 9


def test_a1111_samplers_with_levels_of_their_own():
    fast = a1111(SD, "DPM fast", "Karras", 10)
    np.testing.assert_allclose(fast.sigmas, np.exp(np.linspace(np.log(HIGH), np.log(LOW), 5)))
    assert fast.sampler.remainder == 1 and fast.sampler.eta == 1
    adaptive = a1111(SD, "DPM adaptive")
    assert adaptive.sampler == DPMAdaptive(eta=1.0)
    np.testing.assert_allclose(adaptive.sigmas, [HIGH, LOW])
    restart = a1111(SD, "Restart", steps=36)
    np.testing.assert_allclose(
        restart.sigmas, Restart.schedule(np.array(schedule_of("Karras", 36)))
    )
    assert len(restart.timesteps) == len(restart.sigmas) - 1

    lcm = a1111(SD, "LCM", steps=4)
    few = np.log(TABLE[19::20])
    spots = np.linspace(49, 0, 4)
    np.testing.assert_allclose(lcm.sigmas[:-1], np.exp(np.interp(spots, np.arange(50), few)))
    nearest = [np.argmin(abs(np.log(s) - few)) * 20 + 19 for s in lcm.sigmas[:-1]]
    np.testing.assert_array_equal(lcm.timesteps, nearest)

    unipc = a1111(SD, "UniPC", steps=7)  # 8
    assert unipc.sampler == UniPC(3, "bh1")
    times = np.linspace(1, 1e-3, 9)
    np.testing.assert_allclose(unipc.timesteps, times[:-1] * 1000 - 1, atol=1e-9)
    bar = np.exp(2 * log_alpha(times))
    np.testing.assert_allclose(unipc.sigmas, np.sqrt((1 - bar) / bar), rtol=1e-9)
    even = a1111(SD, "UniPC", steps=10, unipc_skip="logSNR", unipc_variant="bh2")
    np.testing.assert_allclose(np.diff(np.log(even.sigmas), 2), 0, atol=1e-9)
    inside = np.sqrt(np.expm1(-2 * log_alpha((even.timesteps + 1) / 1000)))
    np.testing.assert_allclose(inside, even.sigmas[:-1], rtol=1e-9)
    root = a1111(SD, "UniPC", steps=10, unipc_skip="time_quadratic").timesteps
    np.testing.assert_allclose(np.diff(np.sqrt((root + 1) / 1000), 2), 0, atol=1e-9)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: compvis(SD, "euler"), "sampler"),
        (lambda: compvis(SD, "ddim", 9), "timestep 1000"),
        (lambda: compvis(SD, "ddim", 1001), "at most 1000"),
        (lambda: compvis(SD, "ddim", 0), "steps"),
        (lambda: compvis(SD, "plms", 1), "2 or more"),
        (lambda: compvis(SD, "plms", 10, 0.5), "eta"),
        (lambda: compvis(SD, "ddim", 10, 0.0, "log"), "discretize"),
        (lambda: a1111(SD, "DPM++ 4M"), "sampler"),
        (lambda: a1111(SD, "Euler", "Magic"), "scheduler"),
        (lambda: a1111(SD, "Euler", steps=True), "steps"),
        (lambda: a1111(SD, "DDIM", steps=1), "DDIM"),
        (lambda: a1111(SD, "PLMS", steps=501), "at most 500"),
        (lambda: a1111(SD, "UniPC", steps=2), "UniPC takes 3"),
        (lambda: a1111(SD, "UniPC", unipc_variant="vary_coeff"), "variant"),
        (lambda: a1111(SD, "Euler", "Simple", 1001), "1000"),
        (lambda: a1111(Schedule(timesteps=100), "Euler"), "1000 timesteps"),
    ],
)
def test_what_the_programs_cannot_do_is_refused(ask, said):
    with pytest.raises(InputError, match=said):
        ask()
