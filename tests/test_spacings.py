"""Spacings against their formulas, the programs' loops and diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sdjax.diffusion import spacings
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import InputError


def test_karras_is_even_in_the_rho_th_root():
    sigmas = spacings.karras(8, 0.03, 14.6)
    np.testing.assert_allclose([sigmas[0], sigmas[-2], sigmas[-1]], [14.6, 0.03, 0])
    np.testing.assert_allclose(np.diff(sigmas[:-1] ** (1 / 7), n=2), 0, atol=1e-12)


def test_exponential_is_even_in_the_logarithm():
    sigmas = spacings.exponential(8, 0.03, 14.6, final=0.01)
    np.testing.assert_allclose([sigmas[0], sigmas[-2], sigmas[-1]], [14.6, 0.03, 0.01])
    np.testing.assert_allclose(np.diff(np.log(sigmas[:-1]), n=2), 0, atol=1e-12)


@pytest.mark.parametrize("spacing", [spacings.karras, spacings.polyexponential])
def test_rho_is_a_number_that_jax_can_map_and_differentiate(spacing):
    rhos = np.float32([0.7, 3.0, 7.0])
    table = jax.vmap(lambda rho: spacing(6, 0.03, 14.6, rho))(rhos)
    np.testing.assert_allclose(
        table, [spacing(6, 0.03, 14.6, float(r)) for r in rhos], rtol=2e-5, atol=1e-5
    )
    slope = jax.jacfwd(lambda rho: spacing(6, 0.03, 14.6, rho))(jnp.float32(7.0))
    ends = [spacing(6, 0.03, 14.6, r) for r in (6.99, 7.01)]
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 0.02, rtol=1e-3, atol=1e-5)


def test_timestep_spacings_are_table_2_of_lin_et_al():
    np.testing.assert_array_equal(spacings.leading(4, offset=1), [751, 501, 251, 1])
    np.testing.assert_array_equal(spacings.trailing(4), [999, 749, 499, 249])
    np.testing.assert_array_equal(spacings.linspace(4), [999, 666, 333, 0])
    assert all(t.dtype == np.float64 for t in (spacings.leading(4), spacings.trailing(4)))


@pytest.mark.parametrize("name", ["leading", "trailing", "linspace"])
def test_every_step_count_gives_that_many_timesteps(name):
    for n in range(1, 1001):
        t = getattr(spacings, name)(n)
        assert len(t) == n and t.min() >= 0 and t.max() <= 999 and (np.diff(t) < 0).all()


SD = Schedule()
TABLE, LOW, HIGH = SD.sigmas, SD.sigma_min, SD.sigma_max
COUNTS = (1, 2, 3, 7, 10, 20, 30, 50, 999)


def comfy_timestep_to_sigma(t):
    """ComfyUI's and k-diffusion's `sigma(timestep)`: log sigmas, linearly between."""
    low, high = int(np.floor(t)), int(np.ceil(t))
    part = t - low
    return np.exp((1 - part) * np.log(TABLE[low]) + part * np.log(TABLE[high]))


def reference(name, n):
    """The programs' loops, on Stable Diffusion's table, in float64."""
    top = len(TABLE) - 1
    if name == "simple":  # ComfyUI and A1111
        return [TABLE[-(1 + int(x * (len(TABLE) / n)))] for x in range(n)] + [0]
    if name in ("normal", "sgm_uniform"):  # ComfyUI and A1111
        t = np.linspace(top, 0, n) if name == "normal" else np.linspace(top, 0, n + 1)[:-1]
        return [comfy_timestep_to_sigma(x) for x in t] + [0]
    if name == "ddim_uniform":  # ComfyUI
        sigmas, x = [0], 1
        while x < len(TABLE):
            sigmas.append(TABLE[x])
            x += max(len(TABLE) // n, 1)
        return sigmas[::-1]
    if name == "quad":  # CompVis: make_ddim_timesteps
        t = (np.linspace(0, np.sqrt(len(TABLE) * 0.8), n) ** 2).astype(int) + 1
        return [*TABLE[sorted(set(t), reverse=True)], 0]
    if name == "beta":  # ComfyUI
        t = np.rint(stats.beta.ppf(1 - np.linspace(0, 1, n, endpoint=False), 0.6, 0.6) * top)
        return [TABLE[int(x)] for i, x in enumerate(t) if i == 0 or x != t[i - 1]] + [0]
    if name == "beta_sigmas":  # A1111
        return [
            LOW + stats.beta.ppf(x, 0.6, 0.6) * (HIGH - LOW) for x in 1 - np.linspace(0, 1, n)
        ] + [0]
    if name == "polyexponential":  # k-diffusion, rho 1
        ramp = np.linspace(1, 0, n)
        return [*np.exp(ramp * (np.log(HIGH) - np.log(LOW)) + np.log(LOW)), 0]
    if name == "vp":  # k-diffusion
        t = np.linspace(1, 1e-3, n)
        return [*np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1), 0]
    if name == "kl_optimal":  # ComfyUI, which divides by 0 for one step
        i = np.arange(n) / max(n - 1, 1)
        return [*np.tan(i * np.arctan(LOW) + (1 - i) * np.arctan(HIGH)), 0]
    if name == "linear_quadratic":  # ComfyUI
        if n == 1:
            return [HIGH, 0]
        first = n // 2
        x = [i * 0.025 / first for i in range(first)]
        gap, rest = first - 0.025 * n, n - first
        a = gap / (first * rest**2)
        b = 0.025 / first - 2 * gap / (rest**2)
        x += [a * i**2 + b * i + a * first**2 for i in range(first, n)] + [1]
        return [(1 - v) * HIGH for v in x]
    table = np.array(spacings.AYS["sdxl" if name.endswith("xl") else "sd1"])  # ComfyUI
    if n + 1 != len(table):
        low, high = np.linspace(0, 1, len(table)), np.linspace(0, 1, n + 1)
        table = np.exp(np.interp(high, low, np.log(table[::-1])))[::-1].copy()
    table[-1] = 0
    return table


LOOPS = (
    *("simple", "normal", "sgm_uniform", "ddim_uniform", "quad", "beta", "beta_sigmas"),
    *("polyexponential", "vp", "kl_optimal", "linear_quadratic"),
    *("align_your_steps", "align_your_steps_sdxl"),
)


@pytest.mark.parametrize("name", LOOPS)
def test_spacings_are_the_programs_loops(name):
    for n in COUNTS:
        sigmas, t = spacings.named(name, n, SD)
        np.testing.assert_allclose(sigmas, reference(name, n), rtol=1e-9, atol=1e-13)
        assert t is None or len(t) == len(sigmas) - 1
        assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("lu", "use_lu_lambdas"),
        ("beta_sigmas", "use_beta_sigmas"),
        ("karras", "use_karras_sigmas"),
        ("exponential", "use_exponential_sigmas"),
    ],
)
def test_spacings_of_levels_are_those_of_diffusers(name, option):
    diffusers = pytest.importorskip("diffusers")
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for n in (2, 10, 25):
        scheduler = diffusers.DPMSolverMultistepScheduler(**betas, **{option: True})
        scheduler.set_timesteps(n)
        got = spacings.named(name, n, SD)[0]
        np.testing.assert_allclose(got, scheduler.sigmas.numpy(), rtol=3e-5)  # its table is float32


def test_align_your_steps_has_diffusers_tables_and_a1111s_end():
    from diffusers.schedulers import AysSchedules

    for model, name in (("sd1", ""), ("sdxl", "XL"), ("svd", "Video")):
        got = spacings.align_your_steps(10, model)
        want = AysSchedules[f"StableDiffusion{name}Sigmas"]
        np.testing.assert_allclose(got, want, atol=4e-3, rtol=1e-3)  # it prints three decimals
    eleven = spacings.align_your_steps(11, append=True)
    np.testing.assert_allclose(eleven, [*spacings.AYS["sd1"], 0])
    twenty = spacings.align_your_steps(20, append=True)
    np.testing.assert_allclose(twenty[[0, -2, -1]], [*np.array(spacings.AYS["sd1"])[[0, -1]], 0])


def test_the_continuous_process_has_the_range_of_its_paper():
    sigmas = spacings.vp(5)
    assert sigmas[0] == pytest.approx(152, rel=0.01) and sigmas[-2] == pytest.approx(0.0105, 0.01)


def test_polyexponential_is_even_in_the_rho_th_root_of_the_logarithm():
    sigmas = spacings.polyexponential(9, 0.03, 14.6, rho=2.0)
    part = np.log(sigmas[:-1] / 0.03) / np.log(14.6 / 0.03)
    np.testing.assert_allclose(part, np.linspace(1, 0, 9) ** 2, atol=1e-12)


def test_every_name_gives_a_schedule_that_ends_at_0():
    for name in spacings.NAMES:
        for n in (1, 5, 40):
            sigmas, t = spacings.named(name, n, SD)
            assert sigmas[-1] == 0 and (np.diff(sigmas) < 0).all() and np.isfinite(sigmas).all()
            assert t is None or (t.min() >= 0 and t.max() <= 999)


def test_unknown_names_and_models_are_refused():
    with pytest.raises(InputError, match="karras"):
        spacings.named("magic", 5, SD)
    with pytest.raises(InputError, match="sdxl"):
        spacings.align_your_steps(5, "sd3")
    with pytest.raises(InputError, match="linear_steps"):
        spacings.linear_quadratic(5, 1.0, linear_steps=5)
    with pytest.raises(InputError, match="1000"):
        spacings.simple(1001)


def test_pad_repeats_the_last_value():
    out = spacings.pad([np.array([3.0, 1.0, 0.5]), np.array([2.0, 0.0])])
    assert out.shape == (3, 2, 1, 1, 1)
    np.testing.assert_array_equal(out[:, :, 0, 0, 0], [[3, 2], [1, 0], [0.5, 0]])
    assert spacings.pad([np.array([1.0, 0.0])], 5).shape == (5, 1, 1, 1, 1)


def test_bad_step_counts_are_refused():
    for n in (0, -3, True):
        with pytest.raises(InputError, match="steps"):
            spacings.karras(n, 0.1, 1.0)
    for spacing in (spacings.leading, spacings.trailing):
        with pytest.raises(InputError, match="1000"):
            spacing(1001)
    with pytest.raises(InputError, match="pad"):
        spacings.pad([])
    with pytest.raises(InputError, match="pad"):
        spacings.pad([np.ones(4)], 3)
